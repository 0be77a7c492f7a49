"""Eigenvalues on CUDA by ``cupy.linalg.eigvalsh``, if CuPy is installed."""

from __future__ import annotations

import torch
from numpy.linalg import LinAlgError
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from repscope.linalg.routes import Unavailable
from repscope.linalg.routes.invariants import checked


def eigenvalues(C: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices in ascending order.

    CuPy reads ``C`` in place, on torch's current stream of the device. It works in a
    copy, in memory of its own pool.

    Args:
        C: Symmetric finite matrices on a CUDA device, shape ``(batch, n, n)``,
            contiguous, float32 or float64.

    Returns:
        Shape ``(batch, n)``, ascending, of the dtype and on the device of ``C``.

    Raises:
        Unavailable: If ``C`` is not on a CUDA device, CuPy cannot be imported, or it
            fails, or the values are not those of ``C``.
    """
    if not C.is_cuda:
        raise Unavailable(f"CuPy serves CUDA devices, not {C.device}")
    try:
        import cupy
        import cupyx
    except ImportError as error:
        raise Unavailable(f"CuPy cannot be imported: {error}") from error
    with torch.cuda.device(C.device):
        stream = torch.cuda.current_stream().cuda_stream
        with (
            cupy.cuda.Device(C.device.index),
            cupy.cuda.ExternalStream(stream, C.device.index),
            # Without it CuPy ignores what did not converge.
            cupyx.errstate(linalg="raise"),
        ):
            try:
                values = cupy.linalg.eigvalsh(cupy.from_dlpack(C.detach()))
            except (RuntimeError, MemoryError, LinAlgError) as error:
                raise Unavailable(f"cupy.linalg.eigvalsh fails: {error}") from error
            # A copy, as torch's allocator does not know what streams use CuPy's memory.
            return checked(from_dlpack(values).clone(), C, of="CuPy")
