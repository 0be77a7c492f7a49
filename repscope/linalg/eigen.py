"""Eigenvalues of batches of symmetric matrices, largest first."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from repscope._checks import as_float, check_choice, check_finite, is_finite
from repscope.errors import (
    MetricError,
    NotPositiveSemidefinite,
    UsageError,
)
from repscope.linalg import choice
from repscope.linalg.routes import Unavailable

Backend = Literal["auto", "torch", "scipy", "numpy", "cusolver", "cupy", "triton"]

# Rounding in a float32 covariance stays far below, a matrix of features far above.
_ASYMMETRY = 1e-4
# Decomposed at a time: a group is checked while it is in a cache, and bounds what is
# allocated beside the input, however large the batch.
_GROUP_BYTES = {"cpu": 2**20, "cuda": 2**28}
_TILE = 128

_told: set[str] = set()


def eigvalsh(C: Any, *, backend: Backend = "auto") -> Tensor:
    r"""Return the eigenvalues of symmetric matrices in descending order.

    The symmetric part :math:`(C + C^\top)/2` is decomposed. Values are not clipped: a
    Hessian may be indefinite. ``spectrum`` clips, because a covariance may not. A batch
    is taken in groups of some megabytes, so it may be larger than the memory that is
    left (an expanded tensor, a mapped file).

    Args:
        C: Symmetric matrices, shape ``(..., n, n)``.
        backend: ``"torch"``, ``"numpy"`` and ``"scipy"`` name LAPACKs on the CPU
            (torch also computes on CUDA); ``"cusolver"``, ``"cupy"`` and
            ``"triton"`` (n up to 128; nobody has measured it) routes on CUDA.
            ``"auto"`` takes the fastest for the size, dtype and device, and the next
            one if it fails, which is said once.

    Returns:
        Shape ``(..., n)``, descending, on the device of ``C``; float32 stays float32,
        with an error of at most about :math:`\sqrt n\,\epsilon` of the largest
        magnitude; all else is float64.

    Raises:
        UsageError: If the named backend cannot serve these matrices here.
        MetricError: If every route gives up.

    Example:
        >>> eigvalsh([[2.0, 1.0], [1.0, 2.0]])
        tensor([3., 1.], dtype=torch.float64)
    """  # noqa: DOC502 - raised where the routes are tried
    check_choice(backend, ("auto", *choice.ROUTES), name="backend")
    matrices = as_float(C, name="C")
    _check_square(matrices)
    n = matrices.shape[-1]
    flat = matrices.reshape(-1, n, n)
    values = []
    for group in torch.split(flat, _group_length(flat)):
        if not is_finite(group):
            check_finite(matrices, name="C")
        values.append(decompose(_symmetrised(group), backend=backend))
    return torch.cat(values).reshape(matrices.shape[:-1])


def decompose(C: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return eigenvalues of matrices that are known to be symmetric and finite.

    Args:
        C: Shape ``(batch, n, n)``, contiguous; it is left as it is.
        backend: As for `eigvalsh`.

    Returns:
        Shape ``(batch, n)``, descending.

    Raises:
        UsageError: If the named backend cannot serve these matrices here.
        MetricError: If every route gives up.
    """
    if backend != "auto":
        try:
            return choice.ROUTES[backend](C).flip(-1)
        except Unavailable as why:
            raise UsageError(f"backend={backend!r} cannot do this here: {why}") from why
    last = ""
    for name in choice.order(C):
        try:
            return choice.ROUTES[name](C).flip(-1)
        except Unavailable as why:
            _say_once(name, last := str(why))
    if C.dtype != torch.float64:
        # Many equal eigenvalues near zero make float32 routines give up.
        return decompose(C.to(torch.float64)).to(C.dtype)
    raise MetricError(
        f"no route could decompose these {len(C)} matrices of shape "
        f"{tuple(C.shape[1:])} ({C.dtype}, {C.device}): {last}"
    )


def _say_once(name: str, why: str) -> None:
    if name in _told:
        return
    _told.add(name)
    warnings.warn(
        f"eigenvalues by {name} were not to be had, another route is taken "
        f"from now on without a word: {why}",
        RuntimeWarning,
        stacklevel=4,
    )


def _group_length(C: Tensor) -> int:
    n = C.shape[-1]
    room = _GROUP_BYTES["cpu" if C.is_cpu else "cuda"]
    return max(1, room // (n * n * C.element_size()))


def _symmetrised(C: Tensor) -> Tensor:
    if _is_symmetric(C):
        return C.contiguous()
    gap = C - C.mT
    _check_symmetric(C, gap)
    return C - gap / 2


def _is_symmetric(C: Tensor) -> bool:
    """Return whether every entry has its equal, in tiles that a cache holds."""
    for start in range(0, C.shape[-1], _TILE):
        stop = start + _TILE
        on_diagonal = C[:, start:stop, start:stop]
        if bool((on_diagonal - on_diagonal.mT).amax() > 0):
            return False
        if not torch.equal(C[:, start:stop, stop:], C[:, stop:, start:stop].mT):
            return False
    return True


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
