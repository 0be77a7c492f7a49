"""One writer at a time: an flock that says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path

from repscope.errors import StoreLocked
from repscope.store.files import write_all

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """The right to write to a store, held from construction to `release`.

    The kernel drops it when the process dies, however it dies, so a lock is never
    stale; the text inside only tells others who holds it.

    Args:
        path: The lock file; created when missing.

    Raises:
        StoreLocked: If another writer holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0
        )
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sign()
        except BlockingIOError:
            holder = _holder(self._file.read())
            self._file.close()
            raise StoreLocked(
                f"{path.parent} is being written by {holder}; close that writer first, "
                "or record into another path (in distributed training, give every rank "
                "a path of its own)"
            ) from None
        except BaseException:
            self._file.close()
            raise
        _held.add(self)

    def _sign(self) -> None:
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        self._file.truncate(0)
        write_all(self._file.fileno(), json.dumps(me).encode())

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        self._file.close()


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
