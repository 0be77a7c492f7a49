"""Read stored rows: each chunk is checked once a process, then read directly.

The manifest knows the address and the crc32 of every chunk, so reading needs no HDF5
library, and nothing it returns has not been compared with what was acknowledged.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from repscope.errors import CorruptSegment
from repscope.store.index import LABELS, SCALARS, Ints, Part

Bytes = npt.NDArray[np.uint8]

# (device, inode, size, mtime) of a segment -> (offset, size, crc32) of checked chunks
_verified: dict[tuple[int, ...], set[tuple[int, int, int]]] = {}


@dataclass(frozen=True, eq=False)
class StoredPart:
    """A part, where it is, and which steps it belongs to.

    Attributes:
        part: What the manifest says about it.
        path: The segment.
        size: Bytes of the segment.
        steps: Step of every record of the batch.
        grows: The file is a log, which may be longer by now.
    """

    part: Part
    path: Path
    size: int
    steps: Ints
    grows: bool = False

    def read(self, start: int, rows: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes of ``rows`` rows from ``start`` on.

        Args:
            start: First stored row.
            rows: How many.
            out: Exactly their bytes.

        Raises:
            CorruptSegment: If the segment is missing or damaged there.
        """  # noqa: DOC502 - raised by _blame, which names the steps
        if not len(out):
            return
        if start + rows > self.part.shape[0]:
            self._blame("has fewer rows than the manifest says")
        fd = self._open()
        try:
            stat = os.fstat(fd)
            known = _verified.setdefault(
                (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns), set()
            )
            width, per_chunk = self.part.row_bytes, self.part.chunk_rows
            stop = start + rows
            for number in range(start // per_chunk, -(-stop // per_chunk)):
                first = number * per_chunk
                low, high = max(start, first), min(stop, first + per_chunk)
                view = out[(low - start) * width : (high - start) * width]
                self._read_chunk(fd, number, (low - first) * width, view, known)
        finally:
            os.close(fd)

    def _open(self) -> int:
        try:
            # A pipe in place of a segment must not make the reader wait.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            self._blame("is missing")
        size = os.fstat(fd).st_size
        if size < self.size or (size > self.size and not self.grows):
            os.close(fd)
            self._blame(f"has {size} bytes instead of {self.size}")
        return fd

    def _read_chunk(
        self,
        fd: int,
        number: int,
        skip: int,
        out: Bytes,
        known: set[tuple[int, int, int]],
    ) -> None:
        """Fill ``out`` from byte ``skip`` of a chunk, checked at first touch."""
        offset, crc = self.part.chunks[number]
        size = self.part.chunk_rows * self.part.row_bytes
        if (offset, size, crc) in known:
            if _pread(fd, out, offset + skip) != len(out):
                self._blame("ends too early", chunk=number)
            return
        chunk = out if len(out) == size else np.empty(size, np.uint8)
        if _pread(fd, chunk, offset) != size or zlib.crc32(chunk.data) != crc:
            self._blame("holds other bytes than were written", chunk=number)
        known.add((offset, size, crc))
        if chunk is not out:
            out[:] = chunk[skip : skip + len(out)]

    def _blame(self, fault: str, *, chunk: int | None = None) -> NoReturn:
        records, starts, rows = self.part.where
        if chunk is not None:
            low, high = (self.part.chunk_rows * n for n in (chunk, chunk + 1))
            records = records[(starts < high) & (starts + rows > low)]
        target, layer = self.part.key
        what = {LABELS[0]: "the labels", SCALARS: f"scalar {layer!r}"}.get(
            target, f"{target} of layer {layer!r}"
        )
        raise CorruptSegment(
            f"{self.path} {fault}: {what} at {describe(self.steps[records])} cannot be "
            "trusted; the rest of the store still reads. Restore that file from a copy"
        )


def _pread(fd: int, out: Bytes, offset: int) -> int:
    """Fill ``out`` from ``offset`` on, or up to the end of the file.

    Returns:
        The bytes read.
    """
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:].data], offset + done)
        if not count:
            break
        done += count
    return done


def describe(steps: Ints) -> str:
    """Return steps as words: all of a few, the ends of many."""
    unique = np.unique(steps).tolist()
    if len(unique) == 1:
        return f"step {unique[0]}"
    if len(unique) <= 5:
        return f"steps {', '.join(map(str, unique[:-1]))} and {unique[-1]}"
    return f"steps {unique[0]} to {unique[-1]} ({len(unique)} of them)"
