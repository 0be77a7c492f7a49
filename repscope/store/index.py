"""How the manifest describes the rows of one stream in one segment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from repscope.snapshot import EXAMPLES, StreamKey

Ints = npt.NDArray[np.int64]
Index = slice | Ints
Spans = Sequence[Sequence[int]]
"""Integers as arithmetic runs ``[first, count, stride]``: a regular schedule costs
three numbers, whatever its length."""

ROW_TARGETS = frozenset({"outputs", "inputs", "output_gradients"})
"""Targets whose tensors are rows that concatenate; any other is one whole tensor."""

LABELS: StreamKey = ("labels", "y")
SCALARS = "scalars"
RESERVED = (LABELS[0], SCALARS)

STORED_AS = {
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.bfloat16: "<u2",  # HDF5 has no bfloat16: its bits
    torch.uint8: "|u1",
    torch.uint16: "<u2",
    torch.uint32: "<u4",
    torch.uint64: "<u8",
    torch.int8: "|i1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.bool: "|b1",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_AS}


def is_rows(target: str) -> bool:
    """Return whether tensors of ``target`` are rows, not one tensor a record."""
    return target in ROW_TARGETS or target in (EXAMPLES, LABELS[0])


def to_spans(values: Iterable[int]) -> list[list[int]]:
    """Return ``values`` as arithmetic runs.

    Example:
        >>> to_spans([0, 100, 200, 300, 7])
        [[0, 4, 100], [7, 1, 0]]
    """
    values = list(values)
    if len(values) > 2:  # a regular schedule, at once
        steps = np.diff(values)
        if (steps == steps[0]).all():
            return [[values[0], len(values), int(steps[0])]]
    spans: list[list[int]] = []
    for value in values:
        if spans and spans[-1][1] == 1:
            spans[-1] = [spans[-1][0], 2, value - spans[-1][0]]
        elif spans and value == spans[-1][0] + spans[-1][1] * spans[-1][2]:
            spans[-1][1] += 1
        else:
            spans.append([value, 1, 0])
    return spans


def from_spans(spans: Spans) -> Ints:
    """Return the integers that `to_spans` was given.

    Example:
        >>> from_spans([[0, 4, 100], [7, 1, 0]]).tolist()
        [0, 100, 200, 300, 7]
    """
    runs = [
        first + stride * np.arange(count, dtype=np.int64)
        for first, count, stride in spans
    ]
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def as_slice(index: Ints) -> Index:
    """Return ascending indices as a slice where they are one: a view needs no copy."""
    if not len(index):
        return index
    first, last = int(index[0]), int(index[-1]) + 1
    whole = np.array_equal(index, np.arange(first, last))
    return slice(first, last) if whole else index


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one stream in one segment; its fields are the manifest's JSON.

    Attributes:
        target: First half of the stream's key.
        layer: Second half, the true name.
        name: Path of the dataset inside the segment.
        dtype: Torch name of the element type, such as ``"bfloat16"``.
        shape: Shape of the dataset.
        row_shape: Shape of one row of a record, or of the one tensor when ``whole``.
            ``shape[1:]`` differs only when a row is larger than a segment: it is then
            stored flat.
        whole: Each record is one tensor rather than rows.
        chunk_rows: Rows in each chunk; the last one is padded with zeros.
        chunks: ``[byte offset in the file, crc32]`` of each chunk, in C order of the
            grid; of a filtered one also the bytes it takes in the file.
        records: Numbers, within the batch, of the records found here, ascending.
        starts: First row of each of them.
        rows: Number of rows of each of them.
        grid: Shape of a chunk that does not span whole rows; only in packed files.
        filter: ``""``, or how chunks are compressed; only in packed files.
    """

    target: str
    layer: str
    name: str
    dtype: str
    shape: Sequence[int]
    row_shape: Sequence[int]
    whole: bool
    chunk_rows: int
    chunks: list[list[int]]
    records: Spans
    starts: Spans
    rows: Spans
    grid: Sequence[int] = ()
    filter: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Part:
        """Return the part that `to_json` described; unknown fields are ignored."""
        known = {field.name for field in fields(cls)} & data.keys()
        return cls(**{name: data[name] for name in known})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they stand in the manifest."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("grid", "filter"):
            if not values[name]:
                del values[name]
        return values

    @property
    def key(self) -> StreamKey:
        """The stream."""
        return self.target, self.layer

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type."""
        return DTYPES[self.dtype]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return math.prod(self.shape[1:]) * self.torch_dtype.itemsize

    @property
    def flat(self) -> bool:
        """Whether elements are stored one by one: a row is above a segment."""
        return list(self.shape[1:]) != list(self.row_shape)

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return tuple(self.grid) or (self.chunk_rows, *self.shape[1:])

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk before it is compressed."""
        return math.prod(self.chunk_shape) * self.torch_dtype.itemsize

    @cached_property
    def block(self) -> int | None:
        """Where in the file all rows lie in one piece, or None if they do not."""
        if not self.chunks or self.grid or self.filter:
            return None
        first = self.chunks[0][0]
        places = [first + i * self.chunk_bytes for i in range(len(self.chunks))]
        return first if [place for place, _ in self.chunks] == places else None

    @cached_property
    def where(self) -> tuple[Ints, Ints, Ints]:
        """``records``, ``starts`` and ``rows`` as arrays."""
        return from_spans(self.records), from_spans(self.starts), from_spans(self.rows)

    def find(self, record: int) -> tuple[int, int] | None:
        """Return ``(start, rows)`` of a record of the batch, or None if absent."""
        records, starts, rows = self.where
        i = int(np.searchsorted(records, record))
        if i == len(records) or records[i] != record:
            return None
        return int(starts[i]), int(rows[i])
