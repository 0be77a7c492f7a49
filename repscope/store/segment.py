"""Build one segment: HDF5 makes the structure in memory, we write the bytes.

The library allocates every chunk and fills none: what it wrote is a few hundred bytes
a dataset, with holes where the chunks go. The rows then go from where they are to the
disk, so that a segment costs no memory of its own and no second copy.

A segment also carries what its frame of the manifest says, so that a manifest that is
lost can be made again.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from repscope.errors import StoreWriteError
from repscope.store import manifest
from repscope.store.columns import Column
from repscope.store.fileobjects import Skeleton
from repscope.store.index import STORED_AS, Part, to_spans

if TYPE_CHECKING:
    import h5py

CHUNK_BYTES = 2**20
CRC32, FRAME = "@crc32", "@frame"  # no encoded name has this character
_ALIGN = 64  # so that a mapped stream is aligned for every dtype


class Image:
    """The bytes of one segment, of which those of the chunks are not copied.

    Args:
        columns: At least one.
        seq: Number of the frame that will name this segment.
        about: What the frame says, and which of its segments this is.

    Attributes:
        parts: What is in it; checksums are there once `pieces` is exhausted.
        nbytes: Size of the file.
    """

    def __init__(
        self, columns: Iterable[Column], *, seq: int, about: Mapping[str, Any]
    ) -> None:
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
            n_chunks = sum(len(part.chunks) for part in self.parts)
            crcs = _reserve(file, CRC32, (n_chunks + 1,), np.dtype("<u4"))
            body = {
                **about,
                CRC32: _place(crcs),
                "parts": [part.to_json() for part in self.parts],
            }
            self._frame = manifest.encode(seq, body)
            kept = _reserve(file, FRAME, (len(self._frame),), np.dtype("u1"))
            self._own = _place(crcs), _place(kept)
        check(self._skeleton, self.parts)
        self.nbytes = self._skeleton.size

    def pieces(self) -> Iterator[memoryview | bytes]:
        """Yield all bytes in order, and note the checksum of every chunk.

        Yields:
            Memory that is only valid until the next piece is asked for.
        """
        end = 0
        for offset, data in self._placed():
            yield self._skeleton.slice(end, offset)
            yield data
            end = offset + len(data)
        yield self._skeleton.slice(end, self.nbytes)

    def _placed(self) -> Iterator[tuple[int, memoryview | bytes]]:
        """Yield every chunk and where it goes, in the order of the file."""
        both = zip(self.parts, self._columns, strict=True)
        filled = [(part, column) for part, column in both if part.chunks]
        for part, column in sorted(filled, key=lambda each: each[0].chunks[0][0]):
            data = column.chunks(part.chunk_rows)
            for chunk, pieces in zip(part.chunks, data, strict=True):
                offset, crc = chunk[0], 0
                for piece in pieces:
                    crc = zlib.crc32(piece, crc)
                    yield offset, piece
                    offset += len(piece)
                chunk[1] = crc
        sums = [crc for part in self.parts for _, crc in part.chunks]
        yield self._own[0], seal(self._frame, sums)
        yield self._own[1], self._frame


def seal(frame: bytes, crcs: Sequence[int]) -> bytes:
    """Return the checksums of a segment's chunks, closed by one of them and a frame."""
    data = np.array(crcs, "<u4").tobytes()
    return data + np.array([zlib.crc32(data, zlib.crc32(frame))], "<u4").tobytes()


def _add(file: h5py.File, column: Column) -> Part:
    shape = (column.n_rows, *column.stored_row_shape)
    n_chunks = -(-column.n_rows * column.row_bytes // CHUNK_BYTES)
    # Even chunks, not full ones and a rest: the padding is below a row a chunk.
    chunk_rows = -(-column.n_rows // max(n_chunks, 1)) if column.row_bytes else 0
    name = str(column.dtype).removeprefix("torch.")
    # HDF5 cannot chunk what has no elements.
    chunks = (chunk_rows, *column.stored_row_shape) if chunk_rows else None
    dataset = _reserve(file, column.name, shape, column.h5_dtype, chunks)
    note_dtype(dataset, column.dtype)
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


def note_dtype(dataset: h5py.Dataset, dtype: torch.dtype) -> None:
    """Say what the bits of a dataset mean, where HDF5 has no such type."""
    if dtype.is_floating_point and dataset.dtype.kind == "u":
        # A fixed-length string: variable ones live in a heap of their own.
        name = str(dtype).removeprefix("torch.")
        dataset.attrs["torch_dtype"] = np.bytes_(name)


def _reserve(
    file: h5py.File,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...] | None = (),
) -> h5py.Dataset:
    """Return a new dataset whose chunks (one, by default) have their place."""
    import h5py

    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(
        name,
        shape=shape,
        dtype=dtype,
        chunks=shape if chunks == () else chunks,
        track_times=False,
        dcpl=plan,
    )


def _place(dataset: h5py.Dataset, row: int = 0) -> int:
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
        meant = [CRC32, FRAME, *(part.name for part in parts)]
        sound = sorted(names) == sorted(meant) and all(
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
