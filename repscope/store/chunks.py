"""Read stored rows: each chunk is checked once a process, then read directly.

The manifest knows the address and the crc32 of every chunk, so reading needs no HDF5
library, and nothing it returns has not been compared with what was acknowledged.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from repscope.errors import CorruptSegment
from repscope.store import filters
from repscope.store.index import LABELS, SCALARS, Index, Ints, Part, as_slice

Bytes = npt.NDArray[np.uint8]
Bits = npt.NDArray[Any]
Signature = tuple[int, ...]  # device, inode, size and mtime of a file

# What was checked of a file: (offset, size, crc32) of chunks
_verified: dict[Signature, set[tuple[int, int, int]]] = {}

_UNPACKED_BYTES = 2**28


class _Recent:
    """Arrays that were used lately; several threads may read one run.

    Args:
        most: How many to keep.
        most_bytes: How many bytes to keep, apart from the latest array.
    """

    def __init__(self, *, most: int, most_bytes: float = math.inf) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._kept: OrderedDict[Any, Bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: object, make: Callable[[], Bytes]) -> Bytes:
        """Return what is kept for a key, or what ``make`` returns."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        made = make()
        with self._lock:
            self._kept[key] = made
            nbytes = sum(len(each) for each in self._kept.values())
            while len(self._kept) > 1 and (
                len(self._kept) > self.most or nbytes > self.most_bytes
            ):
                nbytes -= len(self._kept.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()


_maps = _Recent(most=256)
_unpacked = _Recent(most=2**16, most_bytes=_UNPACKED_BYTES)


@dataclass(frozen=True, eq=False)
class StoredPart:
    """A part, where it is, and which steps it belongs to.

    Attributes:
        part: What the manifest says about it.
        path: The segment.
        size: Bytes of the segment.
        steps: Step of every record of the batch.
        grows: The file is a log, or a packed one: it may be longer.
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
        if self.part.grid or self.part.filter:
            data = self.take(start, start + rows, slice(None))
            out[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            return
        with self._file(start, start + rows) as file:
            width, per_chunk = self.part.row_bytes, self.part.chunk_rows
            stop = start + rows
            for number in range(start // per_chunk, -(-stop // per_chunk)):
                first = number * per_chunk
                low, high = max(start, first), min(stop, first + per_chunk)
                view = out[(low - start) * width : (high - start) * width]
                file.read(number, (low - first) * width, view)

    def take(self, start: int, stop: int, units: slice | Ints) -> Bits:
        """Return units of the rows from ``start`` to ``stop``, as integers.

        Args:
            start: First stored row.
            stop: After the last one.
            units: Chooses along the last axis.

        Returns:
            ``(stop - start, *shape[1:-1], n_units)``, the bits of the values; it may be
            a view of the file, which is mapped.

        Raises:
            CorruptSegment: If the segment is missing or damaged there.
        """  # noqa: DOC502 - raised by _blame, which names the steps
        part = self.part
        bits = np.dtype(f"<i{part.torch_dtype.itemsize}")
        shape = (stop - start, *part.shape[1:])
        if not part.row_bytes or start == stop:
            return np.zeros(shape, bits)[..., units]
        with self._file(start, stop) as file:
            if part.block is not None:
                per_chunk = part.chunk_rows
                for number in range(start // per_chunk, -(-stop // per_chunk)):
                    file.verify(number)
                first = part.block + start * part.row_bytes
                data = file.map()[first : first + (stop - start) * part.row_bytes]
                return data.view(bits).reshape(shape)[..., units]
            return _gather(part, start, stop, units, lambda n: file.chunk(n).view(bits))

    def _file(self, start: int, stop: int) -> _Open:
        if not 0 <= start <= stop <= self.part.shape[0]:
            self.blame("has fewer rows than the manifest says")
        return _Open(self)

    def blame(self, fault: str, *, chunk: int | None = None) -> NoReturn:
        """Say what cannot be read.

        Args:
            fault: What is wrong with the file.
            chunk: Only the rows in this chunk are concerned.

        Raises:
            CorruptSegment: Always; it names the layer and the steps.
        """
        raise CorruptSegment(
            f"{self.path} {fault}: {self._words(None if chunk is None else [chunk])} "
            "cannot be trusted; the rest of the store still reads. Restore that file "
            "from a copy"
        )

    def inspect(self, *, full: bool) -> str:
        """Return what of this part cannot be trusted, as words; empty if nothing.

        Args:
            full: Read everything from the disk, whatever was checked before.
        """
        try:
            with _Open(self) as file:
                numbers = range(len(self.part.chunks) if full else 0)
                bad = [number for number in numbers if not file.is_sound(number)]
        except CorruptSegment as error:
            fault = str(error).partition(": ")[0].removeprefix(f"{self.path} ")
            return f"{fault}: {self._words(None)}"
        return f"other bytes than were written: {self._words(bad)}" if bad else ""

    def _words(self, chunks: Sequence[int] | None) -> str:
        """Return the stream and the steps of some chunks, or of all."""
        records, starts, rows = self.part.where
        if chunks is not None:
            per_chunk, hit = self.part.chunk_rows, np.zeros(len(records), bool)
            beside = len(self.part.chunks) // -(-self.part.shape[0] // per_chunk)
            for low in {chunk // beside * per_chunk for chunk in chunks}:
                hit |= (starts < low + per_chunk) & (starts + rows > low)
            records = records[hit]
        target, layer = self.part.key
        what = {LABELS[0]: "the labels", SCALARS: f"scalar {layer!r}"}.get(
            target, f"{target} of layer {layer!r}"
        )
        return f"{what} at {describe(self.steps[records])}"


class _Open:
    """The file of a part while its chunks are read, and what is known of it."""

    def __init__(self, stored: StoredPart) -> None:
        self._stored = stored
        self._part = stored.part
        try:
            # A pipe in place of a segment must not make the reader wait.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(stored.path, flags)
        except (FileNotFoundError, NotADirectoryError):
            stored.blame("is missing")
        info = os.fstat(self._fd)
        size = info.st_size
        if size < stored.size or (size > stored.size and not stored.grows):
            os.close(self._fd)
            stored.blame(f"has {size} bytes instead of {stored.size}")
        self.signature = _signature(info)
        self._known = _verified.setdefault(self.signature, set())

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, number: int, skip: int, out: Bytes) -> None:
        """Fill ``out`` from byte ``skip`` of a plain chunk, checked at first touch."""
        offset, size, crc = self._place(number)
        if (offset, size, crc) in self._known:
            if _pread(self._fd, out, offset + skip) != len(out):
                self._stored.blame("ends too early", chunk=number)
            return
        chunk = out if len(out) == size else np.empty(size, np.uint8)
        self._compare(number, chunk)
        if chunk is not out:
            out[:] = chunk[skip : skip + len(out)]

    def verify(self, number: int) -> None:
        """Compare a chunk with its checksum, unless that was done before."""
        place = self._place(number)
        if place not in self._known:
            self._compare(number, np.empty(place[1], np.uint8))

    def is_sound(self, number: int) -> bool:
        """Return whether a chunk on the disk has its checksum now."""
        try:
            self._compare(number, np.empty(self._place(number)[1], np.uint8))
        except (CorruptSegment, OSError):
            return False
        return True

    def chunk(self, number: int) -> Bytes:
        """Return the bytes of a chunk, unpacked."""
        offset, size, _ = self._place(number)
        if not self._part.filter:
            self.verify(number)
            return self.map()[offset : offset + size]
        return _unpacked.get((self.signature, offset), lambda: self._unpack(number))

    def _unpack(self, number: int) -> Bytes:
        part, data = self._part, np.empty(self._place(number)[1], np.uint8)
        self._compare(number, data)
        nbytes, itemsize = part.chunk_bytes, part.torch_dtype.itemsize
        try:
            return filters.unpack(part.filter, data, nbytes=nbytes, itemsize=itemsize)
        except ValueError as error:
            self._stored.blame(f"cannot be unpacked ({error})", chunk=number)

    def map(self) -> Bytes:
        """Return the whole file as memory that is read on demand, and never written.

        Mapped by torch, which keeps no descriptor: a run may have many segments.
        """
        return _maps.get(self.signature, self._map)

    def _map(self) -> Bytes:
        path, size = self._stored.path, self.signature[2]
        try:
            data: Bytes = torch.from_file(
                str(path), shared=False, size=size, dtype=torch.uint8
            ).numpy()
        except RuntimeError:
            # A private map counts as memory, of which a large file may ask too much.
            try:
                data = np.memmap(path, np.uint8, mode="r", shape=(size,))
            except FileNotFoundError:
                self._stored.blame("is missing")
        if _signature(path.stat()) != self.signature:
            self._stored.blame("was replaced while it was read")
        data.flags.writeable = False
        return data

    def _place(self, number: int) -> tuple[int, int, int]:
        offset, crc, *size = self._part.chunks[number]
        return offset, size[0] if size else self._part.chunk_bytes, crc

    def _compare(self, number: int, out: Bytes) -> None:
        """Fill ``out`` with a whole chunk as it is in the file, and compare it."""
        offset, size, crc = self._place(number)
        if _pread(self._fd, out, offset) != size or zlib.crc32(out.data) != crc:
            self._stored.blame("holds other bytes than were written", chunk=number)
        self._known.add((offset, size, crc))


def _gather(
    part: Part, start: int, stop: int, units: slice | Ints, chunk: Callable[[int], Bits]
) -> Bits:
    """Return what `StoredPart.take` does, from a grid of chunks."""
    cell = part.chunk_shape
    counts = [-(-size // side) for size, side in zip(part.shape, cell, strict=True)]
    wanted = [np.arange(start, stop), *(np.arange(size) for size in part.shape[1:-1])]
    if len(part.shape) > 1:
        span = units.indices(part.shape[-1]) if isinstance(units, slice) else ()
        wanted.append(np.arange(*span) if isinstance(units, slice) else units)
    kind = np.dtype(f"<i{part.torch_dtype.itemsize}")
    out: Bits = np.empty([len(axis) for axis in wanted], kind)
    split = [list(_split(axis, side)) for axis, side in zip(wanted, cell, strict=True)]
    for pieces in itertools.product(*split):
        at, into, source = zip(*pieces, strict=True)
        data = chunk(int(np.ravel_multi_index(at, counts))).reshape(cell)
        out[into] = data[source]
    return out


def _split(wanted: Ints, side: int) -> Iterator[tuple[int, Index, Index]]:
    """Yield chunks of one axis, where what they have goes, and where they have it."""
    chunk = wanted // side
    for number in np.unique(chunk).tolist():
        into = np.flatnonzero(chunk == number)
        yield number, as_slice(into), as_slice(wanted[into] - number * side)


def _signature(info: os.stat_result) -> Signature:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


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
    if not unique:
        return "no step"
    if len(unique) == 1:
        return f"step {unique[0]}"
    if len(unique) <= 5:
        return f"steps {', '.join(map(str, unique[:-1]))} and {unique[-1]}"
    return f"steps {unique[0]} to {unique[-1]} ({len(unique)} of them)"
