r"""Eigenvalues by tridiagonalisation and bisection, in plain torch operations.

The readable twin of ``triton_kernels``: the same steps in the same order, with which
the kernels are compared. A matrix is scaled by a power of two and made tridiagonal by
reflections :math:`I - \beta v v^\top` (Householder 1958). The number of eigenvalues
below :math:`x` is the number of negative pivots of :math:`T - x I = L D L^\top`
(Sturm), which halves an interval for each eigenvalue until rounding decides (Barth,
Martin and Wilkinson 1967).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repscope.linalg.routes import Unavailable


def eigenvalues(C: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices in ascending order.

    Args:
        C: Symmetric finite matrices, shape ``(batch, n, n)``, contiguous, float32 or
            float64.

    Returns:
        Shape ``(batch, n)``, ascending, of the dtype and on the device of ``C``.
    """
    scale, d, e = tridiagonalise(C)
    return bisect(d, e) * scale[:, None]


def steps(dtype: torch.dtype) -> int:
    r"""Return how often to halve an interval for an error that rounding hides.

    Rows of a tridiagonal matrix have at most three entries, none larger than
    :math:`|w|_{\max}`, so Gershgorin's radius is at most :math:`3 |w|_{\max}`.

    Args:
        dtype: A real dtype.

    Returns:
        s with :math:`3 \cdot 2^{-s} < \epsilon / 8`.
    """
    return 5 - round(math.log2(torch.finfo(dtype).eps))


def floor(dtype: torch.dtype) -> float:
    r"""Return what counts as zero in a matrix whose largest entry is between 1 and 2.

    Args:
        dtype: A real dtype.

    Returns:
        :math:`\epsilon^2`: far below rounding, and a square of it does not underflow.

    Raises:
        Unavailable: If there is no kernel for the dtype.
    """
    if dtype not in (torch.float32, torch.float64):
        raise Unavailable(f"float32 and float64 are served, not {dtype}")
    return torch.finfo(dtype).eps ** 2


def tridiagonalise(C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a tridiagonal matrix with the eigenvalues of ``C / scale``, for each.

    Args:
        C: As for `eigenvalues`.

    Returns:
        The scale, shape ``(batch,)``, the diagonal, shape ``(batch, n)``, and beside it
        ``e[:, k]`` at ``(k, k + 1)``, shape ``(batch, n)``, of which the last is 0.
    """
    zero = floor(C.dtype)
    scale = _power_of_two(C.abs().amax((-2, -1)))
    A = C / scale[:, None, None]
    d, e = A.diagonal(dim1=-2, dim2=-1).clone(), torch.zeros_like(A[:, 0])
    for k in range(C.shape[-1] - 1):
        x = A[:, k + 1 :, k]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # Of the sign of x[0]: nothing cancels in v.
        sign = torch.ones_like(norm).copysign(x[:, :1])
        v = x / norm
        v[:, :1] += sign
        v = torch.where(norm > zero, v, 0)
        beta = torch.where(norm > zero, 1 / v[:, :1].abs(), 0)  # 2 / (v . v)
        e[:, k] = torch.where(norm > zero, -sign * norm, 0)[:, 0]
        B = A[:, k + 1 :, k + 1 :]
        p = beta * (B @ v[:, :, None])[:, :, 0]
        q = p - beta / 2 * (p * v).sum(-1, keepdim=True) * v
        B -= v[:, :, None] * q[:, None] + q[:, :, None] * v[:, None]
        d[:, k + 1] = B[:, 0, 0]
    return scale, d, e


def bisect(d: Tensor, e: Tensor) -> Tensor:
    """Return the eigenvalues of tridiagonal matrices in ascending order.

    Args:
        d: The diagonal, shape ``(batch, n)``; the largest entry is about 1.
        e: Beside it, shape ``(batch, n)``, of which the last is 0.

    Returns:
        Shape ``(batch, n)``. Ascending even where rounding makes a count fall: lanes
        have the same interval until they part, and part in order.
    """
    index = torch.arange(d.shape[-1], device=d.device)
    radius = (d.abs() + e.abs() + e.roll(1, -1).abs()).amax(-1, keepdim=True)
    low, high = -radius.expand_as(d), radius.expand_as(d)
    for _ in range(steps(d.dtype)):
        x = (low + high) / 2
        right = count_below(d, e, x) <= index
        low, high = torch.where(right, x, low), torch.where(right, high, x)
    return (low + high) / 2


def count_below(d: Tensor, e: Tensor, x: Tensor) -> Tensor:
    """Return how many eigenvalues of a tridiagonal matrix are below each ``x``.

    Args:
        d: As for `bisect`.
        e: As for `bisect`.
        x: Shape ``(batch, m)``.

    Returns:
        Shape ``(batch, m)``, integers.
    """
    zero = floor(d.dtype)
    pivot = d[:, :1] - x
    below = torch.zeros_like(pivot, dtype=torch.int64)
    for k in range(d.shape[-1]):
        if k:
            pivot = d[:, k : k + 1] - x - e[:, k - 1 : k] ** 2 / pivot
        # Counted as it is divided by: moves the diagonal by less than rounding did
        # (Demmel, Dhillon and Ren 1995), and the division does not overflow.
        pivot = torch.where(pivot.abs() < zero, -zero, pivot)
        below += pivot < 0
    return below


def _power_of_two(largest: Tensor) -> Tensor:
    # Neither it nor 1 over it leaves the normal numbers.
    tiny = torch.finfo(largest.dtype).tiny
    _, exponent = torch.frexp(largest)
    power = torch.ldexp(torch.ones_like(largest), exponent - 1)
    return torch.where(largest > 0, power, tiny).clamp(tiny, 1 / tiny)
