"""The spectral engine: many feature matrices in, one decomposition per matrix size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_features, as_tensor
from repscope.errors import MetricError
from repscope.linalg.eigen import clip_rounding, eigvalsh
from repscope.linalg.moments import (
    Moments,
    degrees_of_freedom,
    deviations,
    rescaled,
)

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Eigenvalues of order one and the power of two that restores their scale.

    Attributes:
        name: What they belong to, for messages.
        scaled: Descending, non-negative float64, shape ``(..., d)``.
        exponent: True values are ``scaled * 4**exponent``; shape ``(...)``.
        constant: Where the matrix carries no information, shape ``(...)``.
        shape: ``(n, d)`` of the matrices behind them.
    """

    name: str
    scaled: Tensor
    exponent: Tensor
    constant: Tensor
    shape: tuple[int, int]

    def restored(self) -> Tensor:
        """Return the eigenvalues at their true scale.

        Raises:
            MetricError: If the largest one leaves the float64 range.
        """
        factor = torch.exp2(self.exponent)[..., None]
        # Twice the factor, because its square may overflow before the product does.
        values = self.scaled * factor * factor
        top, scaled_top = values[..., 0], self.scaled[..., 0]
        if bool((torch.isinf(top) | ((top == 0) & (scaled_top > 0))).any()):
            raise MetricError(
                f"the variances of {self.name} leave the float64 range; divide it by "
                f"its largest magnitude first (ranks and shares do not change)"
            )
        return values


def covariance_eigenvalues(
    Xs: Sequence[Any], *, names: Sequence[str], center: bool, ddof: int
) -> list[Eigenvalues]:
    """Return the eigenvalues of the covariance of each of many feature matrices.

    Args:
        Xs: Features, each ``(..., n_samples, n_features)``, or `Moments` of them.
        names: What to call each in a message.
        center: Subtract the mean of each feature.
        ddof: Delta degrees of freedom of the normalisation.

    Returns:
        One entry per input, in order, padded with exact zeros to ``n_features``.
    """
    parts = [
        (_of_moments if isinstance(X, Moments) else _condensed)(
            X, name=name, center=center, ddof=ddof
        )
        for X, name in zip(Xs, names, strict=True)
    ]
    same_size: dict[tuple[int, torch.device], list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        same_size[part.matrices.shape[-1], part.matrices.device].append(i)
    done: dict[int, Eigenvalues] = {}
    for members in same_size.values():
        values = eigvalsh(torch.cat([parts[i].matrices for i in members]))
        pieces = torch.split(values, [len(parts[i].matrices) for i in members])
        done |= {
            i: parts[i].finish(own) for i, own in zip(members, pieces, strict=True)
        }
    return [done[i] for i in range(len(parts))]


def squared_singular_values(W: Tensor, *, name: str) -> Eigenvalues:
    """Return the squared singular values of one matrix, padded to its columns.

    Args:
        W: Finite matrix, shape ``(n, d)``.
        name: What to call it in a message.

    Returns:
        Eigenvalues of ``W.mT @ W``; constant where ``W`` is all zero.
    """
    matrix, exponent = rescaled(W)
    values = torch.linalg.svdvals(matrix).square()
    zero = matrix.count_nonzero() == 0
    noise = (max(W.shape) * _EPS) ** 2
    scaled = _padded(_without_noise(values, noise), W.shape[-1])
    return Eigenvalues(name, scaled, exponent, zero, (W.shape[0], W.shape[1]))


@dataclass(frozen=True, eq=False)
class _Condensed:
    """The smaller of covariance and row Gram matrix: same non-zero eigenvalues."""

    name: str
    matrices: Tensor
    exponent: Tensor
    constant: Tensor
    shape: tuple[int, int]
    rank: int

    def finish(self, values: Tensor) -> Eigenvalues:
        """Clip, drop rounding noise and pad.

        Args:
            values: Eigenvalues of ``matrices``, shape ``(batch, size)``.

        Returns:
            Eigenvalues with the leading dimensions of the features.
        """
        values = clip_rounding(values, name=self.name)
        values = _without_noise(values, max(self.shape) * _EPS)
        values[..., self.rank :] = 0.0
        values = values.reshape(*self.constant.shape, -1)
        values = values.masked_fill(self.constant[..., None], 0.0)
        values = _padded(values, self.shape[1])
        return Eigenvalues(self.name, values, self.exponent, self.constant, self.shape)


def _condensed(value: Any, *, name: str, center: bool, ddof: int) -> _Condensed:
    raw = as_tensor(value)
    X = as_features(raw, name=name)
    n, d = X.shape[-2:]
    divisor = degrees_of_freedom(n, ddof=ddof)
    features, exponent = rescaled(X)
    rows = deviations(features, center=center)
    matrices = (rows @ rows.mT if n < d else rows.mT @ rows) / divisor
    if center:
        total = matrices.diagonal(dim1=-2, dim2=-1).sum(-1) * divisor / n
        constant = _is_constant(features, rows, total, resolution=_resolution(raw))
    else:
        constant = features.eq(0).all(-1).all(-1)
    size = min(n, d)
    matrices = matrices.reshape(-1, size, size)
    rank = min(n - center, d)
    return _Condensed(name, matrices, exponent, constant, (n, d), rank)


def _of_moments(moments: Moments, *, name: str, center: bool, ddof: int) -> _Condensed:
    n = moments.count
    divisor = degrees_of_freedom(n, ddof=ddof)
    C, mean = moments.covariance(ddof=0), moments.mean
    spread = C.diagonal().sqrt()
    if center:
        constant = (spread <= _EPS * mean.abs()).all()
        _, exponent = rescaled(spread[None])
    else:
        constant = (spread + mean.abs()).eq(0).all()
        _, exponent = rescaled(torch.stack([spread, mean]))
    factor = torch.exp2(-exponent)
    # Twice the factor, because its square may overflow before the product does.
    C = C * factor * factor
    if not center:
        C += torch.outer(mean * factor, mean * factor)
    d = len(mean)
    rank = min(n - center, d)
    matrices = (C * (n / divisor))[None]
    return _Condensed(name, matrices, exponent, constant, (n, d), rank)


def _is_constant(
    X: Tensor, rows: Tensor, total: Tensor, *, resolution: float
) -> Tensor:
    # No entry of X exceeds 1, so this much total variance settles it at once.
    varies = total > X.shape[-1] * resolution**2
    if bool(varies.all()):
        return ~varies
    # Feature by feature: a wide one must not hide a narrow one beside it.
    spread = rows.square().mean(-2).sqrt()
    return (spread <= resolution * X.abs().amax(-2)).all(-1)


def _resolution(raw: Tensor) -> float:
    return torch.finfo(raw.dtype).eps if raw.is_floating_point() else _EPS


def _without_noise(values: Tensor, cut: float) -> Tensor:
    return values.masked_fill(values <= cut * values[..., :1], 0.0)


def _padded(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))
