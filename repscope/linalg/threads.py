"""How many threads the linear algebra of numpy and scipy may take: torch's setting.

Their BLAS would use every core whatever torch was told, and two threads on a busy core
can be thirty times slower than one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

Result = TypeVar("Result")


@contextlib.contextmanager
def blas_threads(n: int | None = None) -> Iterator[None]:
    """Limit the BLAS of numpy and scipy to some threads, and undo it.

    Args:
        n: At most so many; by default ``torch.get_num_threads()``.

    Yields:
        Nothing.
    """
    limit = torch.get_num_threads() if n is None else n
    controls = [c for c in _openblas().lib_controllers if c.num_threads > limit]
    before = [control.num_threads for control in controls]
    for control in controls:
        control.set_num_threads(limit)
    try:
        yield
    finally:
        for control, threads in zip(controls, before, strict=True):
            control.set_num_threads(threads)


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
    if threads == 1:
        return [work(0, length)]
    cuts = [length * i // threads for i in range(threads + 1)]
    with blas_threads(1), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, cuts[:-1], cuts[1:]))


def _openblas() -> ThreadpoolController:
    # scipy brings a BLAS of its own, which is there once somebody has imported it.
    return _controller("scipy.linalg" in sys.modules)


@functools.cache
def _controller(with_scipy: bool) -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")
