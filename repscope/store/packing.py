"""Pack a store into one HDF5 file that any HDF5 reader opens."""

from __future__ import annotations

import errno
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repscope._checks import check_choice
from repscope.errors import StoreExists, StoreWriteError
from repscope.snapshot import StreamKey
from repscope.store import files, filters, manifest, packed, segment
from repscope.store.catalog import Catalog
from repscope.store.fileobjects import Through
from repscope.store.index import (
    LABELS,
    STORED_AS,
    Part,
    is_rows,
    to_spans,
)
from repscope.store.names import path_of

if TYPE_CHECKING:
    import h5py

Compression = Literal["none", "gzip", "zstd"]
Layout = Literal["step", "series"]
LAYOUTS = ("step", "series")
CHUNK_BYTES = 2**20
_BUFFER_BYTES = 2**24  # a row of chunks: what reading one step has to unpack
_ALIGN = 64


class _Stream(NamedTuple):
    """What becomes one dataset."""

    key: StreamKey
    numbers: list[int]  # of its records, in the packed file
    records: list[int]  # the same in the store
    starts: list[int]
    rows: list[int]
    fresh: list[bool]  # whether a record's rows are its own
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dataset."""
        ends = [a + b for a, b in zip(self.starts, self.rows, strict=True)]
        return (max(ends, default=0), *self.row_shape)


def write(
    catalog: Catalog,
    out: Path,
    *,
    compression: Compression = "none",
    layout: Layout = "step",
    replace: bool = False,
) -> None:
    """Write what readers of a store see into one file, and compare before it counts.

    The file is complete or absent: it is written under another name, synced, read back
    and compared bit for bit with the store, and renamed.

    Args:
        catalog: Of the store.
        out: Where the file goes.
        compression: ``"none"`` can be mapped; ``"gzip"`` opens everywhere; ``"zstd"``
            needs hdf5plugin, here and wherever it is read.
        layout: ``"step"`` keeps the rows of a step together; ``"series"`` those of a
            unit, for reading few units over many steps.
        replace: Whether an existing file may go.

    Raises:
        StoreExists: If something is at ``out``.
    """
    check_choice(compression, ("none", "gzip", "zstd"), name="compression")
    check_choice(layout, LAYOUTS, name="layout")
    made = filters.options("" if compression == "none" else compression)
    if not replace and os.path.lexists(out):
        raise StoreExists(
            f"{out} exists already and was left untouched; choose another path, or "
            "remove it if it is no longer needed"
        )
    advice = f"nothing is left of it, and {catalog.path} is as it was"
    with files.disk_errors(f"packing {catalog.path} into {out}", advice=advice):
        _pack(catalog, out, compression, layout, made)


def _pack(
    catalog: Catalog, out: Path, compression: str, layout: str, made: dict[str, Any]
) -> None:
    temp = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    files.discard(temp)
    fd = os.open(temp, flags, 0o666)
    try:
        file = Through(fd)
        try:
            streams = list(_streams(catalog))
            try:
                _write(catalog, streams, file, compression, layout, made)
            except Exception:
                file.check()  # the cause, where HDF5 stumbled over what was not written
                raise
            file.check()
            os.fsync(fd)
        finally:
            os.close(fd)
        _compare(catalog, temp, streams)
        temp.rename(out)
        files.sync_directory(out.parent)
    except BaseException:
        files.discard(temp)
        raise


def _streams(catalog: Catalog) -> Iterator[_Stream]:
    """Yield every stream: labels that repeat are stored once."""
    number = {record: i for i, (record, *_) in enumerate(catalog.visible())}
    for key in catalog.last:
        records = [r for r in catalog.records_of(key) if r in number]
        starts, rows, fresh = [], [], []
        end, before = 0, None
        for record in records:
            if key == LABELS:
                now = catalog.load(key, record)
                known = before is not None and now.equal(before)
                before, count = now, len(now)
            else:
                known = False
                count = catalog.shape(key, record)[0] if is_rows(key[0]) else 1
            if not known:
                end += count
            starts.append(end - count)
            rows.append(count)
            fresh.append(not known)
        shape = catalog.shape(key, records[0])
        dtype = catalog.dtype(key, records[0])
        row_shape = shape[1:] if is_rows(key[0]) else shape
        numbers = [number[record] for record in records]
        yield _Stream(key, numbers, records, starts, rows, fresh, row_shape, dtype)


def _blocks(catalog: Catalog, stream: _Stream) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices of records with rows of their own, as many at once as fit.

    Yields:
        Indices, and their values, ``(n_records, rows, *row_shape)`` or, of whole
        tensors, ``(n_records, *row_shape)``.
    """
    size = max(1, math.prod(stream.row_shape)) * stream.dtype.itemsize
    group: list[int] = []
    for i in (i for i, own in enumerate(stream.fresh) if own):
        full = (len(group) + 1) * stream.rows[i] * size > _BUFFER_BYTES // 4
        if group and (full or stream.rows[i] != stream.rows[group[0]]):
            yield group, _series(catalog, stream, group)
            group = []
        group.append(i)
    if group:
        yield group, _series(catalog, stream, group)


