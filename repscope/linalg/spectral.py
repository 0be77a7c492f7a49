"""The spectral engine: many feature matrices in, one decomposition per matrix size.

Stacks of matrices pass through in rounds of some megabytes: the memory taken does not
grow with their number.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from repscope._checks import check_choice
from repscope.errors import MetricError
from repscope.linalg.condensed import (
    Condensed,
    How,
    as_inputs,
    condensed,
    exactly,
    limit,
)
from repscope.linalg.covariance import rescaled
from repscope.linalg.eigen import clip_rounding, decompose

Accuracy = Literal["eigenvalues", "ranks"]
# A row (or a number) and two numbers for each matrix of a stack, or of an input.
Results = tuple[Tensor, Tensor, Tensor]
Found = dict[int, list[Results]]

_EPS = torch.finfo(torch.float64).eps
_EPS_SINGLE = torch.finfo(torch.float32).eps
# Relative error of an effective rank that is not worth the digits of float64.
_RANK_ERROR = 1e-5
# Bytes of symmetric matrices in a round; on a CPU, longer ones gain nothing.
_ROUND_BYTES = {"cpu": 2**20, "cuda": 2**28}
# Sizes that are padded to the largest of them and decomposed together. One after the
# other, as on a CPU, the padding would only be work.
_SIZES_WITHIN = {"cpu": 1.0, "cuda": 1.1}


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Eigenvalues, and what is read from them before they are given their scale.

    Attributes:
        values: Descending, non-negative float64, shape ``(..., d)``.
        effective_rank: Of shares that no sum has taken out of the float64 range,
            shape ``(...)``.
        constant: Where the matrix carries no information, shape ``(...)``.
        shape: ``(n, d)`` of the matrices behind them.
    """

    values: Tensor
    effective_rank: Tensor
    constant: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Invariants:
    """What a covariance says of its eigenvalues before they are known.

    Attributes:
        trace: Their sum, float64, shape ``(...)``.
        participation_ratio: ``trace**2`` over the sum of their squares; 0 where the
            matrix carries no information.
        constant: Where it does not, shape ``(...)``.
        shape: ``(n, d)`` of the matrices behind them.
    """

    trace: Tensor
    participation_ratio: Tensor
    constant: Tensor
    shape: tuple[int, int]

    @property
    def n_samples(self) -> int:
        """Rows that went in."""
        return self.shape[0]

    @property
    def n_features(self) -> int:
        """Columns."""
        return self.shape[1]

    @property
    def degenerate(self) -> str | None:
        """As for a `Spectrum`."""
        return "constant" if bool(self.constant.any()) else None


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
    how = How(center, ddof, quick=accuracy == "ranks")
    inputs = as_inputs(Xs, names, how)
    found: Found = defaultdict(list)
    for parts in _rounds(condensed(inputs, how)):
        for part, values in zip(parts, _decomposed(parts), strict=True):
            _deal(found, part, _results(part, values, how))
    return [
        Eigenvalues(*_joined(found[i], own.lead), shape=own.shape)
        for i, own in enumerate(inputs)
    ]


def covariance_invariants(
    Xs: Sequence[Any], *, names: Sequence[str], center: bool, ddof: int
) -> list[Invariants]:
    r"""Return trace and participation ratio of each covariance, without decomposing it.

    :math:`\sum_i \lambda_i = \mathrm{tr}\,C` and
    :math:`\sum_i \lambda_i^2 = \|C\|_F^2`, of the row Gram matrix as well. In float32
    where the data are no more than that.

    Args:
        Xs: Features, each ``(..., n_samples, n_features)``, or `Moments` of them.
        names: What to call each in a message.
        center: Subtract the mean of each feature.
        ddof: Delta degrees of freedom of the normalisation.

    Returns:
        One entry per input, in order.
    """
    how = How(center, ddof, quick=True)
    inputs = as_inputs(Xs, names, how)
    found: Found = defaultdict(list)
    for part in condensed(inputs, how):
        _deal(found, part, _invariants(part, how))
    return [
        Invariants(*_joined(found[i], own.lead), shape=own.shape)
        for i, own in enumerate(inputs)
    ]


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
    scaled = _without_noise(values, (max(W.shape) * _EPS) ** 2)
    restored = _restored(scaled[None], exponent[None], W.shape[-1], [name])[0]
    return Eigenvalues(restored, entropy_rank(scaled), zero, (W.shape[0], W.shape[1]))


