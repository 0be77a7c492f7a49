"""Make the golden stores of a format: ``python make.py v1``; old ones stay as they are.

They are read by every later RepScope. What they hold is computed by `values` here, so
that no reader is compared with itself.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from unittest import mock

import torch

from repscope import store
from repscope.snapshot import Snapshot
from repscope.store import compact, segment, writer

HERE = Path(__file__).parent
META = {"seed": 7, "optimizer": "shampoo", "note": "Ünïcode"}
STEPS = (0, 10, 20, 30, 45, 50)  # 40 was hidden by a rewind; 50 is in the log only


def values(step: int) -> Snapshot:
    """Return what a golden store holds at a step: every kind of stream."""
    rows = 2 + (step == 20)
    base = torch.arange(rows * 3, dtype=torch.float64).reshape(rows, 3) + step
    flat = base.reshape(-1)
    streams = {
        ("outputs", "enc.0/out proj"): base.float() / 7,
        ("outputs", "half"): (base / 4).half(),
        ("inputs", "x@1"): (base / 8).bfloat16(),
        ("weights", "fc.weight"): flat[:6].reshape(2, 3).clone(),
        ("weights", "counts"): torch.tensor([step, -step], dtype=torch.int32),
        ("weights", "mask"): torch.tensor([True, False, step > 20]),
    }
    scalars = {"loss": 1 / (1 + step), "nan": float("nan")}
    labels = torch.arange(rows) % 2
    return Snapshot(step, streams, labels, scalars, (f"at-{step}",))


def make(folder: Path) -> None:
    """Write a directory with merges, a rewind, a log, a note; and packed files."""
    patches = [
        mock.patch.object(compact, "FAN", 3),
        mock.patch.object(writer, "SEGMENT_BYTES", 2**15),
        mock.patch.object(segment, "CHUNK_BYTES", 256),
    ]
    for patch in patches:
        patch.start()
    path = folder / "run"
    recording = store.create(path, meta=META)
    for step in (0, 10, 20, 30, 40):
        recording.append(values(step))
        recording.progress = step
        if step in (10, 30):
            recording.commit()
    recording.close()
    recording = store.reopen(path, at=30, durability="append")
    recording.annotate(later=True)
    recording.append(values(45))
    recording.progress = 45
    recording.commit()
    recording.append(values(50))
    recording.abort()
    (path / "LOCK").unlink()
    store.pack(path, folder / "packed.h5")
    store.pack(path, folder / "series.h5", compression="gzip", layout="series")
    for patch in patches:
        patch.stop()


if __name__ == "__main__":
    target = HERE / sys.argv[1]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    make(target)
