"""Inverse p-th roots of symmetric positive semidefinite matrices ``(..., n, n)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_float, check_finite
from repscope.errors import MetricError


def inverse_root(C: Any, *, p: float | Tensor, eps: float) -> Tensor:
    r"""Return the damped inverse p-th root of a positive semidefinite matrix.

    With :math:`C = V \operatorname{diag}(\lambda) V^\top` this is
    :math:`V \operatorname{diag}\big((\max(\lambda, 0) + \epsilon)^{-1/p}\big) V^\top`.
    The damping comes after the clamp, so that a direction of zero variance, whose
    computed eigenvalue may be a small negative number, has gain
    :math:`\epsilon^{-1/p}` exactly.

    Args:
        C: Symmetric matrices, shape ``(..., n, n)``; only the lower triangle is read.
        p: Order of the root, positive; a tensor of shape ``(...)`` gives each matrix
            of the batch its own.
        eps: Damping in the units of ``C``, positive.

    Returns:
        Symmetric matrices, shape ``(..., n, n)``, on the device of ``C``.

    Raises:
        MetricError: If ``C`` is not square, or ``eps`` or ``p`` is not positive.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([16.0, 0.0])), p=4, eps=1e-4)
        tensor([[ 0.5000,  0.0000],
                [ 0.0000, 10.0000]])
    """
    C = as_float(C, name="C")
    if C.ndim < 2 or C.shape[-1] != C.shape[-2]:
        raise MetricError(f"C must have shape (..., n, n), got {tuple(C.shape)}")
    if not eps > 0:
        raise MetricError(f"eps must be positive, got {eps}; 1e-4 is a usual damping")
    order = torch.as_tensor(p, dtype=C.dtype, device=C.device)
    if not bool((order > 0).all()):
        raise MetricError(f"p must be positive, got {p}")
    check_finite(C, name="C")
    eigenvalues, V = _eigh(C)
    gain = eigenvalues.clamp_(min=0).add_(eps).pow_(-1 / order[..., None])
    return ((V * gain[..., None, :]) @ V.mT).to(C.dtype)


def _eigh(C: Tensor) -> tuple[Tensor, Tensor]:
    try:
        eigenvalues, V = torch.linalg.eigh(C)
    # torch documents the name without declaring it to type checkers.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Many repeated eigenvalues near zero (inputs that are always black) make
        # the float32 routine give up; the float64 one has digits to tell them apart.
        if C.dtype == torch.float64:
            raise
    else:
        if C.dtype == torch.float64 or bool(torch.isfinite(V.sum())):
            return eigenvalues, V
    wide: tuple[Tensor, Tensor] = torch.linalg.eigh(C.double())
    return wide
