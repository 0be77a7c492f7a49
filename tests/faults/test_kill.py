"""SIGKILL at random times: what was acknowledged is there, and opens as it is.

A third of the runs become one file: they are also killed while they are packed.
"""

from __future__ import annotations

import collections
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
    recovered,
    sizes,
    small_segments,
    tally,
)

from repscope import store
from repscope.store import onefile


def record_until_killed(path: Path, seed: int, pipe: int) -> None:
    rng = random.Random(seed)
    small_segments(rng)
    how = rng.choice(["batch", "batch", "append"])
    writer = store.create(path, meta={"seed": seed}, durability=how)
    acks = Acks(writer, pipe)
    acks.tell()  # from here on the store must open
    commit_every = rng.choice([1, 2, 8, 30])
    last = rng.choice([5, 40, 10**9, 10**9, 10**9])
    if path.suffix == ".h5":
        last = rng.choice([1, 5, 10, 20, 10**9])  # more are closed, and so packed
    for step in range(last):
        acks.append()
        if step % commit_every == commit_every - 1:
            writer.commit()
        acks.tell()
    writer.close()
    acks.tell()
    signal.pause()


def place(folder: Path, seed: int) -> Path:
    return folder / str(seed) / ("run" if seed % 3 else "run.h5")


def kill_one(path: Path, seed: int) -> tuple[int, Seen]:
    """Kill a recording child once; return the acknowledged steps and what is left."""
    path.parent.mkdir()
    rng = random.Random(-1 - seed)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as told:
        with forked(record_until_killed, path, seed, write):
            os.close(write)
            # One in five is killed around its creation, perhaps before it.
            first = told.read(8) if rng.random() < 0.8 else b""
            time.sleep(rng.uniform(0, 0.05 if seed % 3 else 0.1))
        acks = first + told.read()
    acked = struct.unpack("<q", acks[-8:])[0] if acks else -1
    return acked, examine(path, max(acked, 0))


def state(path: Path) -> str:
    """Return what of a run that becomes one file is there."""
    if path.exists():
        return "both" if onefile.workplace(path).exists() else "packed"
    packing = any(path.parent.glob(".tmp-run.h5-*"))
    return "while it was packed" if packing else "while it was recorded"


@sizes(short=12, long=1200)
def test_kill(n, tmp_path, figures):
    trials, again, unborn = [], [], 0
    states = collections.Counter()
    for seed in range(n):
        path = place(tmp_path, seed)
        acked, seen = kill_one(path, seed)
        if acked < 0:
            unborn += 1  # create() had not returned: nothing was promised
        else:
            trials.append((path.suffix, acked, seen))
            states[path.suffix and state(path)] += 1
            if seed % 4 < 2:
                again += recovered(path, max(acked, seen.steps))
        shutil.rmtree(path.parent)
    for suffix, what in (("", "a directory"), (".h5", "one file")):
        some = [(acked, seen) for kind, acked, seen in trials if kind == suffix]
        figures(f"SIGKILL, {what}", kills=len(some),
                acked_rows=sum(owed(acked) for acked, _ in some),
                **tally(seen for _, seen in some))  # fmt: skip
    figures("SIGKILL, both", kills=n, before_create_returned=unborn)
    del states[""]
    figures("SIGKILL, one file, killed", **dict(states.most_common()))
    figures("SIGKILL, gone on with", looks=len(again), **tally(again))
    assert sum(owed(acked) for _, acked, _ in trials) > n
    assert not any(tally(seen for *_, seen in trials).values())
    assert not any(tally(again).values())


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
