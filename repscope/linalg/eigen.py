"""Eigenvalues of batches of symmetric matrices, largest first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_float, check_finite
from repscope.errors import MetricError, NotPositiveSemidefinite

# Rounding in a float32 covariance stays far below, a matrix of features far above.
_ASYMMETRY = 1e-4


def eigvalsh(C: Any) -> Tensor:
    r"""Return the eigenvalues of symmetric matrices in descending order.

    The symmetric part :math:`(C + C^\top)/2` is decomposed. Values are not clipped: a
    Hessian may be indefinite. ``spectrum`` clips, because a covariance may not.

    Args:
        C: Symmetric matrices, shape ``(..., n, n)``.

    Returns:
        Shape ``(..., n)``, descending; float32 stays float32, all else is float64.

    Example:
        >>> eigvalsh([[2.0, 1.0], [1.0, 2.0]])
        tensor([3., 1.], dtype=torch.float64)
    """
    matrices = as_float(C, name="C")
    _check_square(matrices)
    check_finite(matrices, name="C")
    gap = matrices - matrices.mT
    _check_symmetric(matrices, gap)
    return _ascending(torch.add(matrices, gap, alpha=-0.5)).flip(-1)


def _ascending(symmetric: Tensor) -> Tensor:
    try:
        values: Tensor = torch.linalg.eigvalsh(symmetric)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in its stub
        if symmetric.dtype == torch.float64:
            raise
        # Many equal eigenvalues near zero make float32 LAPACK give up.
        values = torch.linalg.eigvalsh(symmetric.to(torch.float64))
    return values.to(symmetric.dtype)


def _check_square(C: Tensor) -> None:
    if C.ndim < 2 or C.shape[-1] != C.shape[-2]:
        raise MetricError(
            f"C must have shape (..., n, n), got {tuple(C.shape)}; for features of "
            f"shape (..., n_samples, n_features) call covariance(X) first"
        )
    if C.numel() == 0:
        raise MetricError(f"C is empty: shape {tuple(C.shape)}")


def _check_symmetric(C: Tensor, gap: Tensor) -> None:
    ratio = gap.amax((-2, -1)) / C.abs().amax((-2, -1))
    # 0/0, a matrix of zeros, compares as symmetric.
    if bool((ratio > _ASYMMETRY).any()):
        worst = float(ratio.nan_to_num(nan=0.0).max())
        raise MetricError(
            f"C is not symmetric: |C - C^T| reaches {worst:.3g} of its largest entry; "
            f"for features call covariance(X) first"
        )


def clip_rounding(values: Tensor, *, name: str) -> Tensor:
    """Return ``values`` with negative rounding errors set to zero.

    Args:
        values: Eigenvalues that cannot be negative, shape ``(..., k)``.
        name: What they belong to, for the message.

    Returns:
        The same values, none below 0.

    Raises:
        NotPositiveSemidefinite: If one is further below 0 than rounding explains.
    """
    tolerance = torch.finfo(values.dtype).eps ** 0.5
    low, top = values.amin(-1), values.abs().amax(-1)
    if bool((low < -tolerance * top).any()):
        raise NotPositiveSemidefinite(
            f"{name} has an eigenvalue of {float(low.min()):.3g} (largest magnitude "
            f"{float(top.max()):.3g}), but a covariance has none below 0; these may be "
            f"features, loadings or the spectrum of a Hessian"
        )
    return values.clamp(min=0)
