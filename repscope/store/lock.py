"""One writer at a time: an flock that says who holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from typing import NoReturn

from repscope.errors import RepScopeWarning, StoreLocked
from repscope.store.files import discard, write_all

_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """The right to write to a store, held from construction to `release`.

    The kernel drops it when the process dies, however it dies, so a lock is never
    stale; the text inside only tells others who holds it. Where the file system has
    no flock, a second file that only one process can create takes its place; after a
    kill it is taken over if the dead process was on this machine.

    Args:
        path: The lock file; created when missing.

    Raises:
        StoreLocked: If another writer holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marker: Path | None = None
        self._file = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0
        )
        try:
            self._take()
            self._sign()
        except BlockingIOError:
            by = _holder(self._file.read())
            self._file.close()
            _refuse(path.parent, by)
        except BaseException:
            self._file.close()
            raise
        _held.add(self)

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            warnings.warn(
                f"the file system of {self._path.parent} has no flock: a file "
                f"{self._path.name}.excl stands for it, which a killed writer on "
                "another machine leaves behind; remove it then",
                RepScopeWarning,
                stacklevel=2,
            )
            self._mark(self._path.with_name(f"{self._path.name}.excl"))

    def _mark(self, marker: Path) -> None:
        """Create the marker, or take over that of a dead process of this machine.

        Raises:
            BlockingIOError: If it belongs to somebody who may be alive.
        """
        me = f"{os.getpid()} {socket.gethostname()}".encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(marker, flags, 0o666)
        except FileExistsError:
            pid, _, host = marker.read_text().partition(" ")
            ours = host == socket.gethostname() and pid.isdigit()
            if not ours or _is_alive(int(pid)):
                raise BlockingIOError from None
            marker.unlink()
            fd = os.open(marker, flags, 0o666)
        try:
            write_all(fd, me)
        finally:
            os.close(fd)
        self._marker = marker

    def _sign(self) -> None:
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        self._file.truncate(0)
        write_all(self._file.fileno(), json.dumps(me).encode())

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._marker is not None:
            discard(self._marker)
            self._marker = None
        self._file.close()


def holder(path: Path) -> str | None:
    """Return who holds a lock, as words, or None; the file is left as it is.

    Args:
        path: The lock file.
    """
    try:
        file = path.open("rb")
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(file.read())
        except OSError:
            marked = path.with_name(f"{path.name}.excl").exists()
            return _holder(file.read()) if marked else None
    return None


def check_not_held(path: Path) -> None:
    """Refuse a lock that somebody holds; the file is left as it is.

    Args:
        path: The lock file.

    Raises:
        StoreLocked: If somebody is writing to the store.
    """  # noqa: DOC502 - raised by _refuse
    if (by := holder(path)) is not None:
        _refuse(path.parent, by)


def _refuse(store: Path, by: str) -> NoReturn:
    raise StoreLocked(
        f"{store} is being written by {by}; close that writer first, or record into "
        "another path (in distributed training, give every rank a path of its own)"
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _holder(text: bytes) -> str:
    """Return who signed the lock file, as words."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        who = json.loads(text)
        age = max(0.0, time.time() - float(who["started"]))
        return f"process {who['pid']} on {who['host']} since {age:.0f} s"
    return "another process"


def _let_go_in_child() -> None:
    """Close inherited copies: only when all are closed does the kernel unlock."""
    for lock in list(_held):
        lock._file.close()


os.register_at_fork(after_in_child=_let_go_in_child)
