"""Which route to eigenvalues is tried first: by device, dtype and size."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from repscope.linalg import thresholds
from repscope.linalg.routes import cpu, cupy, cusolver, triton
from repscope.linalg.thresholds import ANY, Measurement, Steps

ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": cpu.by_torch,
    "scipy": cpu.by_scipy,
    "numpy": cpu.by_numpy,
    "cusolver": cusolver.eigenvalues,
    "cupy": cupy.eigenvalues,
    "triton": triton.eigenvalues,  # not in `auto` before somebody has measured it
}

# Up to which n which route is the fastest; the next one from there on.
_UP_TO: dict[tuple[str, torch.dtype], Steps] = {
    ("cpu", torch.float32): {128: "torch", 2048: "scipy", ANY: "torch"},
    ("cpu", torch.float64): {128: "torch", 2048: "scipy", ANY: "torch"},
    # Nobody has measured these; until somebody does, the vendor's batched call.
    ("cuda", torch.float32): {32: "torch", ANY: "cusolver"},
    ("cuda", torch.float64): {32: "torch", ANY: "cusolver"},
}
# In place of torch where a batch is spread over threads.
_IN_THREADS = {torch.float32: "scipy", torch.float64: "numpy"}


def order(C: Tensor) -> list[str]:
    """Return the routes for matrices like these, the best one first.

    Args:
        C: Shape ``(batch, n, n)``.

    Returns:
        Keys of ``ROUTES``; ``"torch"``, which takes everything, is among them.
    """
    second = {"cpu": "scipy", "cuda": "cusolver"}.get(C.device.type, "torch")
    return list(dict.fromkeys([_measured(C) or built_in(C), second, "torch"]))


def built_in(C: Tensor) -> str:
    """Return the route that is the fastest where nothing was measured.

    Args:
        C: Shape ``(batch, n, n)``.

    Returns:
        A key of ``ROUTES``.
    """
    first = _at(C.shape[-1], built_in_steps(C.device.type, C.dtype))
    if first == "cusolver" and (len(C) == 1 or _torch_batches()):
        first = "torch"  # which makes the same call
    if first == "torch" and C.is_cpu and _fills_threads(C):
        first = _IN_THREADS[C.dtype]  # torch takes one matrix after the other
    return first


def built_in_steps(device: str, dtype: torch.dtype) -> Steps:
    """Return the thresholds that RepScope comes with.

    Args:
        device: The kind of device.
        dtype: Of the matrices.

    Returns:
        Up to which size which route is the fastest.
    """
    return _UP_TO.get((device, dtype), {ANY: "torch"})


@functools.cache
def tuned(device: torch.device, threads: int) -> tuple[Measurement | None, str | None]:
    """Return the thresholds that were measured on this machine, read once.

    Args:
        device: Where eigenvalues are to be computed.
        threads: ``torch.get_num_threads()``, which they depend on.

    Returns:
        A measurement or None, and why there is none although there is a file.
    """
    del threads  # a key of the cache
    return thresholds.find(thresholds.place_of(device), routes=ROUTES)


def _measured(C: Tensor) -> str | None:
    """Return the route that was measured to be the fastest, if that was measured."""
    if C.is_cuda and len(C) == 1:
        return None  # batches were measured
    found, _ = tuned(C.device, torch.get_num_threads())
    steps = found and found.up_to.get(str(C.dtype).removeprefix("torch."))
    return _at(C.shape[-1], steps) if steps else None


def _at(n: int, steps: Steps) -> str:
    return next(name for largest, name in steps.items() if n <= largest)


def _fills_threads(C: Tensor) -> bool:
    """Return whether there are matrices enough, of such a size, for several threads."""
    threads, n = torch.get_num_threads(), C.shape[-1]
    # What a call of scipy's costs is more than threads gain on smaller ones.
    least = 33 if _IN_THREADS[C.dtype] == "scipy" else 1
    fits = least <= n < cpu.ONE_MATRIX_FILLS_THREADS
    return threads > 1 and fits and len(C) >= 2 * threads


def _torch_batches() -> bool:
    """Return whether torch itself makes the batched call of cuSOLVER."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 12)
