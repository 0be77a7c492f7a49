"""The frames of a manifest as a table of contents."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from repscope.errors import CorruptSegment, NotAStore, UntrustedStore, UsageError
from repscope.snapshot import Snapshot, StreamKey
from repscope.store import contents, manifest
from repscope.store.batch import Batch
from repscope.store.chunks import StoredPart
from repscope.store.index import (
    LABELS,
    RESERVED,
    SCALARS,
    Ints,
    is_rows,
)

T = TypeVar("T")

_UNTRUSTED_BYTES = 2**30
# Integers of each size: values are moved as bits
_BITS = MappingProxyType(
    {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
)


class Catalog:
    """Everything the manifest of a store says.

    Args:
        path: The store, a directory or a packed file.
        trust: As for `open`.
    """

    def __init__(self, path: Path, *, trust: contents.Trust = "default") -> None:
        self.path = path
        self.trust = trust
        self.about = manifest.follow({}, {}, 0)
        self.closed = False
        self.progress = 0
        self.nbytes = 0
        self.layouts: dict[StreamKey, tuple[str, list[int]]] = {}
        self.files: dict[int, int] = {}  # number -> bytes of every segment in use
        self.replaced: set[int] = set()
        self._batches: list[Batch] = []
        self._newer: Catalog | None = None
        self._recorded: dict[StreamKey, tuple[Ints, Ints]] = {}
        self._packed = not path.is_dir()
        frames, logged = contents.read(path, trust=trust)
        for seq, frame in enumerate(frames + logged):
            self._take(frame, seq)
        self.n_frames, self.n_logged = len(frames), len(logged)
        self._index()

    def _take(self, frame: Mapping[str, Any], seq: int) -> None:
        """Follow one frame."""
        self.about = manifest.follow(self.about, frame, seq)
        self.closed = frame.get("closed", False)
        self.progress = frame.get("progress", self.progress)
        if "rewind" in frame:
            self.progress = frame["rewind"]
            for batch in self._batches:
                batch.rewind(frame["rewind"])
        if "replaces" in frame:
            self._replace(frame, seq)
        elif frame.get("steps"):
            before = self._batches[-1] if self._batches else None
            first = before.first + len(before.steps) if before else 0
            self._batches.append(batch := Batch(self._locate, first, frame, seq))
            self._compare(batch)
            self._count(frame)

    def _locate(self, number: int, log: bool) -> Path:
        if self._packed:
            return self.path
        return manifest.locate(self.path, number, log=log)

    def _count(self, frame: Mapping[str, Any]) -> None:
        for segment in frame["segments"]:
            if not segment.get("log"):
                self.files[segment["number"]] = segment["bytes"]
                self.nbytes += segment["bytes"]

    def _replace(self, frame: Mapping[str, Any], seq: int) -> None:
        """Put a merged batch in the place of what it was made of.

        Raises:
            CorruptSegment: If it does not hold the same records.
        """
        low, high = frame["replaces"]
        first = bisect.bisect_left(self._batches, low, key=_first_frame)
        end = bisect.bisect_right(self._batches, high, key=_first_frame)
        gone = self._batches[first:end]
        if gone and gone[-1].frames[1] > high:
            gone, end = gone[:-1], end - 1
        merged = Batch(self._locate, gone[0].first if gone else 0, frame, seq)
        steps = [batch.steps for batch in gone]
        if not gone or not np.array_equal(np.concatenate(steps), merged.steps):
            raise CorruptSegment(
                f"{self.path}/MANIFEST merges segments into one that holds other "
                "records; restore it from a copy"
            )
        self._batches[first:end] = [merged]
        self._compare(merged)
        for number in (number for batch in gone for number in batch.numbers):
            self.nbytes -= self.files.pop(number, 0)
            self.replaced.add(number)
        self._count(frame)

    def _compare(self, batch: Batch) -> None:
        """Refuse a stream whose parts do not fit together.

        Raises:
            CorruptSegment: If they do not.
        """
        for key, parts in batch.parts.items():
            for part in (stored.part for stored in parts):
                now = part.dtype, list(part.row_shape)
                if self.layouts.setdefault(key, now) != now:
                    raise CorruptSegment(
                        f"{self.path}/MANIFEST gives {key[0]} of layer {key[1]!r} two "
                        f"layouts, {self.layouts[key]} and {now}; restore it from a "
                        "copy"
                    )

    def _index(self) -> None:
        """Make the tables of what is visible."""
        self._starts = [batch.first for batch in self._batches]
        self.records: list[int] = []
        self.by_step: dict[int, list[int]] = {}
        self.tags: dict[str, int] = {}
        self.last: dict[StreamKey, int] = {}
        self.last_step = -1
        for batch in self._batches:
            seen = batch.visible
            self.last_step = max(self.last_step, *batch.steps[seen].tolist(), -1)
            self.tags |= {tag: r for r, tag in batch.tags if seen[r - batch.first]}
            for record in batch.records():
                self.records.append(record)
                step = int(batch.steps[record - batch.first])
                self.by_step.setdefault(step, []).append(record)
            for key, parts in batch.parts.items():
                if (last := batch.last(parts)) is not None:
                    self.last[key] = last
        self.steps = sorted(self.by_step)

    @property
    def meta(self) -> dict[str, Any]:
        """What was noted about the run; later notes win."""
        meta: dict[str, Any] = self.about["meta"]
        return meta

    @property
    def n_records(self) -> int:
        """How many records there are, hidden ones included."""
        return sum(len(batch.steps) for batch in self._batches)

    @property
    def done(self) -> int:
        """Optimizer updates that the last commit knew of."""
        return max(self.progress, self.last_step, 0)

    def batch(self, record: int) -> Batch:
        """Return the batch that holds a record."""
        return self._batches[bisect.bisect_right(self._starts, record) - 1]

    def step(self, record: int) -> int:
        """Return the step of a record."""
        batch = self.batch(record)
        return int(batch.steps[record - batch.first])

    def visible(self) -> list[tuple[int, int, tuple[str, ...]]]:
        """Return number, step and tags of every record that no rewind has hidden."""
        return [
            (batch.first + i, int(batch.steps[i]), self.tags_of(batch.first + i))
            for batch in self._batches
            for i in np.flatnonzero(batch.visible).tolist()
        ]

    def records_of(self, key: StreamKey) -> list[int]:
        """Return the visible records that have a stream, in order."""
        found = [batch.recorded(key)[1] for batch in self._batches]
        return [record for each in found for record in each.tolist()]

    def dtype(self, key: StreamKey, record: int) -> torch.dtype:
        """Return the element type of a stream."""
        return self.batch(record).parts[key][0].part.torch_dtype

    def tags_of(self, record: int) -> tuple[str, ...]:
        """Return the tags of a record."""
        return tuple(self.batch(record).tags_by_record.get(record, ()))

    def streams(self) -> list[StreamKey]:
        """Return the streams in order of first appearance."""
        return [key for key in self.last if key[0] not in RESERVED]

    def has(self, key: StreamKey, record: int) -> bool:
        """Return whether a record has a stream."""
        return bool(self.batch(record).find(key, record))

    def recorded(self, key: StreamKey) -> tuple[Ints, Ints]:
        """Return the ascending steps of a stream, and the latest record of each."""
        if key not in self._recorded:
            steps, records = self._by_step(key)
            last = np.diff(steps, append=-1) != 0
            self._recorded[key] = steps[last], records[last]
        return self._recorded[key]

    def occurrences(self, key: StreamKey) -> dict[tuple[int, int], int]:
        """Return the records of a stream by step, and by how many there are before.

        They are in ascending order.
        """
        steps, records = self._by_step(key)
        before = np.arange(len(steps)) - np.searchsorted(steps, steps)
        places = zip(steps.tolist(), before.tolist(), strict=True)
        return dict(zip(places, records.tolist(), strict=True))

    def _by_step(self, key: StreamKey) -> tuple[Ints, Ints]:
        """Return step and number of every visible record of a stream, ascending."""
        found = [batch.recorded(key) for batch in self._batches]
        steps = np.concatenate([np.zeros(0, np.int64), *(s for s, _ in found)])
        records = np.concatenate([np.zeros(0, np.int64), *(r for _, r in found)])
        order = np.lexsort((records, steps))
        return steps[order], records[order]

    def latest(self, key: StreamKey, step: int) -> int | None:
        """Return the latest record of a step that has the stream, or None."""
        steps, records = self.recorded(key)
        at = int(np.searchsorted(steps, step))
        return int(records[at]) if at < len(steps) and steps[at] == step else None

    @property
    def batches(self) -> list[Batch]:
        """What the frames of the manifest committed, in order."""
        return self._batches[: len(self._batches) - self.n_logged]

    def logged(self) -> list[Snapshot]:
        """Return the records that only the log has."""
        batches = self._batches[len(self._batches) - self.n_logged :]
        return [self.snapshot(batch.first, list(batch.parts)) for batch in batches]

    def snapshot(self, record: int, keys: list[StreamKey]) -> Snapshot:
        """Return a record with those of the streams ``keys`` that it has."""
        batch = self.batch(record)
        here = {key for key in batch.parts if self.has(key, record)}
        return Snapshot(
            step=self.step(record),
            streams={
                key: self.load(key, record)
                for key in keys
                if key in here and key[0] not in RESERVED
            },
            labels=self.load(LABELS, record) if LABELS in here else None,
            scalars={
                key[1]: self.load(key, record).item()
                for key in batch.parts
                if key[0] == SCALARS and key in here
            },
            tags=self.tags_of(record),
        )

    def keys_at(self, step: int) -> frozenset[StreamKey]:
        """Return what a step has: streams, labels and scalars."""
        return frozenset(
            key
            for batch in self._batches
            for record in np.flatnonzero(batch.visible & (batch.steps == step))
            for key in batch.parts
            if batch.find(key, batch.first + int(record))
        )

    def rows(self) -> Counter[StreamKey]:
        """Return how many visible rows (tensors, for weights) each stream has."""
        count: Counter[StreamKey] = Counter()
        for batch in self._batches:
            for key, parts in batch.parts.items():
                records = np.unique(np.concatenate([p.part.where[0] for p in parts]))
                for record in records[batch.visible[records]] + batch.first:
                    shape = self.shape(key, int(record))
                    count[key] += shape[0] if is_rows(key[0]) else 1
        return count

    def shape(self, key: StreamKey, record: int) -> tuple[int, ...]:
        """Return the shape of the tensor that `load` returns."""
        return _shape(self.batch(record).find(key, record))

    def load(self, key: StreamKey, record: int) -> Tensor:
        """Return a copy of what a record holds of a stream.

        Raises:
            CorruptSegment: If it is not where it should be now.
        """  # noqa: DOC502 - raised where it is read
        return self._retried(lambda now: now._load(key, record))

    def _retried(self, read: Callable[[Catalog], T]) -> T:
        """Return what is read, also if the writer has moved it meanwhile.

        Raises:
            CorruptSegment: If it cannot be read and nothing was moved.
            NotAStore: If there is no store any more.
        """
        try:
            return read(self)
        except CorruptSegment:
            if not self.path.exists():
                raise NotAStore(
                    f"{self.path} is gone: the run was packed into one file, moved or "
                    "removed since it was opened; refresh() it or open it again"
                ) from None
            now = self._newer or Catalog(self.path, trust=self.trust)
            moved = (now.files, now.n_logged) != (self.files, self.n_logged)
            if not moved or now.n_records < self.n_records:
                raise
            self._newer = now  # which may be old itself by the next read
            return now._retried(read)

    def series(
        self, key: StreamKey, records: Sequence[int], units: slice | Ints
    ) -> Tensor:
        """Return units of a stream of several records, which all have the same shape.

        Args:
            key: The stream.
            records: Which have it.
            units: Chooses along the last axis.

        Returns:
            ``(n_records, ..., n_units)``.

        Raises:
            CorruptSegment: If they are not where they should be now.
        """  # noqa: DOC502 - raised where it is read
        return self._retried(lambda now: now._series(key, records, units))

    def _series(
        self, key: StreamKey, records: Sequence[int], units: slice | Ints
    ) -> Tensor:
        first = self.shape(key, records[0])
        shape = first
        if first:
            chosen = range(first[-1])[units] if isinstance(units, slice) else units
            shape = *first[:-1], len(chosen)
        dtype = self.batch(records[0]).parts[key][0].part.torch_dtype
        nbytes = len(records) * math.prod(shape) * dtype.itemsize
        self._check_budget(key, nbytes)
        out = torch.empty((len(records), *shape), dtype=dtype)
        bits, filled = out.view(_BITS[dtype.itemsize]).numpy(), np.zeros(len(out), bool)
        wanted = np.array(records, np.int64)
        rows = first[0] if is_rows(key[0]) else 1
        inside = np.searchsorted(self._starts, wanted, side="right") - 1
        for batch in (self._batches[i] for i in np.unique(inside)):
            for stored, start, n, at in batch.runs(key, wanted, rows):
                data = stored.take(start, start + n * rows, units)
                bits[at : at + n].reshape(data.shape)[:] = data
                filled[at : at + n] = True
        for i in np.flatnonzero(~filled).tolist():
            tensor = self._load(key, records[i])
            if tensor.shape != first:
                raise UsageError(
                    f"{key[0]} of layer {key[1]!r} have shape {first} at step "
                    f"{self.step(records[0])} and {tuple(tensor.shape)} at step "
                    f"{self.step(records[i])}: a series has one shape; choose steps= "
                    "that agree, or read() them one by one"
                )
            out[i] = tensor[..., units] if shape else tensor
        return out

    def _load(self, key: StreamKey, record: int) -> Tensor:
        """Return a copy of what a record holds of a stream.

        Raises:
            CorruptSegment: If the manifest contradicts itself about it.
        """
        found = self.batch(record).find(key, record)
        shape, dtype = _shape(found), found[0][0].part.torch_dtype
        nbytes = sum(rows * stored.part.row_bytes for stored, _, rows in found)
        if nbytes != math.prod(shape) * dtype.itemsize:
            raise CorruptSegment(
                f"{self.path}/MANIFEST gives {key[0]} of layer {key[1]!r} at step "
                f"{self.step(record)} the shape {shape}, but {nbytes} bytes; restore "
                "it from a copy"
            )
        self._check_budget(key, nbytes)
        out = torch.empty(shape, dtype=dtype)
        raw, filled = out.reshape(-1).view(torch.uint8).numpy(), 0
        for stored, start, rows in found:
            size = rows * stored.part.row_bytes
            stored.read(start, rows, raw[filled : filled + size])
            filled += size
        return out

    def _check_budget(self, key: StreamKey, nbytes: int) -> None:
        """Refuse to give a stranger's store more memory than it may have.

        Raises:
            UntrustedStore: If it asks for more.
        """
        if self.trust == "untrusted" and nbytes > _UNTRUSTED_BYTES:
            raise UntrustedStore(
                f"{self.path} declares {nbytes} bytes for {key[0]} of layer "
                f"{key[1]!r}; an untrusted store gets at most {_UNTRUSTED_BYTES} "
                "a read: choose fewer steps or units"
            )

    def columns(self, target: str) -> list[tuple[str, list[int], Tensor]]:
        """Return layer, steps and stacked values of one-value streams, a part each.

        Raises:
            CorruptSegment: If one is not where it should be now.
        """  # noqa: DOC502 - raised where it is read
        return self._retried(lambda now: list(now._columns(target)))

    def _columns(self, target: str) -> Iterator[tuple[str, list[int], Tensor]]:
        for batch in self._batches:
            for (kind, name), parts in batch.parts.items():
                for stored in parts if kind == target else ():
                    part = stored.part
                    records = part.where[0]
                    seen = batch.visible[records]
                    if not seen.any():
                        continue
                    self._check_budget((kind, name), part.shape[0] * part.row_bytes)
                    out = torch.empty(part.shape, dtype=part.torch_dtype)
                    stored.read(0, part.shape[0], out.view(torch.uint8).numpy())
                    yield name, batch.steps[records[seen]].tolist(), out[seen]


def _first_frame(batch: Batch) -> int:
    return batch.frames[0]


def _shape(found: Sequence[tuple[StoredPart, int, int]]) -> tuple[int, ...]:
    """Return the shape of the tensor whose rows are in these places."""
    part = found[0][0].part
    if part.whole:
        return tuple(part.row_shape)
    rows = sum(count for _, _, count in found)
    if part.flat:
        rows //= math.prod(part.row_shape)
    return rows, *part.row_shape
