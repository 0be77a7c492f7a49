"""Which route to eigenvalues is tried first: by device, dtype and size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repscope.linalg.routes import cpu, cupy, cusolver, triton

ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": cpu.by_torch,
    "scipy": cpu.by_scipy,
    "numpy": cpu.by_numpy,
    "cusolver": cusolver.eigenvalues,
    "cupy": cupy.eigenvalues,
    "triton": triton.eigenvalues,  # not in `auto` before somebody has measured it
}

_ANY = 2**63
# Up to which n which route is the fastest; the next one from there on.
_UP_TO: dict[tuple[str, torch.dtype], dict[int, str]] = {
    ("cpu", torch.float32): {128: "torch", 2048: "scipy", _ANY: "torch"},
    ("cpu", torch.float64): {64: "torch", 512: "scipy", _ANY: "numpy"},
    # Nobody has measured these; until somebody does, the vendor's batched call.
    ("cuda", torch.float32): {32: "torch", _ANY: "cusolver"},
    ("cuda", torch.float64): {32: "torch", _ANY: "cusolver"},
}


def order(C: Tensor) -> list[str]:
    """Return the routes for matrices like these, the best one first.

    Args:
        C: Shape ``(batch, n, n)``.

    Returns:
        Keys of ``ROUTES``; ``"torch"``, which takes everything, is among them.
    """
    n = C.shape[-1]
    steps = _UP_TO.get((C.device.type, C.dtype), {_ANY: "torch"})
    first = next(name for largest, name in steps.items() if n <= largest)
    if first == "cusolver" and (len(C) == 1 or _torch_batches()):
        first = "torch"  # which makes the same call
    if first == "torch" and C.is_cpu and _fills_threads(C):
        first = "scipy"  # torch takes one matrix after the other
    second = {"cpu": "scipy", "cuda": "cusolver"}.get(C.device.type, "torch")
    return list(dict.fromkeys([first, second, "torch"]))


def _fills_threads(C: Tensor) -> bool:
    """Return whether there are matrices enough, and small ones, for several threads."""
    threads = torch.get_num_threads()
    small = C.shape[-1] < cpu.ONE_MATRIX_FILLS_THREADS
    return threads > 1 and small and len(C) >= 2 * threads


def _torch_batches() -> bool:
    """Return whether torch itself makes the batched call of cuSOLVER."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 12)
