"""The program whose calls are recorded: ``recorded_writer.py FOLDER N KIND...``.

For each KIND, a few words about the store, it makes a store of N steps in FOLDER/KIND,
which exists, and tells what is acknowledged in FOLDER/KIND/acks. Faults may be injected
into it: then it does what a user would, and commits once more.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

from faults.workload import Acks, small_segments

from repscope import store
from repscope.errors import StoreError
from repscope.store import compact, packing, writer


def insist(action: Callable[[], None], again: Callable[[], None]) -> None:
    for attempt in (action, again, again):
        with contextlib.suppress(StoreError):
            attempt()
            return


def place(folder: Path, kind: str) -> Path:
    """Return where the program puts a store of this kind."""
    return folder / ("run.h5" if "file" in kind.split() else "run")


def main(folder: Path, kind: str, steps: int) -> None:
    rng, words = random.Random(steps), kind.split()
    small_segments(rng)
    compact.FAN = 16
    if "merged" in words:
        # Large enough for three merged batches, which are merged again.
        compact.FAN, writer.SEGMENT_BYTES = 3, 2**20
    packing.CHUNK_BYTES = 2**14
    how = "append" if "append" in words else "batch"
    path = place(folder, kind)
    fd = os.open(folder / "acks", os.O_WRONLY | os.O_CREAT)
    recording = store.create(path, meta={"steps": steps}, durability=how)
    acks = Acks(recording, fd)
    acks.tell()
    for step in range(steps):
        if "reopened" in words and step == steps // 2:
            insist(recording.close, recording.close)
            acks.tell()
            recording = store.reopen(path, durability=how)
            acks.go_on(recording)
        insist(acks.append, recording.commit)
        acks.tell()
        if rng.random() < (0.8 if "merged" in words else 0.4):
            recording.annotate(noted=step)
            insist(recording.commit, recording.commit)
            acks.tell()
    insist(recording.close, recording.close)
    acks.tell()


if __name__ == "__main__":
    for each in sys.argv[3:]:
        main(Path(sys.argv[1], each), each, int(sys.argv[2]))
