"""Eigenvalues of small matrices on CUDA by kernels in Triton, if it is installed.

torch's wheels for CUDA on Linux bring Triton with them.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from repscope.linalg.routes import Unavailable, tridiagonal
from repscope.linalg.routes.invariants import checked

# A float32 tile of 256 x 256 is all the registers that a multiprocessor has.
LARGEST = 128


def eigenvalues(C: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices in ascending order.

    Two launches on torch's current stream of the device, whatever the batch, and a
    check that waits for them. The first call for a dtype and a size up to 32, 64 or 128
    compiles.

    Args:
        C: Symmetric finite matrices on a CUDA device, shape ``(batch, n, n)``,
            contiguous, float32 or float64, n at most 128. In Triton's interpreter
            (``TRITON_INTERPRET=1``) any device serves.

    Returns:
        Shape ``(batch, n)``, ascending, of the dtype and on the device of ``C``.

    Raises:
        Unavailable: If ``C`` is not on a CUDA device or too large, Triton cannot be
            imported, compile or launch, or the values are not those of ``C``.
    """
    n = C.shape[-1]
    if not C.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable(f"Triton serves CUDA devices, not {C.device}")
    if n > LARGEST:
        raise Unavailable(f"the tile of a kernel holds n up to {LARGEST}, not {n}")
    with torch.cuda.device_of(C):
        _, _, _, values = launch(C)
        return checked(values, C, of="the kernels")


def launch(C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what both kernels write, on whose device the caller has to be.

    Args:
        C: As for `eigenvalues`.

    Returns:
        The scale, the diagonal and what is beside it, as
        ``tridiagonal.tridiagonalise`` returns them, and the eigenvalues.

    Raises:
        Unavailable: If Triton cannot be imported, compile or launch.
    """
    zero = tridiagonal.floor(C.dtype)
    try:
        from repscope.linalg.routes import triton_kernels
    except ImportError as error:
        raise Unavailable(f"Triton cannot be imported: {error}") from error
    batch, n, _ = C.shape
    scale = C.new_empty(batch)
    # Each on its own: Triton compiles again for another alignment.
    d, e, values = (C.new_empty(batch, n) for _ in range(3))
    block, options = tile(n, C.dtype)
    try:
        triton_kernels.tridiagonalise[(batch,)](
            *(C, scale, d, e, n),
            **{"ZERO": zero, "TINY": torch.finfo(C.dtype).tiny, "BLOCK": block},
            **options,
        )
        triton_kernels.bisect[(batch,)](
            *(scale, d, e, values, n),
            **{"STEPS": tridiagonal.steps(C.dtype), "ZERO": zero, "BLOCK": block},
            **{"num_warps": block // 32, "enable_fp_fusion": True},
        )
    except Exception as error:  # of LLVM, ptxas, gcc or the driver
        raise Unavailable(
            f"the kernels do not compile or launch here: "
            f"{type(error).__name__}: {str(error)[:500]}"
        ) from error
    return scale, d, e, values


def tile(n: int, dtype: torch.dtype) -> tuple[int, dict[str, int | bool]]:
    """Return how the first kernel holds a matrix in registers; unmeasured.

    Args:
        n: At most ``LARGEST``.
        dtype: float32 or float64.

    Returns:
        The size of the tile, and the options of the launch: warps for 32 to 64 numbers
        of the tile in a thread, and registers for two of the largest tile at a time on
        a multiprocessor in float32. In float64 it takes all a thread can have, which
        ptxas of CUDA 12.8 finds only when told.
    """
    block = max(32, 1 << (n - 1).bit_length())
    options = {"num_warps": {32: 1, 64: 4, 128: 8}[block], "enable_fp_fusion": True}
    if block == LARGEST:
        options["maxnreg"] = 128 if dtype == torch.float32 else 255
    return block, options
