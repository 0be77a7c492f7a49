"""One writer and many readers: nobody disturbs, and nobody sees half a batch."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

from faults.workload import Acks, examine, forked, sizes, small_segments

from repscope import store
from repscope.errors import StoreExists, StoreLocked


def content(path: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Return name, inode, time and bytes of every file."""
    return {
        file: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def record(path: Path, pipe: int, batches: int, seed: int) -> None:
    rng = random.Random(seed)
    small_segments(rng)
    writer = store.create(path, meta={})
    acks = Acks(writer, pipe)
    acks.tell()
    for _ in range(batches):
        for _ in range(rng.randrange(1, 12)):
            acks.append()
        writer.commit()
        acks.tell()
    writer.close()
    acks.tell()


class Told:
    """The latest number that came through a pipe."""

    def __init__(self, read: int) -> None:
        os.set_blocking(read, False)
        self._read, self.latest, self.ended = read, -1, False

    def look(self) -> int:
        try:
            data = os.read(self._read, 2**16)
        except BlockingIOError:
            return self.latest
        self.ended |= not data
        if data:
            (self.latest,) = struct.unpack("<q", data[-8:])
        return self.latest


@sizes(short=15, long=400)
def test_reading_while_writing(n, tmp_path, figures):
    """Everything acknowledged when a reader opens is there, in whole batches."""
    path = tmp_path / "run"
    read, write = os.pipe()
    told, opens, faults = Told(read), 0, 0
    with forked(record, path, write, n, n) as child:
        os.close(write)
        while not told.ended:
            acked = told.look()
            if acked < 0:
                continue
            opens += 1
            seen = examine(path, acked)
            faults += any([not seen.opens, seen.lost, seen.wrong, seen.torn])
        child.join()
        assert child.exitcode == 0
    os.close(read)
    seen = examine(path, told.latest)
    figures("reading while writing", batches=n, steps=seen.steps, whole_reads=opens,
            faults=faults)  # fmt: skip
    assert opens > 2
    assert (faults, seen.lost, seen.wrong, seen.torn) == (0, 0, 0, 0)


def read_for_ever(path: Path, pipe: int) -> None:
    os.write(pipe, b"!")
    while True:
        examine(path, 0)


@sizes(short=6, long=300)
def test_a_killed_reader_leaves_nothing(n, tmp_path, figures):
    path = tmp_path / "run"
    writer = store.create(path, meta={})
    read, write = os.pipe()
    acks = Acks(writer, write)
    rng, changed = random.Random(0), 0
    for _ in range(30):
        acks.append()
    for _ in range(n):
        acks.append()
        writer.commit()
        before = content(path)
        with forked(read_for_ever, path, write):
            while os.read(read, 1) != b"!":
                pass
            time.sleep(rng.uniform(0, 0.02))
        changed += content(path) != before
    writer.close()
    seen = examine(path, 30 + n)
    figures(
        "killed readers", kills=n, stores_changed=changed, acked_rows_lost=seen.lost
    )
    os.close(read)
    os.close(write)
    assert changed == 0
    assert (seen.opens, seen.steps, seen.lost, seen.wrong) == (True, 30 + n, 0, 0)


def intrude(path: Path, out: Path) -> None:
    found = []
    for use in (store.create, store.remove):
        try:
            use(path, **({"meta": {}} if use is store.create else {}))
        except (StoreExists, StoreLocked) as error:
            found.append(type(error).__name__)
    out.write_text(" ".join(found))


@sizes(short=5, long=200)
def test_a_second_writer_is_refused(n, tmp_path, figures):
    path = tmp_path / "run"
    writer = store.create(path, meta={})
    read, write = os.pipe()
    acks, refused = Acks(writer, write), 0
    for _ in range(n):
        acks.append()
        with forked(intrude, path, tmp_path / "verdict") as child:
            writer.commit()  # while the other one tries
            child.join()
        refused += (tmp_path / "verdict").read_text() == "StoreLocked StoreLocked"
    writer.close()
    os.close(read)
    os.close(write)
    seen = examine(path, n)
    figures("second writers", tries=n, refused=refused, acked_rows_lost=seen.lost,
            rows_wrong=seen.wrong)  # fmt: skip
    assert refused == n
    assert (seen.opens, seen.lost, seen.wrong) == (True, 0, 0)
