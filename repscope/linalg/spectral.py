"""The spectral engine: many feature matrices in, one decomposition per matrix size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from repscope._checks import as_features, as_tensor, check_choice
from repscope.errors import MetricError
from repscope.linalg.covariance import (
    degrees_of_freedom,
    gram,
    in_scale,
    largest,
    rescaled,
    scale_exponent,
    scatter,
)
from repscope.linalg.eigen import clip_rounding, decompose
from repscope.linalg.moments import Moments

Accuracy = Literal["eigenvalues", "ranks"]

_EPS = torch.finfo(torch.float64).eps
_EPS_SINGLE = torch.finfo(torch.float32).eps
# Relative error of an effective rank that is not worth the digits of float64.
_RANK_ERROR = 1e-5


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
    Xs: Sequence[Any],
    *,
    names: Sequence[str],
    center: bool,
    ddof: int,
    accuracy: Accuracy = "eigenvalues",
) -> list[Eigenvalues]:
    """Return the eigenvalues of the covariance of each of many feature matrices.

    Args:
        Xs: Features, each ``(..., n_samples, n_features)``, or `Moments` of them.
        names: What to call each in a message.
        center: Subtract the mean of each feature.
        ddof: Delta degrees of freedom of the normalisation.
        accuracy: ``"ranks"`` computes in float32 where the data are no more than that
            and the spectrum does not reach down to where float32 rounds.

    Returns:
        One entry per input, in order, padded with exact zeros to ``n_features``.
    """
    check_choice(accuracy, get_args(Accuracy), name="accuracy")
    parts = [
        _of_moments(X, name=name, center=center, ddof=ddof)
        if isinstance(X, Moments)
        else _condensed(X, name, center, ddof, quick=accuracy == "ranks")
        for X, name in zip(Xs, names, strict=True)
    ]
    values = _decomposed(parts)
    again = [
        i
        for i, (part, own) in enumerate(zip(parts, values, strict=True))
        if part.matrices.dtype == torch.float32 and _is_rounding(part, own)
    ]
    for i in again:
        parts[i] = _condensed(Xs[i], names[i], center, ddof, quick=False)
    for i, own in zip(again, _decomposed([parts[i] for i in again]), strict=True):
        values[i] = own
    return [part.finish(own) for part, own in zip(parts, values, strict=True)]


def _decomposed(parts: Sequence[_Condensed]) -> list[Tensor]:
    """Return the eigenvalues of each part, those of one size together."""
    same_size: dict[Any, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        matrices = part.matrices
        same_size[matrices.shape[-1], matrices.dtype, matrices.device].append(i)
    done: dict[int, Tensor] = {}
    for members in same_size.values():
        together = torch.cat([parts[i].matrices for i in members])
        pieces = torch.split(
            decompose(together), [len(parts[i].matrices) for i in members]
        )
        done |= dict(zip(members, pieces, strict=True))
    return [done[i] for i in range(len(parts))]


def _is_rounding(part: _Condensed, values: Tensor) -> bool:
    """Return whether more of a spectrum is float32 rounding than ranks bear.

    A value below ``noise * top`` can be anything up to that. As a share ``p`` it moves
    the entropy by ``-p log p`` at most, and the effective rank by as much, relatively.
    """
    size = values.shape[-1]
    noise = size**0.5 * _EPS_SINGLE
    # A unit that is always zero has an eigenvalue of exactly zero.
    live = (part.matrices.diagonal(dim1=-2, dim2=-1) > 0).sum(-1)
    doubtful = live.clamp(max=part.rank) - (values > noise * values[..., :1]).sum(-1)
    share = noise * values[..., 0] / values.sum(-1)
    return bool((-doubtful * torch.xlogy(share, share) > _RANK_ERROR).any())


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
        single = values.dtype == torch.float32
        cut = (
            values.shape[-1] ** 0.5 * _EPS_SINGLE if single else max(self.shape) * _EPS
        )
        values = _without_noise(values.to(torch.float64), cut)
        values[..., self.rank :] = 0.0
        values = values.reshape(*self.constant.shape, -1)
        values = values.masked_fill(self.constant[..., None], 0.0)
        values = _padded(values, self.shape[1])
        return Eigenvalues(self.name, values, self.exponent, self.constant, self.shape)


def _condensed(
    value: Any, name: str, center: bool, ddof: int, *, quick: bool
) -> _Condensed:
    raw = as_tensor(value)
    X = as_features(raw, name=name)
    lead, (n, d) = X.shape[:-2], X.shape[-2:]
    divisor = degrees_of_freedom(n, ddof=ddof)
    single = raw.dtype in (torch.float32, torch.float16, torch.bfloat16)
    dtype = torch.float32 if quick and single else torch.float64
    rows = X.reshape(-1, n, d)
    top = largest(rows)
    exponent = scale_exponent(top, dtype)
    rows, top = in_scale(rows, exponent), top * torch.exp2(-exponent)
    matrices = (gram if n < d else scatter)(rows, center=center, dtype=dtype) / divisor
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    total = diagonal.sum(-1) * divisor / n
    constant = total <= d * (_resolution(raw) * top).square() if center else top == 0
    if center and bool(constant.any()):
        if dtype == torch.float32:
            return _condensed(value, name, center, ddof, quick=False)
        constant &= _is_constant(rows.double(), resolution=_resolution(raw))
    return _Condensed(
        name=name,
        matrices=matrices.to(dtype),
        exponent=exponent.reshape(lead),
        constant=constant.reshape(lead),
        shape=(n, d),
        rank=min(n - center, d),
    )


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


def _is_constant(X: Tensor, *, resolution: float) -> Tensor:
    # Feature by feature: a wide one must not hide a narrow one beside it.
    spread = (X - X.mean(-2, keepdim=True)).square().mean(-2).sqrt()
    return (spread <= resolution * X.abs().amax(-2)).all(-1)


def _resolution(raw: Tensor) -> float:
    return torch.finfo(raw.dtype).eps if raw.is_floating_point() else _EPS


def _without_noise(values: Tensor, cut: float) -> Tensor:
    return values.masked_fill(values <= cut * values[..., :1], 0.0)


def _padded(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))
