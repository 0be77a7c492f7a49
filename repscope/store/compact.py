"""Merge small segments, so that a day of commits leaves tens of files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from repscope.snapshot import StreamKey
from repscope.store.batch import Batch
from repscope.store.chunks import StoredPart
from repscope.store.columns import Column
from repscope.store.index import to_spans

FAN = 16  # so many files of one size become one; a day has some 8,640 commits


def choose(batches: Sequence[Batch | None], *, limit: int) -> list[Batch]:
    """Return neighbours that are worth one segment, or nothing.

    Args:
        batches: In order; None stands for those that stay as they are.
        limit: Bytes of a segment.

    Returns:
        `FAN` batches of one level, or fewer if more would not fit.
    """
    run: list[Batch] = []
    for batch in batches:
        if batch is None or not is_small(batch, limit=limit):
            run = []
            continue
        same = bool(run) and run[0].level == batch.level
        if same and sum(each.nbytes for each in run) + batch.nbytes > limit:
            if len(run) > 1:
                return run
            same = False
        run = [*run, batch] if same else [batch]
        if len(run) == FAN:
            return run
    return []


def is_small(batch: Batch, *, limit: int) -> bool:
    """Return whether a batch may be merged with others."""
    return batch.n_segments <= 1 and batch.nbytes <= limit // 2


def columns(batches: Sequence[Batch]) -> list[Column]:
    """Return the rows of neighbouring batches, checked, as those of one."""
    made: dict[StreamKey, Column] = {}
    before = 0
    for batch in batches:
        for key, parts in batch.parts.items():
            for stored in parts:
                block = _load(stored)
                if key not in made:
                    made[key] = Column(key, _like(stored), block)
                records, starts, rows = stored.part.where
                made[key].extend(block, records + before, starts, rows)
        before += len(batch.steps)
    return list(made.values())


def _load(stored: StoredPart) -> torch.Tensor:
    part = stored.part
    out = torch.empty(list(part.shape), dtype=part.torch_dtype)
    stored.read(0, part.shape[0], out.reshape(-1).view(torch.uint8).numpy())
    return out


def _like(stored: StoredPart) -> torch.Tensor:
    """Return a tensor with the shape and dtype of a record, and no memory."""
    part = stored.part
    shape = list(part.row_shape) if part.whole else [0, *part.row_shape]
    return torch.empty(shape, dtype=part.torch_dtype, device="meta")


def frame(batches: Sequence[Batch]) -> dict[str, Any]:
    """Return the frame that puts one batch in the place of several, but its segments.

    Args:
        batches: Neighbours.
    """
    before = np.cumsum([0, *(len(batch.steps) for batch in batches)]).tolist()
    return {
        "time": time.time(),
        "replaces": [batches[0].frames[0], batches[-1].frames[1]],
        "level": batches[0].level + 1,
        "steps": to_spans(np.concatenate([b.steps for b in batches]).tolist()),
        "hidden": to_spans(
            np.flatnonzero(~np.concatenate([b.visible for b in batches])).tolist()
        ),
        "tags": [
            [start + record - batch.first, tag]
            for start, batch in zip(before, batches, strict=False)
            for record, tag in batch.tags
        ],
    }
