"""The program whose system calls are recorded: ``recorded_writer.py FOLDER STEPS``.

It makes the store FOLDER/run and tells what is acknowledged in FOLDER/acks. Faults may
be injected into it: then it does what a user would, and commits once more.
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


def insist(action: Callable[[], None], again: Callable[[], None]) -> None:
    for attempt in (action, again, again):
        with contextlib.suppress(StoreError):
            attempt()
            return


def main(folder: Path, steps: int) -> None:
    rng = random.Random(steps)
    small_segments(rng)
    fd = os.open(folder / "acks", os.O_WRONLY | os.O_CREAT)
    writer = store.create(folder / "run", meta={"steps": steps})
    acks = Acks(writer, fd)
    acks.tell()
    for step in range(steps):
        insist(acks.append, writer.commit)
        acks.tell()
        if rng.random() < 0.4:
            writer.annotate(noted=step)
            insist(writer.commit, writer.commit)
            acks.tell()
    insist(writer.close, writer.close)
    acks.tell()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