def entropy_rank(weights: Tensor, *, eps: float = 0.0) -> Tensor:
    """Return the exponential of the entropy of shares; 0 where all weights are zero.

    Args:
        weights: Descending and non-negative, shape ``(..., k)``.
        eps: Added to each share.

    Returns:
        Shape ``(...)``.
    """
    p = weights / weights.sum(-1, keepdim=True) + eps
    return torch.where(weights[..., 0] > 0, (-torch.xlogy(p, p).sum(-1)).exp(), 0.0)


# -- decomposing --------------------------------------------------------------
def _rounds(parts: Iterable[Condensed]) -> Iterator[list[Condensed]]:
    """Gather parts until their matrices fill a round."""
    waiting: list[Condensed] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += part.matrices.nbytes
        if held >= limit(_ROUND_BYTES, part.matrices):
            yield waiting
            waiting, held = [], 0
    yield waiting


def _decomposed(parts: Sequence[Condensed]) -> list[Tensor]:
    """Return the eigenvalues of each part, those of one size together."""
    done: dict[int, Tensor] = {}
    for members in _buckets(parts):
        matrices = [parts[i].matrices for i in members]
        wide = [_widened(C, matrices[0].shape[-1]) for C in matrices]
        # What is alone need not be copied.
        values = decompose(wide[0] if len(wide) == 1 else torch.cat(wide))
        shares = torch.split(values, [len(C) for C in matrices])
        for i, C, own in zip(members, matrices, shares, strict=True):
            done[i] = own[:, : C.shape[-1]]
    return [done[i] for i in range(len(parts))]


