"""Covariances and row Gram matrices: symmetric products, added up in float64.

Features have shape ``(..., n_samples, n_features)``. Deviations are multiplied after a
mean is subtracted, never as ``E[xx] - E[x]E[x]``, whose cancellation leaves no correct
digit once the mean is large against the spread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repscope._checks import as_features, is_finite
from repscope.errors import MetricError, NotEnoughSamples, UsageError
from repscope.linalg.threads import blas_threads

# Of one block of rows (or of columns, for a Gram matrix). In float32 a product has to
# be long before adding it up in float64 is cheap beside it; in float64 a block should
# stay in the caches.
_BLOCK_BYTES = {torch.float32: 2**25, torch.float64: 2**23}
_BLOCK_LEAST = 1024


def covariance(
    X: Any, *, center: bool = True, ddof: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    r"""Return the covariance of the features.

    :math:`C = (X - \bar x)^\top (X - \bar x) / (n - \mathrm{ddof})`; with
    ``center=False`` the second moment :math:`X^\top X / (n - \mathrm{ddof})`.

    Blocks of rows are shifted by the mean of the first one and multiplied in ``dtype``;
    products are added up in float64.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        center: Subtract the mean of each feature first.
        ddof: Delta degrees of freedom of the normalisation.
        dtype: Float32 takes half the time. Entries are then right to about 3e-6 of
            :math:`\sqrt{C_{ii} C_{jj}}` whatever the mean, and eigenvalues below 1e-6
            of the largest are lost.

    Returns:
        Tensor of that dtype and of shape ``(..., n_features, n_features)`` on the
        device of ``X``.

    Raises:
        MetricError: If the products leave the range of the dtype.
        UsageError: If ``dtype`` is neither float64 nor float32.

    References:
        Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance,
        The American Statistician 37(3).

    Example:
        >>> covariance([[1.0, 0.0], [3.0, 4.0]])
        tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64)
    """
    if dtype not in (torch.float64, torch.float32):
        raise UsageError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
    features = as_features(X)
    n, d = features.shape[-2:]
    divisor = degrees_of_freedom(n, ddof=ddof)
    rows = features.reshape(-1, n, d)
    exponent = scale_exponent(largest(rows), dtype)
    if exponent is not None:
        rows = in_scale(rows, exponent)
    C = scatter(rows, center=center, dtype=dtype).div_(divisor)
    if exponent is not None:
        # Twice the factor, because its square may overflow before the product does.
        factor = torch.exp2(exponent)[:, None, None]
        C = C.mul_(factor).mul_(factor)
        if not is_finite(C):
            raise MetricError(
                f"the covariance of X leaves the {str(dtype)[6:]} range; divide X by "
                f"its largest magnitude first (ranks and shares do not change)"
            )
    return C.reshape(*features.shape[:-2], d, d)


def degrees_of_freedom(n_samples: int, *, ddof: int) -> int:
    """Return ``n_samples - ddof``, refusing samples too few for a covariance.

    Args:
        n_samples: Rows.
        ddof: Delta degrees of freedom.

    Returns:
        A positive divisor.

    Raises:
        NotEnoughSamples: If there are fewer than 2 samples, or no more than ``ddof``.
    """
    needed = max(2, ddof + 1)
    if n_samples < needed:
        raise NotEnoughSamples(
            f"a covariance with ddof={ddof} needs at least {needed} samples, "
            f"got {n_samples}"
        )
    return n_samples - ddof


def scatter(
    X: Tensor, *, center: bool, dtype: torch.dtype, overwrite: bool = False
) -> Tensor:
    """Return the sum of the outer products of the (centred) rows of each matrix.

    Args:
        X: Finite real matrices, shape ``(batch, n, d)``, whose squares stay within
            the range of ``dtype``.
        center: Subtract the mean of each column.
        dtype: Float32 or float64, in which they are multiplied.
        overwrite: ``X`` may be changed, which spares memory.

    Returns:
        Shape ``(batch, d, d)`` of that dtype, on the device of ``X``.
    """
    blocks = _blocks(X, along=-2, dtype=dtype)
    if not center:
        return _around(blocks, X.new_zeros(1, dtype=dtype))[1].to(dtype)
    n, origin = X.shape[-2], blocks[0].mean(-2, keepdim=True).to(dtype)
    if len(blocks) == 1:
        reused = overwrite and X.dtype == dtype
        rows = _shifted(X, origin, overwrite=overwrite)
        once = _product(rows, transposed=False)
        missing = n * _off_mean(origin, X.dtype).square()
        if bool((missing <= _noise(dtype) * once.diagonal(dim1=-2, dim2=-1)).all()):
            return once
        total, found = _column_sums(rows), once.to(torch.float64)
        if reused:
            blocks, origin = (rows,), torch.zeros_like(origin)
    else:
        total, found = _around(blocks, origin)
    if bool((2 * total.square() > n * found.diagonal(dim1=-2, dim2=-1)).any()):
        # The first block was not like the rest: a better origin, before digits are
        # lost in the difference.
        total, found = _around(blocks, origin + (total / n).to(dtype)[:, None, :])
    found.baddbmm_(total[:, :, None], (total / n)[:, None, :], alpha=-1)
    return found.to(dtype)


def gram(
    X: Tensor, *, center: bool, dtype: torch.dtype, overwrite: bool = False
) -> Tensor:
    """Return the inner products between the (centred) rows of each matrix.

    Args:
        X: As for `scatter`.
        center: Subtract the mean of each column.
        dtype: Float32 or float64, in which they are multiplied.
        overwrite: ``X`` may be changed, which spares memory.

    Returns:
        Shape ``(batch, n, n)`` of that dtype, with the non-zero eigenvalues of
        `scatter`.
    """
    n, none = X.shape[-2], X.new_zeros(1, 1, 1)
    blocks = _blocks(X, along=-1, dtype=dtype)
    means = (one.mean(-2, keepdim=True) if center else none for one in blocks)
    origins = [mean.to(dtype) for mean in means]
    products = (
        _product(_shifted(block, origin, overwrite=overwrite), transposed=True)
        for block, origin in zip(blocks, origins, strict=True)
    )
    found = next(products)
    for product in products:
        found = found.to(torch.float64).add_(product)
    off = sum(_off_mean(origin, X.dtype).square().sum(-1) for origin in origins)
    # The largest eigenvalue is at least the n-th part of the trace.
    least = found.diagonal(dim1=-2, dim2=-1).sum(-1) / n
    if bool((n * off > _noise(dtype) * least).any()):
        found = found.to(torch.float64)
        found -= found.mean(-1, keepdim=True)
        found -= found.mean(-2, keepdim=True)
    return found.to(dtype)


def largest(X: Tensor) -> Tensor:
    """Return the largest magnitude in each matrix, in one pass and without a copy.

    Args:
        X: Finite matrices, shape ``(..., n, d)``.

    Returns:
        Float64, shape ``(...)``.
    """
    return torch.maximum(X.amax((-2, -1)), -X.amin((-2, -1))).to(torch.float64)


def scale_exponent(top: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the power of two by which to divide each matrix before it is squared.

    Args:
        top: Its largest magnitude, float64, shape ``(batch,)``.
        dtype: In which it will be multiplied.

    Returns:
        Float64, shape ``(batch,)``, 0 where squares are safe as they are; None if
        they are in all of them.
    """
    safe = 40 if dtype == torch.float32 else 300
    least, most = (float(bound) for bound in torch.aminmax(top))
    if 2.0**-safe < least and most < 2.0 ** (safe - 1):
        return None
    exponent = _power_of_two(top)
    return torch.where((exponent.abs() < safe) | (top == 0), 0.0, exponent)