def _series(catalog: Catalog, stream: _Stream, group: Sequence[int]) -> Tensor:
    records = [stream.records[i] for i in group]
    return catalog.series(stream.key, records, slice(None))


# -- writing -----------------------------------------------------------------
def _write(
    catalog: Catalog,
    streams: list[_Stream],
    file: Through,
    compression: str,
    layout: str,
    made: dict[str, Any],
) -> None:
    import h5py

    with h5py.File(
        file,
        "w",
        libver=("v110", "v110"),
        alignment_threshold=1,
        alignment_interval=_ALIGN,
        rdcc_nbytes=_BUFFER_BYTES + 2 * CHUNK_BYTES,
        rdcc_w0=1.0,
        rdcc_nslots=10007,
    ) as opened:
        opened.attrs["format"] = np.bytes_(
            f"RepScope packed store, version {packed.VERSION}"
        )
        parts = []
        for stream in streams:
            dataset = _create(opened, stream, compression, layout, made)
            _fill(catalog, stream, dataset, file)
            parts.append(_part(stream, dataset, file, compression))
            places = [stream.starts, stream.rows]
            steps = [catalog.step(record) for record in stream.records]
            index = np.array([steps, *places], "<i8").T.reshape(-1, 3)
            name = f"{packed.INDEX}/{path_of(stream.key)}"
            opened.create_dataset(name, data=index, track_times=False)
            file.check()
        frames = _frames(catalog, parts)
        text = b"".join(manifest.encode(i, body) for i, body in enumerate(frames))
        opened.create_dataset(
            "@manifest", data=np.frombuffer(text, np.uint8), track_times=False
        )


def _frames(catalog: Catalog, parts: list[Part]) -> list[dict[str, Any]]:
    """Return what a manifest of the packed store says."""
    visible = catalog.visible()
    frames: list[dict[str, Any]] = [
        {
            "packed": packed.VERSION,
            "created": catalog.about["created"],
            "meta": catalog.meta,
        }
    ]
    if visible:
        tags = [[i, tag] for i, (_, _, many) in enumerate(visible) for tag in many]
        entry = {"number": 0, "bytes": 0, "parts": [part.to_json() for part in parts]}
        frames.append(
            {
                "steps": to_spans(step for _, step, _ in visible),
                "tags": tags,
                "segments": [entry],
            }
        )
    frames.append({"progress": catalog.done, "closed": catalog.closed})
    return frames


def _create(
    file: h5py.File,
    stream: _Stream,
    compression: str,
    layout: str,
    made: dict[str, Any],
) -> h5py.Dataset:
    import h5py

    shape, kind = stream.shape, np.dtype(STORED_AS[stream.dtype])
    empty = not math.prod(shape)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if compression == "none" and not empty:
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    dataset = file.create_dataset(
        path_of(stream.key),
        shape=shape,
        dtype=kind,
        chunks=None if empty else _chunk_shape(shape, kind.itemsize, layout),
        track_times=False,
        dcpl=plan,
        **({} if empty else made),
    )
    segment.note_dtype(dataset, stream.dtype)
    return dataset


