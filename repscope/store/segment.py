"""Build one segment: an HDF5 file in memory, of which HDF5 writes nothing to disk."""

from __future__ import annotations

import errno
import io
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from repscope.errors import StoreWriteError
from repscope.store.columns import Column
from repscope.store.index import STORED_AS, Part, to_spans

if TYPE_CHECKING:
    import h5py

CHUNK_BYTES = 2**20
_ALIGN = 64  # so that a mapped chunk is aligned for every dtype


def build(columns: Iterable[Column]) -> tuple[memoryview, list[Part]]:
    """Return the bytes of a segment and what is in it.

    Args:
        columns: At least one.

    Returns:
        The HDF5 image, checked by reading its structure back, and its parts.
    """
    import h5py

    raw = io.BytesIO()
    with h5py.File(
        raw,
        "w",
        libver=("v110", "v110"),
        alignment_threshold=1,
        alignment_interval=_ALIGN,
    ) as file:
        parts = [_add(file, column) for column in columns]
    check(raw, parts)
    return raw.getbuffer(), parts


def _add(file: h5py.File, column: Column) -> Part:
    shape = (column.n_rows, *column.stored_row_shape)
    n_chunks = -(-column.n_rows * column.row_bytes // CHUNK_BYTES)
    # Even chunks, not full ones and a rest: the padding is below a row a chunk.
    chunk_rows = -(-column.n_rows // max(n_chunks, 1)) if column.row_bytes else 0
    name = str(column.dtype).removeprefix("torch.")
    dataset = file.create_dataset(
        column.name,
        shape=shape,
        dtype=column.h5_dtype,
        # HDF5 cannot chunk what has no elements.
        chunks=(chunk_rows, *column.stored_row_shape) if chunk_rows else None,
        track_times=False,
    )
    if column.dtype.is_floating_point and column.h5_dtype.kind == "u":
        # A fixed-length string: variable ones live in a heap of their own.
        dataset.attrs["torch_dtype"] = np.bytes_(name)
    chunks = []
    for i, data in enumerate(column.chunks(max(chunk_rows * column.row_bytes, 1))):
        first = (i * chunk_rows, *[0] * len(column.stored_row_shape))
        dataset.id.write_direct_chunk(first, data)
        offset = dataset.id.get_chunk_info_by_coord(first).byte_offset
        chunks.append([offset, zlib.crc32(data)])
    return Part(
        target=column.key[0],
        layer=column.key[1],
        name=column.name,
        dtype=name,
        shape=list(shape),
        row_shape=column.row_shape,
        whole=column.whole,
        chunk_rows=chunk_rows,
        chunks=chunks,
        records=to_spans(column.records),
        starts=to_spans(column.starts),
        rows=to_spans(column.rows),
    )


def check(image: io.BytesIO, parts: list[Part]) -> None:
    """Reopen an image and compare its structure with what was meant.

    Args:
        image: A finished HDF5 file.
        parts: What it should hold.

    Raises:
        StoreWriteError: If names, shapes, dtypes or chunk addresses differ.
    """
    import h5py

    with h5py.File(image, "r") as file:
        names: list[str] = []
        file.visititems(
            lambda name, item: (
                names.append(name) if isinstance(item, h5py.Dataset) else None
            )
        )
        sound = sorted(names) == sorted(part.name for part in parts) and all(
            _matches(file[part.name], part) for part in parts
        )
    if not sound:
        raise StoreWriteError(
            errno.EIO,
            "a segment did not read back as it was built, so nothing was written; "
            "this machine's memory or HDF5 library is at fault: commit() tries again",
        )


def _matches(dataset: h5py.Dataset, part: Part) -> bool:
    kind = (list(dataset.shape), dataset.dtype)
    if kind != (part.shape, np.dtype(STORED_AS[part.torch_dtype])):
        return False
    if not part.chunks:
        return dataset.chunks is None and dataset.size == 0
    found = []
    for i in range(dataset.id.get_num_chunks()):
        first = (i * part.chunk_rows, *[0] * (dataset.ndim - 1))
        info = dataset.id.get_chunk_info_by_coord(first)
        found.append((info.byte_offset, info.size, info.filter_mask))
    size = part.chunk_rows * part.row_bytes
    return found == [(offset, size, 0) for offset, _ in part.chunks]
