"""What a frame may say: a good checksum proves who wrote it, not that it makes sense.

Only arithmetic on what is there: no list is made as long as a hostile count asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from repscope.errors import CorruptSegment
from repscope.store.filters import PIPELINES
from repscope.store.index import DTYPES, LABELS, SCALARS, Spans, is_rows

MOST_RECORDS = 2**24  # of one batch; a commit every 10 s makes some thousands
_LARGEST = 2**62
_MOST_CHUNK = 2**32  # what HDF5 can have
_MOST_UNPACKED = 2**26
# Integers that a reader makes of a store, beyond those that its bytes are worth: a
# record of a stream takes three, and a byte at least.
_FREE_INTS, _INTS_A_BYTE = 2**22, 4
_FREE_ROW = 2**24  # elements of a row, beyond those that its batch has


def check_all(
    path: Path, frames: Sequence[Any], *, file_bytes: int | None = None
) -> list[dict[str, Any]]:
    """Refuse frames that no sound writer wrote, alone or together.

    Args:
        path: The store, for the message.
        frames: Decoded JSON.
        file_bytes: As for `check`.

    Returns:
        The segments that no merge has replaced.

    Raises:
        CorruptSegment: If one makes no sense, or if a reader would need memory that
            has nothing to do with the bytes there are.
    """  # noqa: DOC502 - raised by _blame
    used: list[tuple[int, int, Mapping[str, Any]]] = []
    for seq, frame in enumerate(frames):
        check(path, frame, file_bytes=file_bytes)
        low, high = frame.get("replaces", (seq, seq))
        if "replaces" in frame:
            used = [each for each in used if not low <= each[0] <= each[1] <= high]
        if frame.get("steps"):
            used.append((low, high, frame))
    entries = [entry for *_, frame in used for entry in frame["segments"]]
    files = {(e["number"], e.get("log", False)): e["bytes"] for e in entries}
    nbytes = sum(files.values()) if file_bytes is None else file_bytes
    n_ints = sum(count for *_, frame in used for count in _counts(frame))
    if n_ints > _FREE_INTS + _INTS_A_BYTE * nbytes:
        _blame(path, f"{n_ints} numbers for {nbytes} bytes")
    return entries


def _counts(frame: Mapping[str, Any]) -> Iterator[int]:
    """Yield how many integers a reader makes of each span of a batch."""
    parts = [part for segment in frame["segments"] for part in segment["parts"]]
    every = [frame["steps"], frame.get("hidden", ())]
    every += [part[name] for part in parts for name in ("records", "starts", "rows")]
    yield from (count for spans in every for _, count, _ in spans)


def check(path: Path, frame: Any, *, file_bytes: int | None = None) -> None:
    """Refuse a frame that cannot have been written by a sound writer.

    Args:
        path: The store, for the message.
        frame: Decoded JSON.
        file_bytes: Of the file that holds all segments, which then do not say it.

    Raises:
        CorruptSegment: If a field is missing, of a wrong type or out of range.
    """  # noqa: DOC502 - raised by _blame
    try:
        _frame(frame, file_bytes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _blame(path, f"{error!r:.80}")


def _blame(path: Path, what: str) -> NoReturn:
    raise CorruptSegment(
        f"{path}/MANIFEST holds a frame that makes no sense ({what}), though its "
        "checksum is good: no RepScope wrote it so. Restore MANIFEST from a copy"
    ) from None


def _want(truth: bool, what: str) -> None:
    if not truth:
        raise ValueError(what)


def _int(value: Any, what: str, *, below: int = _LARGEST) -> int:
    _want(type(value) is int and 0 <= value < below, what)
    return int(value)


def _frame(frame: Mapping[str, Any], file_bytes: int | None) -> None:
    _want(isinstance(frame, dict), "frame")
    _want(isinstance(frame.get("meta", {}), dict), "meta")
    _want(isinstance(frame.get("closed", False), bool), "closed")
    for name in ("rewind", "progress", "level"):
        _int(frame.get(name, 0), name)
    first, last = frame.get("replaces", (0, 0))
    _want(_int(first, "replaces") <= _int(last, "replaces"), "replaces")
    if frame.get("steps"):
        _batch(frame, file_bytes)
    else:
        _want("replaces" not in frame and not frame.get("segments"), "steps")


def _batch(frame: Mapping[str, Any], file_bytes: int | None) -> None:
    n_records = _spans(frame["steps"], "steps", most=MOST_RECORDS)
    if "hidden" in frame:
        _ascending(frame["hidden"], "hidden", n_records)
    for record, tag in frame["tags"]:
        _int(record, "tags", below=n_records)
        _want(isinstance(tag, str), "tags")
    n_elements = _FREE_ROW
    for segment in frame["segments"]:
        _want(isinstance(segment.get("log", False), bool), "log")
        _int(segment["number"], "number")
        nbytes = _int(segment["bytes"], "bytes")
        for part in segment["parts"]:
            _part(part, n_records, nbytes if file_bytes is None else file_bytes)
            n_elements += math.prod(part["shape"])
    for part in (part for segment in frame["segments"] for part in segment["parts"]):
        n = math.prod(size or 1 for size in part["row_shape"])
        _want(n <= n_elements, "row_shape")


def _spans(spans: Spans, what: str, *, most: int, below: int = _LARGEST) -> int:
    """Return how many integers the spans stand for."""
    total = 0
    for first, count, stride in spans:
        _want(_int(count, what) > 0 and type(stride) is int, what)
        _want(abs(stride) < _LARGEST, what)
        _int(first, what, below=below)
        _int(first + (count - 1) * stride, what, below=below)
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
    _want(part["whole"] is (not is_rows(part["target"])), "whole")
    shape, row_shape = _shape(part["shape"]), _shape(part["row_shape"])
    _want(part["target"] != SCALARS or not row_shape, "row_shape")
    flat = shape[1:] != row_shape
    _want(len(shape) > 0 and not (flat and (shape[1:] or not math.prod(row_shape))),
          "shape")  # fmt: skip
    itemsize = DTYPES[part["dtype"]].itemsize
    _chunks(part, shape[0], math.prod(shape[1:]) * itemsize, nbytes)
    count = _ascending(part["records"], "records", n_records)
    _want(count > 0, "records")
    _want(part["target"] != SCALARS or shape == [count], "shape")
    for name in ("starts", "rows"):
        n = _spans(part[name], name, most=n_records, below=shape[0] + 1)
        _want(n == count, name)


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
    most = _MOST_UNPACKED if packed else _MOST_CHUNK
    _want(packed in PIPELINES and chunk_bytes <= most, "filter")
    total = 0
    for offset, crc, *size in chunks:
        _want(len(size) == bool(packed), "chunks")
        taken = _int(size[0], "chunks") if packed else chunk_bytes
        total += taken
        _want(_int(offset, "chunks") + taken <= nbytes, "chunks")
        _int(crc, "chunks", below=2**32)
    # No byte of a file is two rows of a stream: a small file stays small when read.
    _want(total <= nbytes, "chunks")
