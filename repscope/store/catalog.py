"""The frames of a manifest as a table of contents."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repscope.snapshot import StreamKey
from repscope.store import manifest
from repscope.store.chunks import StoredPart
from repscope.store.index import RESERVED, Part, Spans, from_spans


class Batch:
    """What one commit added.

    Args:
        path: The store.
        first: Number, within the run, of the first record.
        frame: Its manifest frame.
    """

    def __init__(self, path: Path, first: int, frame: Mapping[str, Any]) -> None:
        self.first = first
        self.steps = from_spans(frame["steps"])
        self.tags = [(first + record, tag) for record, tag in frame["tags"]]
        self.parts: dict[StreamKey, list[StoredPart]] = {}
        for segment in frame["segments"]:
            file = path / "segments" / f"{segment['number']:08d}.h5"
            for data in segment["parts"]:
                part = Part.from_json(data)
                stored = StoredPart(part, file, segment["bytes"], self.steps)
                self.parts.setdefault(part.key, []).append(stored)

    def find(self, key: StreamKey, record: int) -> list[tuple[StoredPart, int, int]]:
        """Return where the rows of a record are: part, start, rows; empty if absent."""
        found = []
        for stored in self.parts.get(key, ()):
            place = stored.part.find(record - self.first)
            if place is not None:
                found.append((stored, *place))
        return found

    def records(self) -> list[int]:
        """Return the numbers of the records that have a stream, ascending."""
        # Streams recorded together share their spans: decode each kind once.
        kinds: dict[str, Spans] = {
            str(stored.part.records): stored.part.records
            for key, parts in self.parts.items()
            if key[0] not in RESERVED
            for stored in parts
        }
        every = [from_spans(spans) for spans in kinds.values()]
        unique = np.unique(np.concatenate(every)) if every else np.zeros(0, np.int64)
        return [self.first + int(record) for record in unique]


class Catalog:
    """Everything the manifest of a store says.

    Args:
        path: The store.
    """

    def __init__(self, path: Path) -> None:
        self.meta: dict[str, Any] = {}
        self.closed = False
        self.nbytes = 0
        self.records: list[int] = []
        self.by_step: dict[int, list[int]] = {}
        self.tags: dict[str, int] = {}
        self.last: dict[StreamKey, int] = {}
        self._batches: list[Batch] = []
        self._starts: list[int] = []
        count = 0
        for frame in manifest.read(path):
            self.meta |= frame.get("meta", {})
            self.closed = frame.get("closed", False)
            if frame.get("steps"):
                self._add(batch := Batch(path, count, frame))
                self.nbytes += sum(segment["bytes"] for segment in frame["segments"])
                count += len(batch.steps)
        self.steps = sorted(self.by_step)

    def _add(self, batch: Batch) -> None:
        self._batches.append(batch)
        self._starts.append(batch.first)
        self.tags |= {tag: record for record, tag in batch.tags}
        for record in batch.records():
            self.records.append(record)
            self.by_step.setdefault(int(batch.steps[record - batch.first]), []).append(
                record
            )
        for key, parts in batch.parts.items():
            self.last[key] = batch.first + int(parts[-1].part.where[0][-1])

    def batch(self, record: int) -> Batch:
        """Return the batch that holds a record."""
        return self._batches[bisect.bisect_right(self._starts, record) - 1]

    def step(self, record: int) -> int:
        """Return the step of a record."""
        batch = self.batch(record)
        return int(batch.steps[record - batch.first])

    def tags_of(self, record: int) -> tuple[str, ...]:
        """Return the tags of a record."""
        return tuple(tag for at, tag in self.batch(record).tags if at == record)

    def streams(self) -> list[StreamKey]:
        """Return the streams in order of first appearance."""
        return [key for key in self.last if key[0] not in RESERVED]

    def has(self, key: StreamKey, record: int) -> bool:
        """Return whether a record has a stream."""
        return bool(self.batch(record).find(key, record))

    def latest(self, key: StreamKey, step: int) -> int | None:
        """Return the latest record of a step that has the stream, or None."""
        records = reversed(self.by_step.get(step, ()))
        return next((record for record in records if self.has(key, record)), None)

    def steps_with(self, key: StreamKey) -> list[int]:
        """Return the ascending steps at which a stream was recorded."""
        found: set[int] = set()
        for batch in self._batches:
            for stored in batch.parts.get(key, ()):
                found.update(batch.steps[stored.part.where[0]].tolist())
        return sorted(found)

    def shape(self, key: StreamKey, record: int) -> tuple[int, ...]:
        """Return the shape of the tensor that `load` returns."""
        found = self.batch(record).find(key, record)
        part = found[0][0].part
        rows = sum(count for _, _, count in found)
        if part.whole:
            return tuple(part.row_shape)
        if list(part.shape[1:]) != list(part.row_shape):  # stored flat
            rows //= int(np.prod(part.row_shape))
        return rows, *part.row_shape

    def load(self, key: StreamKey, record: int) -> Tensor:
        """Return a copy of what a record holds of a stream."""
        found = self.batch(record).find(key, record)
        shape = self.shape(key, record)
        out = torch.empty(shape, dtype=found[0][0].part.torch_dtype)
        raw, filled = out.reshape(-1).view(torch.uint8).numpy(), 0
        for stored, start, rows in found:
            size = rows * stored.part.row_bytes
            stored.read(start, rows, raw[filled : filled + size])
            filled += size
        return out

    def columns(self, target: str) -> Iterator[tuple[str, list[int], Tensor]]:
        """Yield layer, steps and stacked values of one-value streams, a part each."""
        for batch in self._batches:
            for (kind, name), parts in batch.parts.items():
                for stored in parts if kind == target else ():
                    part = stored.part
                    out = torch.empty(part.shape, dtype=part.torch_dtype)
                    stored.read(0, part.shape[0], out.view(torch.uint8).numpy())
                    yield name, batch.steps[part.where[0]].tolist(), out
