"""SIGKILL at random times: what was acknowledged is there, and opens as it is."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
from faults.workload import (
    Acks,
    Seen,
    examine,
    forked,
    owed,
    sizes,
    small_segments,
    tally,
)

from repscope import store


def record_until_killed(path: Path, seed: int, pipe: int) -> None:
    rng = random.Random(seed)
    small_segments(rng)
    writer = store.create(path, meta={"seed": seed})
    acks = Acks(writer, pipe)
    acks.tell()  # from here on the store must open
    commit_every = rng.choice([1, 2, 8, 30])
    last = rng.choice([5, 40, 10**9, 10**9, 10**9])
    for step in range(last):
        acks.append()
        if step % commit_every == commit_every - 1:
            writer.commit()
        acks.tell()
    writer.close()
    acks.tell()
    signal.pause()


def kill_one(path: Path, seed: int) -> tuple[int, Seen]:
    """Kill a recording child once; return the acknowledged steps and what is left."""
    rng = random.Random(-1 - seed)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as told:
        with forked(record_until_killed, path, seed, write):
            os.close(write)
            # One in five is killed around its creation, perhaps before it.
            first = told.read(8) if rng.random() < 0.8 else b""
            time.sleep(rng.uniform(0, 0.05))
        acks = first + told.read()
    acked = struct.unpack("<q", acks[-8:])[0] if acks else -1
    return acked, examine(path, max(acked, 0))


@sizes(short=12, long=1200)
def test_kill(n, tmp_path, figures):
    trials, unborn = [], 0
    for seed in range(n):
        acked, seen = kill_one(tmp_path / str(seed), seed)
        if acked < 0:
            unborn += 1  # create() had not returned: nothing was promised
        else:
            trials.append((acked, seen))
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    total = tally(seen for _, seen in trials)
    acked_rows = sum(owed(acked) for acked, _ in trials)
    figures("SIGKILL", kills=n, before_create_returned=unborn, acked_rows=acked_rows,
            **total)  # fmt: skip
    assert acked_rows > n
    assert not any(total.values())


@pytest.mark.parametrize("rest", [b"", b"x"])
def test_the_examination_sees_what_it_should(tmp_path, rest):
    """An oracle that cannot fail would prove nothing."""
    read, write = os.pipe()
    writer = store.create(tmp_path / "run", meta={})
    acks = Acks(writer, write)
    for _ in range(4):
        acks.append()
    writer.commit()
    acks.tell()
    assert struct.unpack("<q", os.read(read, 8)) == (4,)
    assert examine(tmp_path / "run", 4) == Seen(opens=True, steps=4)
    assert examine(tmp_path / "run", 6).lost == owed(6) - 11
    (segment,) = (tmp_path / "run" / "segments").iterdir()
    segment.write_bytes(segment.read_bytes()[:-100] + rest)
    assert examine(tmp_path / "run", 4) == Seen(opens=True, steps=4, lost=11)
    (tmp_path / "run" / "FORMAT").unlink()
    assert examine(tmp_path / "run", 4) == Seen(opens=False, lost=11)
    writer.abort()
    os.close(read)
    os.close(write)
