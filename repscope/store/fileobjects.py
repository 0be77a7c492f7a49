"""Files for the HDF5 library to write to: none of them is a disk it could fill.

On a full disk the library crashes its process, at once or when that ends. So it gets
objects whose writes cannot fail: memory, or a file of ours that remembers its error.
"""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

_PAGE = 4096


class _FileObject(io.RawIOBase):
    """A position and a size; what a hole holds reads as zeros."""

    def __init__(self) -> None:
        self._at = 0
        self.size = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}
        self._at = base[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self._at if size is None else size
        return self.size

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._put(self._at, view)
        self._at += len(view)
        self.size = max(self.size, self._at)
        return len(view)

    def readinto(self, out: Any, /) -> int:
        view = memoryview(out).cast("B")
        n = max(0, min(len(view), self.size - self._at))
        view[:n] = self.slice(self._at, self._at + n)
        self._at += n
        return n

    @abstractmethod
    def _put(self, at: int, data: memoryview) -> None: ...

    @abstractmethod
    def slice(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop``."""


class Skeleton(_FileObject):
    """A file in memory of which only the written pages take any."""

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, bytearray] = {}

    def _put(self, at: int, data: memoryview) -> None:
        for page, start, low, high in _pages(at, len(data)):
            kept = self._pages.setdefault(page, bytearray(_PAGE))
            kept[start : start + high - low] = data[low:high]

    def slice(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop``."""
        hole = bytes(_PAGE)
        return b"".join(
            bytes(self._pages.get(page, hole)[at : at + high - low])
            for page, at, low, high in _pages(start, stop - start)
        )


class Through(_FileObject):
    """A file on disk whose first error is kept, and ends all writing.

    Args:
        fd: Open for reading and writing; empty.

    Attributes:
        error: The first thing that the operating system refused, or None.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self.error is not None:
            raise self.error

    def truncate(self, size: int | None = None, /) -> int:
        """Return the size, once it is set."""
        new = super().truncate(size)
        self._try(lambda: os.ftruncate(self._fd, new))
        return new

    def _put(self, at: int, data: memoryview) -> None:
        def write() -> None:
            done = 0
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], at + done)

        self._try(write)

    def _try(self, action: Callable[[], None]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error

    def slice(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop``."""
        pieces = []
        while start < stop and (piece := os.pread(self._fd, stop - start, start)):
            pieces.append(piece)
            start += len(piece)
        return b"".join([*pieces, bytes(stop - start)])


def _pages(start: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield page, first byte in it, and the range of the data that it takes."""
    low = 0
    while low < size:
        page, at = divmod(start + low, _PAGE)
        high = min(size, low + _PAGE - at)
        yield page, at, low, high
        low = high
