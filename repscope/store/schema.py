"""What a frame may say: a good checksum proves who wrote it, not that it makes sense.

Only arithmetic on what is there: no list is made as long as a hostile count asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repscope.errors import CorruptSegment
from repscope.store.filters import PIPELINES
from repscope.store.index import DTYPES, LABELS, SCALARS, Spans

MOST_RECORDS = 2**24  # of one batch; a commit every 10 s makes some thousands
_LARGEST = 2**62
_MOST_CHUNK = 2**32  # what HDF5 can have


def check(path: Path, frame: Any) -> None:
    """Refuse a frame that cannot have been written by a sound writer.

    Args:
        path: The store, for the message.
        frame: Decoded JSON.

    Raises:
        CorruptSegment: If a field is missing, of a wrong type or out of range.
    """
    try:
        _frame(frame)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptSegment(
            f"{path}/MANIFEST holds a frame that makes no sense ({error!r:.80}), "
            "though its checksum is good: no RepScope wrote it so. Restore MANIFEST "
            "from a copy"
        ) from None


def _want(truth: bool, what: str) -> None:
    if not truth:
        raise ValueError(what)


def _int(value: Any, what: str, *, below: int = _LARGEST) -> int:
    _want(type(value) is int and 0 <= value < below, what)
    return int(value)


def _frame(frame: Mapping[str, Any]) -> None:
    _want(isinstance(frame, dict), "frame")
    _want(isinstance(frame.get("meta", {}), dict), "meta")
    _want(isinstance(frame.get("closed", False), bool), "closed")
    for name in ("rewind", "progress", "level"):
        _int(frame.get(name, 0), name)
    first, last = frame.get("replaces", (0, 0))
    _want(_int(first, "replaces") <= _int(last, "replaces"), "replaces")
    if frame.get("steps"):
        _batch(frame)


def _batch(frame: Mapping[str, Any]) -> None:
    n_records = _spans(frame["steps"], "steps", most=MOST_RECORDS)
    if "hidden" in frame:
        _ascending(frame["hidden"], "hidden", n_records)
    for record, tag in frame["tags"]:
        _int(record, "tags", below=n_records)
        _want(isinstance(tag, str), "tags")
    for segment in frame["segments"]:
        _int(segment["number"], "number")
        nbytes = _int(segment["bytes"], "bytes")
        for part in segment["parts"]:
            _part(part, n_records, nbytes)


def _spans(spans: Spans, what: str, *, most: int) -> int:
    """Return how many integers the spans stand for."""
    total = 0
    for first, count, stride in spans:
        _want(_int(count, what) > 0 and type(stride) is int, what)
        _int(first, what)
        _int(first + (count - 1) * stride, what)
        total += count
    _want(total <= most, what)
    return total


def _ascending(spans: Spans, what: str, n_records: int) -> int:
    """Return how many record numbers there are, if they ascend."""
    total = _spans(spans, what, most=n_records)
    before = -1
    for first, count, stride in spans:
        _want(first > before and (stride > 0 or count == 1), what)
        before = first + (count - 1) * stride
    _want(before < n_records, what)
    return total


def _part(part: Mapping[str, Any], n_records: int, nbytes: int) -> None:
    for name in ("target", "layer", "name"):
        _want(isinstance(part[name], str), name)
    _want(part["target"] != LABELS[0] or part["layer"] == LABELS[1], "layer")
    _want(isinstance(part["whole"], bool), "whole")
    shape, row_shape = _shape(part["shape"]), _shape(part["row_shape"])
    _want(part["target"] != SCALARS or not row_shape, "row_shape")
    flat = shape[1:] != row_shape
    _want(len(shape) > 0 and not (flat and (shape[1:] or not math.prod(row_shape))),
          "shape")  # fmt: skip
    itemsize = DTYPES[part["dtype"]].itemsize
    _chunks(part, shape[0], math.prod(shape[1:]) * itemsize, nbytes)
    count = _ascending(part["records"], "records", n_records)
    _want(count > 0, "records")
    for name in ("starts", "rows"):
        _want(_spans(part[name], name, most=n_records) == count, name)


def _shape(shape: Sequence[Any]) -> list[int]:
    sizes = [_int(size, "shape") for size in shape]
    _want(math.prod(size or 1 for size in sizes) < _LARGEST, "shape")
    return sizes


def _chunks(part: Mapping[str, Any], rows: int, row_bytes: int, nbytes: int) -> None:
    chunks, chunk_rows = part["chunks"], _int(part["chunk_rows"], "chunk_rows")
    expected = -(-rows // max(chunk_rows, 1)) if rows * row_bytes else 0
    chunk_bytes = chunk_rows * row_bytes
    if grid := _shape(part.get("grid", ())):
        sides = list(zip(part["shape"], grid, strict=True))
        _want(all(0 < side <= max(size, 1) for size, side in sides), "grid")
        _want(grid[0] == chunk_rows, "grid")
        expected = math.prod(-(-size // side) for size, side in sides)
        chunk_bytes = math.prod(grid) * DTYPES[part["dtype"]].itemsize
    _want(len(chunks) == expected and (chunk_rows > 0 or not expected), "chunks")
    packed = part.get("filter", "")
    _want(packed in PIPELINES and chunk_bytes <= _MOST_CHUNK, "filter")
    total = 0
    for offset, crc, *size in chunks:
        _want(len(size) == bool(packed), "chunks")
        taken = _int(size[0], "chunks") if packed else chunk_bytes
        total += taken
        _want(_int(offset, "chunks") + taken <= nbytes, "chunks")
        _int(crc, "chunks", below=2**32)
    # No byte of a file is two rows of a stream: a small file stays small when read.
    _want(total <= nbytes, "chunks")
