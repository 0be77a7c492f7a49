"""Means and covariances in float64, at once or streamed.

Features have shape ``(..., n_samples, n_features)``. Deviations are squared after the
mean is subtracted, never as ``E[xx] - E[x]E[x]``, whose cancellation leaves no correct
digit once the mean is large against the spread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from repscope._checks import as_features
from repscope.errors import MetricError, NotEnoughSamples

# Rows converted to float64 at a time: bounds the copy, keeps the GEMM efficient.
_BLOCK_ROWS = 8192


def covariance(X: Any, *, center: bool = True, ddof: int = 1) -> Tensor:
    r"""Return the covariance of the features.

    :math:`C = (X - \bar x)^\top (X - \bar x) / (n - \mathrm{ddof})`, computed in
    float64 in two passes. With ``center=False`` it is the second moment
    :math:`X^\top X / (n - \mathrm{ddof})`.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        center: Subtract the mean of each feature first.
        ddof: Delta degrees of freedom of the normalisation.

    Returns:
        Float64 tensor of shape ``(..., n_features, n_features)`` on the device of
        ``X``.

    Raises:
        MetricError: If the products leave the float64 range.

    Example:
        >>> covariance([[1.0, 0.0], [3.0, 4.0]])
        tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64)
    """
    features = as_features(X)
    divisor = degrees_of_freedom(features.shape[-2], ddof=ddof)
    rows = deviations(features.to(torch.float64), center=center)
    C = rows.mT @ rows / divisor
    if not bool(torch.isfinite(C).all()):
        raise MetricError(
            "the covariance of X leaves the float64 range; divide X by its largest "
            "magnitude first (ranks and shares do not change)"
        )
    return C


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


def deviations(X: Tensor, *, center: bool) -> Tensor:
    """Return ``X`` minus the mean of each feature, or ``X`` itself.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        center: Whether to subtract.

    Returns:
        A tensor of the same shape.
    """
    return X - X.mean(-2, keepdim=True) if center else X


def rescaled(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return each matrix in float64 with entries of order one, and its exponent.

    The scale is a power of two, so no digit is lost, and squares can neither
    overflow nor underflow.

    Args:
        X: Finite matrices, shape ``(..., n, d)``.

    Returns:
        ``X * 2**-exponent`` and ``exponent``, float64 of shape ``(...)``.
    """
    top = X.abs().amax((-2, -1)).to(torch.float64)
    # frexp of a subnormal reaches -1073, where 2**1073 would overflow.
    exponent = torch.frexp(top).exponent.clamp(min=-1000).to(torch.float64)
    return X.to(torch.float64) * torch.exp2(-exponent)[..., None, None], exponent


class _Sums(NamedTuple):
    """Count, mean (as origin + offset) and centred scatter of some rows."""

    n: int
    origin: Tensor
    offset: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor, origin: Tensor) -> _Sums:
        shifted = rows.to(torch.float64) - origin
        offset = shifted.mean(0)
        shifted -= offset
        return cls(len(rows), origin, offset, shifted.mT @ shifted)

    def __or__(self, other: _Sums) -> _Sums:
        # Chan, Golub and LeVeque (1983). Origins lie close together, so their
        # difference is exact where the difference of the means would cancel.
        n = self.n + other.n
        gap = (other.origin - self.origin) + (other.offset - self.offset)
        weight = other.n / n
        return _Sums(
            n,
            self.origin,
            self.offset + gap * weight,
            self.scatter + other.scatter + torch.outer(gap, gap) * (self.n * weight),
        )


class Moments:
    r"""Stream mean and covariance over blocks of rows, mergeable across workers.

    Blocks are shifted by the mean of the first one, summed in float64 and merged by
    :math:`S = S_a + S_b + \frac{n_a n_b}{n_a + n_b}\,\delta\delta^\top`, so the result
    does not depend on how the rows were cut, even when the mean is a million times
    the spread.

    References:
        Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance,
        The American Statistician 37(3).

    Example:
        >>> moments = Moments().update([[1.0, 0.0]]).update([[3.0, 4.0]])
        >>> moments.count, moments.mean.tolist()
        (2, [2.0, 2.0])
        >>> moments.covariance().tolist()
        [[2.0, 4.0], [4.0, 8.0]]
    """

    def __init__(self) -> None:
        self._sums: _Sums | None = None

    def __repr__(self) -> str:
        width = None if self._sums is None else len(self._sums.origin)
        return f"Moments(count={self.count}, n_features={width})"

    def update(self, X: Any) -> Moments:
        """Take in more rows.

        Args:
            X: Features, shape ``(n_samples, n_features)``; no rows is no change.

        Returns:
            Itself, so that calls chain.

        Raises:
            MetricError: If ``X`` is not a matrix.
        """
        rows = as_features(X, minimum=0)
        if rows.ndim != 2:
            raise MetricError(
                f"Moments.update takes (n_samples, n_features), got "
                f"{tuple(rows.shape)}; flatten the leading dimensions first"
            )
        sums = self._sums
        for block in torch.split(rows, _BLOCK_ROWS) if len(rows) else ():
            origin = block.mean(0, dtype=torch.float64) if sums is None else sums.origin
            self._check_width(len(origin), rows.shape[1])
            fresh = _Sums.of(block, origin)
            sums = fresh if sums is None else sums | fresh
        self._accept(sums)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in the rows another ``Moments`` has seen; the other stays as it is.

        Args:
            other: Moments over the same features.

        Returns:
            Itself, so that calls chain.
        """
        if other._sums is None:
            return self
        if self._sums is None:
            self._sums = other._sums
            return self
        self._check_width(len(self._sums.origin), len(other._sums.origin))
        self._accept(self._sums | other._sums)
        return self

    @property
    def count(self) -> int:
        """Rows seen."""
        return 0 if self._sums is None else self._sums.n

    @property
    def mean(self) -> Tensor:
        """Mean of each feature, float64, shape ``(n_features,)``."""
        sums = self._seen()
        return sums.origin + sums.offset

    def covariance(self, *, ddof: int = 1) -> Tensor:
        """Return the covariance of all rows seen.

        Args:
            ddof: Delta degrees of freedom of the normalisation.

        Returns:
            Float64 tensor of shape ``(n_features, n_features)``.
        """
        sums = self._seen()
        return sums.scatter / degrees_of_freedom(sums.n, ddof=ddof)

    def _seen(self) -> _Sums:
        if self._sums is None:
            raise NotEnoughSamples("these Moments have seen no rows; call update first")
        return self._sums

    def _accept(self, sums: _Sums | None) -> None:
        # A finite diagonal bounds every entry of a scatter matrix.
        if sums is not None and not bool(torch.isfinite(sums.scatter.diagonal()).all()):
            raise MetricError(
                "the squared deviations leave the float64 range; divide the features "
                "by a common scale first"
            )
        self._sums = sums

    @staticmethod
    def _check_width(ours: int, theirs: int) -> None:
        if ours != theirs:
            raise MetricError(
                f"these Moments have {ours} features, the new rows {theirs}"
            )
