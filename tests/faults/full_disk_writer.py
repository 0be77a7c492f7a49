"""The program that fills a small disk: ``full_disk_writer.py FOLDER TRIALS``.

It mounts a tmpfs of 6 MB on FOLDER, in a mount namespace of its own, so that nothing
is left of it afterwards, and prints what happened as JSON.
"""

from __future__ import annotations

import collections
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from faults.workload import KEYS, Acks, examine, owed, small_segments

from repscope import store
from repscope.errors import StoreFull


def fill(folder: Path, seed: int, found: collections.Counter[str]) -> None:
    """Record until the disk is full, make room, go on; twice, and close."""
    rng = random.Random(seed)
    small_segments(rng)
    ballast = folder / "ballast"
    # Leave between 20 and 800 kB: the disk fills at another byte in every trial.
    free = os.statvfs(folder).f_bavail * 4096
    ballast.write_bytes(bytes(free - rng.randrange(20_000, 800_000)))
    writer = store.create(folder / "run", meta={})
    with Path(os.devnull).open("wb") as nowhere:
        acks = Acks(writer, nowhere.fileno())
        until_full(acks, writer, rng, found)
        look(folder, writer, found)
        ballast.unlink()  # space comes back
        writer.commit()
        for _ in range(20):
            acks.append()
        writer.commit()
        with ballast.open("wb", buffering=0) as file:
            while os.statvfs(folder).f_bavail:
                file.write(bytes(4096))
        until_full(acks, writer, rng, found)
        look(folder, writer, found)
    ballast.unlink()
    writer.close()
    found["steps"] += look(folder, writer, found)
    shutil.rmtree(folder / "run")


def until_full(
    acks: Acks,
    writer: store.Writer,
    rng: random.Random,
    found: collections.Counter[str],
) -> None:
    every = rng.choice([1, 5, 20])
    for step in range(10**6):
        try:
            acks.append()
            if step % every == 0:
                writer.commit()
        except StoreFull as error:
            found["StoreFull"] += 1
            found["errno 28"] += error.errno == errno.ENOSPC
            return


def look(folder: Path, writer: store.Writer, found: collections.Counter[str]) -> int:
    """Hold the store to what its writer calls acknowledged; return its steps."""
    durable, steps = writer.acked_rows(*KEYS[0]), 0
    while owed(steps) < durable:
        steps += 1
    seen = examine(folder / "run", steps)
    found["do not open"] += not seen.opens
    found["acked rows lost"] += seen.lost
    found["rows wrong"] += seen.wrong
    found["steps torn"] += seen.torn
    found["acked rows"] += durable
    return seen.steps


def main(folder: Path, trials: int) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=True
    )
    found: collections.Counter[str] = collections.Counter()
    for seed in range(trials):
        fill(folder, seed, found)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
