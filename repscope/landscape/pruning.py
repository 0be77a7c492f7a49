"""Accuracy against the share of weights that is set to zero."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from repscope._checks import as_tensor, check_choice, check_finite
from repscope.errors import MetricError, UnknownName, UsageError, suggest
from repscope.landscape.copies import effective, score
from repscope.results import SparsityCurve

Scope = Literal["global", "layer", "balanced"]
By = Literal["fraction", "threshold"]

DEFAULT_LEVELS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)

_LEVEL_SLACK = 0.002


def sparsity_curve(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    levels: Sequence[float] | None = None,
    scope: Scope = "global",
    by: By = "fraction",
    exclude: Mapping[str, Tensor] | None = None,
) -> SparsityCurve:
    r"""Score a model while its smallest weights are set to zero, in one shot.

    Every parameter with at least 2 dimensions takes part; parametrized ones by their
    effective value. At fraction p, exactly :math:`\lfloor p n \rfloor` of n weights are
    zeroed, smallest magnitude first; among equal magnitudes the earlier in
    ``model.parameters()``, then in memory order, goes first. Weights that are zero
    already count among the zeroed.

    Args:
        model: Left untouched: every level is applied to a fresh deep copy.
        evaluate: Returns the score of the model it is given, which is in the training
            or evaluation mode of ``model``. Torch's random state is the same at every
            level and afterwards what it was before.
        levels: Strictly ascending; fractions in [0, 1], or magnitudes by threshold.
        scope: ``"global"`` ranks all weights together, ``"layer"`` each tensor by
            itself, ``"balanced"`` together after dividing each tensor by its root mean
            square, which makes the order immune to rescaling layers against each
            other.
        by: ``"fraction"`` of the weights, or every weight whose magnitude (for
            ``"balanced"``, in units of the root mean square) is at most the
            ``"threshold"``.
        exclude: Parameter name -> mask, True for weights that stay as they are and
            are not counted; such as those that were `never_updated`.

    Returns:
        The share of weights zeroed at each level, in all and in each tensor, the
        largest magnitude zeroed (0 for none, NaN unless ``scope="global"``) and the
        scores.

    Raises:
        UsageError: If ``by="threshold"`` comes without levels or with
            ``scope="layer"``, which has no meaning of its own there.

    References:
        Schwarz et al. (2021), Powerpropagation, NeurIPS, for one-shot magnitude
        pruning without retraining as a reading of a trained network.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> curve = sparsity_curve(layer, lambda m: m.weight.sum(), levels=[0.0, 0.5])
        >>> curve.score.tolist(), curve.dense_score
        ([8.0, 4.0], 8.0)
    """
    check_choice(scope, ("global", "layer", "balanced"), name="scope")
    check_choice(by, ("fraction", "threshold"), name="by")
    if by == "threshold" and (levels is None or scope == "layer"):
        raise UsageError(
            'by="threshold" needs levels= (magnitudes) and scope "global" or '
            '"balanced"; a threshold is the same for every layer'
        )
    steps = _checked_levels(DEFAULT_LEVELS if levels is None else levels, by=by)
    candidates = _candidates(model, exclude=exclude or {})
    groups = _groups(candidates, scope=scope)
    orders = [group.argsort(stable=True) for group in groups]
    sizes = [len(where) for where, _ in candidates.values()]
    sparsity, threshold, scores, shares = [], [], [], []
    for step in steps:
        counts = [_count(group, step, by=by) for group in groups]
        keep = torch.cat([_keep(*pair) for pair in zip(orders, counts, strict=True)])
        pieces = dict(zip(candidates, torch.split(keep, sizes), strict=True))
        scores.append(score(evaluate, _pruned(model, candidates, pieces)))
        shares.append([float((~piece).double().mean()) for piece in pieces.values()])
        sparsity.append(sum(counts) / len(keep))
        last = groups[0][orders[0][counts[0] - 1]] if counts[0] else 0.0
        threshold.append(float(last) if scope == "global" else math.nan)
    n_weights = sum(w.numel() for w in _weights(effective(model)).values())
    by_layer = torch.tensor(shares, dtype=torch.float64).unbind(1)
    return SparsityCurve(
        sparsity=torch.tensor(sparsity, dtype=torch.float64),
        threshold=torch.tensor(threshold, dtype=torch.float64),
        score=torch.tensor(scores, dtype=torch.float64),
        dense_score=score(evaluate, copy.deepcopy(model)),
        n_excluded=n_weights - sum(sizes),
        layer_sparsity=dict(zip(candidates, by_layer, strict=True)),
    )


# -- readings ----------------------------------------------------------------
def accuracy_at(curve: SparsityCurve, sparsity: float) -> Tensor:
    """Return the score at a sparsity that was measured, without interpolation.

    Args:
        curve: From ``sparsity_curve``.
        sparsity: Share of weights set to zero.

    Returns:
        0-dim score at the level nearest to ``sparsity``; NaN when none lies within
        0.002 of it, which is more than rounding down to whole weights moves a level.

    Example:
        >>> levels, score = torch.tensor([0.0, 0.8999]), torch.tensor([97.0, 91.5])
        >>> curve = SparsityCurve(levels, levels, score, dense_score=97.0)
        >>> accuracy_at(curve, 0.9).item(), accuracy_at(curve, 0.95).item()
        (91.5, nan)
    """
    gap = (curve.sparsity - sparsity).abs()
    nearest = gap.argmin()
    return torch.where(gap[nearest] <= _LEVEL_SLACK, curve.score[nearest], torch.nan)


def sparsity_within(
    curve: SparsityCurve, *, tolerance: float, reference: float, floor: float
) -> Tensor:
    """Return the sparsity up to which the score stays near a common reference.

    The largest measured sparsity such that there and at every smaller one the score is
    at least ``reference - tolerance``. A share of a model's *own* dense score would
    reward a poor model, which has little to lose.

    Args:
        curve: From ``sparsity_curve``, of a score of which more is better.
        tolerance: In the units of the score, at least 0.
        reference: One score for all compared models, such as the best dense one.
        floor: Smallest dense score with which a model takes part.

    Returns:
        0-dim, in [0, 1]; NaN when the dense score is below ``floor`` or below
        ``reference - tolerance``, and when the smallest sparsity measured is too much.

    Raises:
        UsageError: If ``tolerance`` is negative or NaN.

    Example:
        >>> levels, score = torch.tensor([0.5, 0.75, 0.875]), torch.tensor([97, 96, 80])
        >>> curve = SparsityCurve(levels, levels, score, dense_score=97.0)
        >>> sparsity_within(curve, tolerance=1.0, reference=97.0, floor=90.0).item()
        0.75
    """
    if not tolerance >= 0:
        raise UsageError(f"tolerance must be at least 0, got {tolerance}")
    nowhere = torch.full_like(curve.sparsity[0], math.nan)
    if not curve.dense_score >= max(floor, reference - tolerance):
        return nowhere
    within = (curve.score >= reference - tolerance).long().cumprod(0)
    return curve.sparsity[within.sum() - 1] if within[0] else nowhere


def _accuracy_at_90(curve: SparsityCurve) -> Tensor:
    return accuracy_at(curve, 0.90)


def _accuracy_at_95(curve: SparsityCurve) -> Tensor:
    return accuracy_at(curve, 0.95)


# -- helpers -----------------------------------------------------------------
def _checked_levels(levels: Sequence[float], *, by: By) -> list[float]:
    steps = [float(level) for level in levels]
    top = 1.0 if by == "fraction" else math.inf
    inside = all(0 <= step <= top for step in steps)
    rising = all(low < high for low, high in itertools.pairwise(steps))
    if not (steps and inside and rising):
        raise UsageError(
            f"levels must be strictly ascending within [0, {top:g}] for by={by!r}, "
            f"got {steps}"
        )
    return steps


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: w for name, w in model.named_parameters() if w.ndim >= 2}


def _candidates(
    model: nn.Module, *, exclude: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    # Where the weights to rank are in each tensor, and their magnitudes.
    weights = _weights(effective(model))
    if not weights:
        raise MetricError(
            "the model has no parameter with 2 dimensions or more to set to zero"
        )
    masks = {name: _mask(name, value, weights) for name, value in exclude.items()}
    found = {}
    for name, weight in weights.items():
        check_finite(weight, name=f"parameter {name!r}")
        flat = weight.detach().flatten().abs().to(torch.float64)
        mask = masks.get(name, torch.zeros_like(flat, dtype=torch.bool))
        where = (~mask.to(flat.device)).nonzero()[:, 0]
        if len(where):
            found[name] = where, flat[where]
    if not found:
        raise MetricError("exclude leaves no weight to set to zero")
    return found


def _mask(name: str, value: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    if name not in weights:
        raise UnknownName(
            f"exclude names no parameter of 2 dimensions or more with {name!r}"
            f"{suggest(name, weights)}"
        )
    mask = as_tensor(value, plain=None)
    if mask.dtype != torch.bool or mask.shape != weights[name].shape:
        raise UsageError(
            f"exclude[{name!r}] must be a boolean mask of shape "
            f"{tuple(weights[name].shape)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    return mask.flatten()


def _groups(
    candidates: Mapping[str, tuple[Tensor, Tensor]], *, scope: Scope
) -> list[Tensor]:
    flat = [magnitudes for _, magnitudes in candidates.values()]
    if scope == "layer":
        return flat
    if scope == "balanced":
        flat = [_over_rms(magnitudes) for magnitudes in flat]
    return [torch.cat(flat)]


def _over_rms(magnitudes: Tensor) -> Tensor:
    top = magnitudes.amax()
    if not top > 0:
        return magnitudes
    relative = magnitudes / top
    return relative / relative.square().mean().sqrt()


def _count(magnitudes: Tensor, step: float, *, by: By) -> int:
    if by == "threshold":
        return int((magnitudes <= step).sum())
    # 0.29 * 100 is 28.999999999999996: round before the floor.
    return math.floor(round(step * len(magnitudes), 6))


def _keep(order: Tensor, count: int) -> Tensor:
    keep = torch.ones_like(order, dtype=torch.bool)
    keep[order[:count]] = False
    return keep


@torch.no_grad()
def _pruned(
    model: nn.Module,
    candidates: Mapping[str, tuple[Tensor, Tensor]],
    pieces: Mapping[str, Tensor],
) -> nn.Module:
    clone = effective(model)
    weights = _weights(clone)
    for name, keep in pieces.items():
        where, _ = candidates[name]
        gone = torch.zeros(weights[name].numel(), dtype=torch.bool, device=keep.device)
        gone[where[~keep]] = True
        weights[name].masked_fill_(gone.view_as(weights[name]), 0.0)
    return clone


SPARSITY_METRICS: dict[str, Callable[[SparsityCurve], Tensor]] = {
    "accuracy_at_90": _accuracy_at_90,
    "accuracy_at_95": _accuracy_at_95,
}
