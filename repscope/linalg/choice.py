"""Which route to eigenvalues is tried first: by device, dtype and size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repscope.linalg.routes import cpu

Route = Callable[[Tensor], Tensor]
# (largest n, route) in ascending order of n; the last one has no largest n.
Steps = tuple[tuple[int | None, str], ...]


def _by_cusolver(C: Tensor) -> Tensor:
    from repscope.linalg.routes import cusolver

    return cusolver.eigenvalues(C)


def _by_cupy(C: Tensor) -> Tensor:
    from repscope.linalg.routes import cupy

    return cupy.eigenvalues(C)


ROUTES: dict[str, Route] = {
    "torch": cpu.by_torch,
    "scipy": cpu.by_scipy,
    "numpy": cpu.by_numpy,
    "cusolver": _by_cusolver,
    "cupy": _by_cupy,
}


@dataclass(frozen=True)
class Thresholds:
    """The route for each size of matrix.

    Attributes:
        cpu_float32: Steps of ``(largest n, route)``; ``None`` is no limit.
        cpu_float64: The same in float64.
        cuda_float32: The same on CUDA.
        cuda_float64: The same on CUDA, in float64.
    """

    cpu_float32: Steps = ((128, "torch"), (2048, "scipy"), (None, "torch"))
    cpu_float64: Steps = ((64, "torch"), (512, "scipy"), (None, "numpy"))
    # Nobody has measured these; until somebody does, the vendor's batched call.
    cuda_float32: Steps = ((32, "torch"), (None, "cusolver"))
    cuda_float64: Steps = ((32, "torch"), (None, "cusolver"))

    def route(self, C: Tensor) -> str:
        """Return the name of the route for matrices like these.

        Args:
            C: Shape ``(batch, n, n)``.

        Returns:
            A key of ``ROUTES``.
        """
        place = "cpu" if C.is_cpu else "cuda"
        kind = "float32" if C.dtype == torch.float32 else "float64"
        steps: Steps = getattr(self, f"{place}_{kind}")
        for largest, name in steps:
            if largest is None or C.shape[-1] <= largest:
                return name
        return "torch"


def order(C: Tensor) -> list[str]:
    """Return the routes for matrices like these, the best one first.

    Args:
        C: Shape ``(batch, n, n)``.

    Returns:
        Keys of ``ROUTES``; ``"torch"``, which takes everything, is among them.
    """
    first = Thresholds().route(C)
    if first == "cusolver" and (len(C) == 1 or _torch_batches()):
        first = "torch"  # which makes the same call
    if C.is_cpu:
        others = ["scipy", "torch"]
        if first == "torch" and len(C) >= 2 * torch.get_num_threads() > 2:
            # torch takes one matrix after the other; scipy's routine runs in threads.
            first = "scipy" if C.shape[-1] < 1024 else first
    else:
        others = ["cusolver", "torch"]
    return list(dict.fromkeys([first, *others]))


def _torch_batches() -> bool:
    """Return whether torch itself makes the batched call of cuSOLVER."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 12)