def in_scale(X: Tensor, exponent: Tensor) -> Tensor:
    """Return each matrix divided by its power of two, exactly.

    Args:
        X: Shape ``(batch, n, d)``.
        exponent: Shape ``(batch,)``.

    Returns:
        The same dtype.
    """
    # 2**-exponent may leave the range of float32 where the quotient does not.
    return (X.to(torch.float64) * torch.exp2(-exponent)[:, None, None]).to(X.dtype)


def rescaled(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return each matrix in float64 with entries of order one, and its exponent.

    The scale is a power of two, so no digit is lost, and squares can neither
    overflow nor underflow.

    Args:
        X: Finite matrices, shape ``(..., n, d)``.

    Returns:
        ``X * 2**-exponent`` and ``exponent``, float64 of shape ``(...)``.
    """
    exponent = _power_of_two(largest(X))
    return X.to(torch.float64) * torch.exp2(-exponent)[..., None, None], exponent


def multiply_transposed(rows: Tensor) -> Tensor:
    """Return ``rows.mT @ rows``; numpy's product of both halves the work on a CPU.

    Args:
        rows: Shape ``(..., n, d)``.

    Returns:
        Shape ``(..., d, d)``, exactly symmetric on a CPU.
    """
    return _product(rows, transposed=False)


def _power_of_two(top: Tensor) -> Tensor:
    # frexp of a subnormal reaches -1073, where 2**1073 would overflow.
    return torch.frexp(top).exponent.clamp(min=-1000).to(torch.float64)


def _around(blocks: tuple[Tensor, ...], origin: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums and products of the rows less the origin, in float64."""
    batch, longest, d = blocks[0].shape
    total = origin.new_zeros(batch, d, dtype=torch.float64)
    found = origin.new_zeros(batch, d, d, dtype=torch.float64)
    # Fresh memory for every block would cost as much as its product.
    memory, product = origin.new_empty(batch, longest, d), origin.new_empty(batch, d, d)
    for block in blocks:
        rows = torch.sub(block, origin, out=memory[:, : block.shape[-2]])
        total += _column_sums(rows)
        found += _product(rows, transposed=False, out=product)
    return total, found


def _shifted(X: Tensor, origin: Tensor, *, overwrite: bool) -> Tensor:
    """Return ``X - origin`` in the dtype of the origin, rounded once."""
    reused = overwrite and X.dtype == origin.dtype
    memory = X if reused else torch.empty_like(X, dtype=origin.dtype)
    return torch.sub(X, origin, out=memory)


def _off_mean(origin: Tensor, summed_in: torch.dtype) -> Tensor:
    """Return how far at most the mean of the columns is from their rounded mean."""
    coarser = max(torch.finfo(summed_in).eps, torch.finfo(origin.dtype).eps)
    return 16 * coarser * origin[:, 0]


def _noise(dtype: torch.dtype) -> float:
    """Return the relative error that a product has anyway."""
    return torch.finfo(dtype).eps / 4


def _blocks(X: Tensor, *, along: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # A row (or column) of every matrix of the batch, in the dtype it is multiplied in.
    one = X.numel() // X.shape[along] * dtype.itemsize
    length = max(_BLOCK_LEAST, _BLOCK_BYTES[dtype] // one)
    return torch.split(X, length, dim=along)


def _column_sums(rows: Tensor) -> Tensor:
    """Return the sums over the rows, float64: a product sums in several strands."""
    if not rows.is_cpu:  # where a product may be in TF32
        return rows.sum(-2, dtype=torch.float64)
    ones = rows.new_ones(1, rows.shape[-2])
    return (ones @ rows)[..., 0, :].to(torch.float64)


def _product(rows: Tensor, *, transposed: bool, out: Tensor | None = None) -> Tensor:
    left, right = (rows, rows.mT) if transposed else (rows.mT, rows)
    if not rows.is_cpu:
        with _no_tf32():
            return torch.matmul(left, right, out=out)
    memory = None if out is None else out.numpy()
    with blas_threads(), np.errstate(all="ignore"):  # overflow is infinite, as in torch
        product = np.matmul(left.numpy(), right.numpy(), out=memory)
    return torch.from_numpy(product)


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """Multiply in full float32 on CUDA, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