def _chunk_shape(shape: Sequence[int], itemsize: int, layout: str) -> tuple[int, ...]:
    """Return the shape of about a MiB: whole rows, or long columns.

    A row of chunks is at most a buffer, which is what is held while it is written.
    """
    room = CHUNK_BYTES // itemsize
    side = [1] * len(shape)
    first = [] if layout == "step" else [0]
    for axis in [*first, *reversed(range(1, len(shape))), 0]:
        if axis == 0:
            most = _BUFFER_BYTES // itemsize // math.prod(shape[1:])
            side[0] = max(side[0], min(shape[0], room, max(most, 1)))
            room //= side[0]
        elif room:
            side[axis] = min(shape[axis], room)
            room = room // side[axis] if side[axis] == shape[axis] else 1
    return tuple(side)


def _fill(
    catalog: Catalog, stream: _Stream, dataset: h5py.Dataset, file: Through
) -> None:
    """Write all rows, a row of chunks at a time."""
    if not dataset.size:
        return
    kind = np.dtype(STORED_AS[stream.dtype])
    high = dataset.chunks[0]
    buffer = np.empty((high, *stream.row_shape), kind)
    filled = done = 0
    for _, values in _blocks(catalog, stream):
        rows = values.reshape(-1, *stream.row_shape)
        rest = rows.contiguous().view(torch.uint8).numpy().view(kind)
        rest = rest.reshape(-1, *stream.row_shape)
        while len(rest):
            taken, rest = rest[: high - filled], rest[high - filled :]
            buffer[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == high:
                dataset[done : done + high] = buffer
                done, filled = done + high, 0
                file.check()
    if filled:
        dataset[done : done + filled] = buffer[:filled]


def _part(
    stream: _Stream, dataset: h5py.Dataset, file: Through, compression: str
) -> Part:
    """Return what the manifest says, with checksums of what is on the disk."""
    dataset.flush()
    filtered = compression != "none"
    chunks = []
    if dataset.size:
        counts = [
            -(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)
        ]
        # One pass: to look chunks up one by one is quadratic.
        places: dict[tuple[int, ...], tuple[int, int]] = {}
        dataset.id.chunk_iter(
            lambda info: places.update(
                {tuple(info.chunk_offset): (int(info.byte_offset), int(info.size))}
            )
        )
        for cell in np.ndindex(*counts):
            first = tuple(i * c for i, c in zip(cell, dataset.chunks, strict=True))
            place, size = places[first]
            crc = zlib.crc32(file.slice(place, place + size))
            chunks.append([place, crc, size] if filtered else [place, crc])
    shape = dataset.shape
    whole_rows = not dataset.size or dataset.chunks[1:] == shape[1:]
    return Part(
        target=stream.key[0],
        layer=stream.key[1],
        name=path_of(stream.key),
        dtype=str(stream.dtype).removeprefix("torch."),
        shape=list(shape),
        row_shape=list(stream.row_shape),
        whole=not is_rows(stream.key[0]),
        chunk_rows=dataset.chunks[0] if dataset.size else 0,
        chunks=chunks,
        records=to_spans(stream.numbers),
        starts=to_spans(stream.starts),
        rows=to_spans(stream.rows),
        grid=[] if whole_rows else list(dataset.chunks),
        filter=compression if filtered and dataset.size else "",
    )


# -- comparing ---------------------------------------------------------------
def _compare(catalog: Catalog, temp: Path, streams: list[_Stream]) -> None:
    """Read the new file back.

    Raises:
        StoreWriteError: If it holds anything else than the store.
    """
    made = Catalog(temp)
    for stream in streams:
        for group, values in _blocks(catalog, stream):
            numbers = [stream.numbers[i] for i in group]
            back = made.series(stream.key, numbers, slice(None))
            bits = [
                t.contiguous().reshape(-1).view(torch.uint8) for t in (values, back)
            ]
            if values.shape != back.shape or not torch.equal(*bits):
                raise StoreWriteError(
                    errno.EIO,
                    f"{stream.key[0]} of layer {stream.key[1]!r} did not read back as "
                    "they were written; this machine's memory, disk or HDF5 is at "
                    "fault: try again",
                )
