"""How many threads the linear algebra of numpy and scipy may take: torch's setting.

Their BLAS would use every core whatever torch was told, and two threads on a busy core
can be thirty times slower than one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import LibController, ThreadpoolController

Result = TypeVar("Result")


@contextlib.contextmanager
def blas_threads(n: int | None = None) -> Iterator[None]:
    """Limit the BLAS of numpy and scipy to some threads, and undo it.

    Args:
        n: At most so many; by default ``torch.get_num_threads()``.

    Yields:
        Nothing.
    """
    _LIMITS.enter(torch.get_num_threads() if n is None else n)
    try:
        yield
    finally:
        _LIMITS.leave()


class _Limits:
    """What is limited now: the setting is the process's, and so are its limits.

    The one that comes last out of several, in whatever threads and order they end,
    restores what the first one met.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[LibController, int]] = []

    def enter(self, limit: int) -> None:
        with self._lock:
            if not self._inside:
                self._before = [(c, c.num_threads) for c in _openblas()]
            self._inside += 1
            for control, _ in self._before:
                if control.num_threads > limit:
                    control.set_num_threads(limit)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            for control, threads in self._before if not self._inside else ():
                if control.num_threads != threads:
                    control.set_num_threads(threads)


_LIMITS = _Limits()


def in_threads(
    work: Callable[[int, int], Result], length: int, *, threads: int
) -> list[Result]:
    """Call ``work(start, stop)`` on equal slices, each in a thread of its own.

    Args:
        work: Gives up the interpreter lock while it computes, and calls BLAS.
        length: How many items there are.
        threads: At most so many slices, each with one BLAS thread.

    Returns:
        What each slice gave, in order.
    """
    threads = max(1, min(threads, length))
    cuts = [length * i // threads for i in range(threads + 1)]
    with blas_threads(1):
        if threads == 1:
            return [work(0, length)]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, cuts[:-1], cuts[1:]))


def _openblas() -> Sequence[LibController]:
    # scipy brings a BLAS of its own, which is there once somebody has imported it.
    return _controls("scipy.linalg" in sys.modules)


@functools.cache
def _controls(with_scipy: bool) -> Sequence[LibController]:
    return tuple(ThreadpoolController().select(internal_api="openblas").lib_controllers)