def _buckets(parts: Sequence[Condensed]) -> Iterator[list[int]]:
    """Gather parts of about one size, the largest first."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        alike[part.matrices.dtype, part.matrices.device].append(i)
    for members in alike.values():
        within = limit(_SIZES_WITHIN, parts[members[0]].matrices)
        bucket: list[int] = []
        for i in sorted(members, key=lambda i: -parts[i].matrices.shape[-1]):
            size = parts[i].matrices.shape[-1]
            if bucket and parts[bucket[0]].matrices.shape[-1] > within * size:
                yield bucket
                bucket = []
            bucket.append(i)
        yield bucket


def _widened(C: Tensor, size: int) -> Tensor:
    """Return matrices of that size, with values of their own below all true ones."""
    extra = size - C.shape[-1]
    if not extra:
        return C
    wide = torch.nn.functional.pad(C, (0, extra, 0, extra))
    # No eigenvalue is larger in magnitude than the Frobenius norm; twice, for rounding.
    below = -2 * torch.linalg.matrix_norm(C)[:, None]
    wide.diagonal(dim1=-2, dim2=-1)[:, -extra:] = below
    return wide


# -- finishing ----------------------------------------------------------------
def _results(part: Condensed, values: Tensor, how: How) -> Results:
    """Return eigenvalues at their own scale, effective ranks, and what is constant."""
    single, size = values.dtype == torch.float32, values.shape[-1]
    cut = size**0.5 * _EPS_SINGLE if single else max(part.shape) * _EPS
    resolved = bool((values[:, part.rank - 1] > cut * values[:, 0]).all())
    # A product of features with themselves has no eigenvalue far below 0.
    if not (resolved and part.sources):
        values = clip_rounding(values, name=_one_of(part.names))
    scaled = values.to(torch.float64)
    if not resolved:
        scaled = _without_noise(scaled, cut)
    scaled[:, part.rank :] = 0.0
    constant = part.constant
    if not single and bool(constant.any()):
        scaled = scaled.masked_fill(constant[:, None], 0.0)
    restored = _restored(scaled, part.exponent, part.shape[1], part.names)
    results = restored, entropy_rank(scaled), constant
    if single:
        doubtful = constant if resolved else constant | _is_rounding(part, values)
        if bool(doubtful.any()):
            again = exactly(part, doubtful, how)
            _overwrite(
                results, doubtful, _results(again, decompose(again.matrices), how)
            )
    return results


def _overwrite(results: Results, where: Tensor, better: Results) -> None:
    chosen = where.nonzero()[:, 0]
    for own, other in zip(results, better, strict=True):
        own[chosen] = other


def _is_rounding(part: Condensed, values: Tensor) -> Tensor:
    """Return where more of a spectrum is float32 rounding than ranks bear.

    A value below ``noise * top`` can be anything up to that. As a share ``p`` it moves
    the entropy by ``-p log p`` at most, and the effective rank by as much, relatively.
    """
    size = values.shape[-1]
    noise = size**0.5 * _EPS_SINGLE
    # A unit that is always zero has an eigenvalue of exactly zero.
    live = (part.matrices.diagonal(dim1=-2, dim2=-1) > 0).sum(-1)
    doubtful = live.clamp(max=part.rank) - (values > noise * values[..., :1]).sum(-1)
    share = noise * values[..., 0] / values.sum(-1)
    worst: Tensor = -doubtful * torch.xlogy(share, share)
    return worst > _RANK_ERROR


def _invariants(part: Condensed, how: How) -> Results:
    """Return trace at its own scale, participation ratio, and what is constant."""
    C, constant = part.matrices.to(torch.float64), part.constant
    total = C.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Shares, because the squares may leave the range.
    squares = (C / total[:, None, None]).square_().sum((-2, -1))
    ratio = torch.where(constant, 0.0, squares.reciprocal())
    trace = torch.where(constant, 0.0, total)[:, None]
    trace = _restored(trace, part.exponent, 1, part.names)[:, 0]
    results = trace, ratio, constant
    if part.matrices.dtype == torch.float32 and bool(constant.any()):
        _overwrite(results, constant, _invariants(exactly(part, constant, how), how))
    return results


def _restored(
    scaled: Tensor, exponent: Tensor | None, width: int, names: Sequence[str]
) -> Tensor:
    """Return values at their own scale, padded to the features.

    Raises:
        MetricError: If they leave the float64 range.
    """
    values = torch.nn.functional.pad(scaled, (0, width - scaled.shape[-1]))
    if exponent is None:
        return values
    factor = torch.exp2(exponent)[:, None]
    # Twice the factor, because its square may overflow before the product does.
    values = values * factor * factor
    top, scaled_top = values[:, 0], scaled[:, 0]
    lost = torch.isinf(top) | ((top == 0) & (scaled_top > 0))
    if bool(lost.any()):
        raise MetricError(
            f"the variances of {names[int(lost.nonzero()[0])]} leave the float64 "
            f"range; divide it by its largest magnitude first (ranks and shares do "
            f"not change)"
        )
    return values


def _without_noise(values: Tensor, cut: float) -> Tensor:
    return values.masked_fill(values <= cut * values[..., :1], 0.0)


def _one_of(names: Sequence[str]) -> str:
    several = dict.fromkeys(names)
    return names[0] if len(several) == 1 else f"one of {', '.join(several)}"


# -- back to the inputs -------------------------------------------------------
def _deal(found: Found, part: Condensed, results: Results) -> None:
    """Hand each input its share of what was found for a part."""
    counts = [len(source) for source in part.sources] or [1]
    shares = zip(*(torch.split(one, counts) for one in results), strict=True)
    for end, share in zip(itertools.accumulate(counts), shares, strict=True):
        found[part.owners[end - 1]].append(share)


def _joined(pieces: Sequence[Results], lead: torch.Size) -> Results:
    """Return the results for one input, with its dimensions."""
    if len(pieces) == 1:
        first, second, third = pieces[0]
    else:
        first, second, third = (torch.cat(each) for each in zip(*pieces, strict=True))
    first = first.reshape(lead + first.shape[1:])
    return first, second.reshape(lead), third.reshape(lead)
