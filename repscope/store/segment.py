"""Build one segment: HDF5 makes the structure in memory, we write the bytes.

The library allocates every chunk and fills none: what it wrote is a few hundred bytes
a dataset, with holes where the chunks go. The rows then go from where they are to the
disk, so that a segment costs no memory of its own and no second copy.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from repscope.errors import StoreWriteError
from repscope.store.columns import Column
from repscope.store.fileobjects import Skeleton
from repscope.store.index import STORED_AS, Part, to_spans

if TYPE_CHECKING:
    import h5py

CHUNK_BYTES = 2**20
_ALIGN = 64  # so that a mapped stream is aligned for every dtype


class Image:
    """The bytes of one segment, of which those of the chunks are not copied.

    Args:
        columns: At least one.

    Attributes:
        parts: What is in it; checksums are there once `pieces` is exhausted.
        nbytes: Size of the file.
    """

    def __init__(self, columns: Iterable[Column]) -> None:
        import h5py

        self._skeleton = Skeleton()
        self._columns = list(columns)
        with h5py.File(
            self._skeleton,
            "w",
            libver=("v110", "v110"),
            alignment_threshold=1,
            alignment_interval=_ALIGN,
        ) as file:
            self.parts = [_add(file, column) for column in self._columns]
        check(self._skeleton, self.parts)
        self.nbytes = self._skeleton.size

    def pieces(self) -> Iterator[memoryview | bytes]:
        """Yield all bytes in order, and note the checksum of every chunk.

        Yields:
            Memory that is only valid until the next piece is asked for.
        """
        both = zip(self.parts, self._columns, strict=True)
        placed = sorted(
            (part.chunks[0][0], i) for i, (part, _) in enumerate(both) if part.chunks
        )
        end = 0
        for _, i in placed:
            part = self.parts[i]
            size = part.chunk_rows * part.row_bytes
            data = self._columns[i].chunks(part.chunk_rows)
            for chunk, piece in zip(part.chunks, data, strict=True):
                yield self._skeleton.slice(end, chunk[0])
                chunk[1] = zlib.crc32(piece)
                yield piece
                end = chunk[0] + size
        yield self._skeleton.slice(end, self.nbytes)


def _add(file: h5py.File, column: Column) -> Part:
    import h5py

    shape = (column.n_rows, *column.stored_row_shape)
    n_chunks = -(-column.n_rows * column.row_bytes // CHUNK_BYTES)
    # Even chunks, not full ones and a rest: the padding is below a row a chunk.
    chunk_rows = -(-column.n_rows // max(n_chunks, 1)) if column.row_bytes else 0
    name = str(column.dtype).removeprefix("torch.")
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    dataset = file.create_dataset(
        column.name,
        shape=shape,
        dtype=column.h5_dtype,
        # HDF5 cannot chunk what has no elements.
        chunks=(chunk_rows, *column.stored_row_shape) if chunk_rows else None,
        track_times=False,
        dcpl=plan,
    )
    if column.dtype.is_floating_point and column.h5_dtype.kind == "u":
        # A fixed-length string: variable ones live in a heap of their own.
        dataset.attrs["torch_dtype"] = np.bytes_(name)
    n_chunks = -(-column.n_rows // chunk_rows) if chunk_rows else 0
    return Part(
        target=column.key[0],
        layer=column.key[1],
        name=column.name,
        dtype=name,
        shape=list(shape),
        row_shape=column.row_shape,
        whole=column.whole,
        chunk_rows=chunk_rows,
        chunks=[[_place(dataset, i * chunk_rows), 0] for i in range(n_chunks)],
        records=to_spans(column.records),
        starts=to_spans(column.starts),
        rows=to_spans(column.rows),
    )


def _place(dataset: h5py.Dataset, row: int) -> int:
    """Return where in the file the chunk that starts at ``row`` is."""
    first = (row, *[0] * (dataset.ndim - 1))
    return int(dataset.id.get_chunk_info_by_coord(first).byte_offset)


def check(image: Skeleton, parts: list[Part]) -> None:
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
