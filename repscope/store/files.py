"""Bytes that survive: whole writes, fsync, and errors with a name."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from repscope.errors import StoreError, StoreFull, StoreWriteError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_GATHER = 2**16


@contextlib.contextmanager
def disk_errors(doing: str, *, advice: str) -> Iterator[None]:
    """Turn what the operating system refuses into `StoreFull` or `StoreWriteError`.

    Args:
        doing: What is tried, for the message.
        advice: What became of the data and what to do.

    Raises:
        StoreError: If it has a name already.
        StoreFull: If the disk or the quota is full.
        StoreWriteError: For every other ``OSError``.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        if code in _FULL:
            raise StoreFull(code, f"no space left while {doing}; {advice}") from error
        raise StoreWriteError(code, f"{error} while {doing}; {advice}") from error


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte: one ``os.write`` may take only some of them."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Create a file, write it and fsync it; on failure leave none behind.

    Args:
        path: Must not exist.
        pieces: The whole content; each is done with before the next is asked for.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            for data in _gathered(pieces):
                write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        discard(path)
        raise


def _gathered(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Yield the same bytes with small pieces put together: a write costs a call."""
    buffer, filled = memoryview(bytearray(_GATHER)), 0
    for piece in pieces:
        if filled and filled + len(piece) > _GATHER:
            yield buffer[:filled]
            filled = 0
        if len(piece) > _GATHER:
            yield memoryview(piece)
        else:
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
    if filled:
        yield buffer[:filled]


def discard(path: Path) -> None:
    """Remove a file of ours; one that cannot be removed must not hide the cause."""
    with contextlib.suppress(OSError):
        path.unlink()


def set_aside(store: Path, name: str, *, file: Path | None = None) -> str:
    """Move a file to the quarantine, or only find a free name there.

    Args:
        store: The store.
        name: The name it should get.
        file: What to move.

    Returns:
        The name, with a number after it if it was taken.
    """
    folder, tried, count = store / "quarantine", name, 0
    folder.mkdir(exist_ok=True)
    while os.path.lexists(folder / tried):
        count += 1
        tried = f"{name}.{count}"
    if file is not None:
        file.rename(folder / tried)
    return tried


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, all of them durable.

    Args:
        path: Must not exist.
    """
    created = [path, *(parent for parent in path.parents if not parent.exists())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()
    for directory in created:
        sync_directory(directory.parent)
