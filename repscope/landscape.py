"""What needs a model and a way to score it: accuracy against sparsity."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from repscope._checks import check_choice, check_finite
from repscope.errors import MetricError, UsageError
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
            or evaluation mode of ``model``.
        levels: Strictly ascending; fractions in [0, 1], or magnitudes by threshold.
        scope: ``"global"`` ranks all weights together, ``"layer"`` each tensor by
            itself, ``"balanced"`` together after dividing each tensor by its root mean
            square, which makes the order immune to rescaling layers against each
            other.
        by: ``"fraction"`` of the weights, or every weight whose magnitude (for
            ``"balanced"``, in units of the root mean square) is at most the
            ``"threshold"``.

    Returns:
        The share of weights zeroed at each level, the largest magnitude zeroed (0 for
        none, NaN unless ``scope="global"``) and the scores.

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
    groups = _magnitudes(model, scope=scope)
    orders = [group.argsort(stable=True) for group in groups]
    sparsity, threshold, score = [], [], []
    for step in steps:
        counts = [_count(group, step, by=by) for group in groups]
        keep = torch.cat([_keep(*pair) for pair in zip(orders, counts, strict=True)])
        score.append(_score(evaluate, _pruned(model, keep)))
        sparsity.append(sum(counts) / len(keep))
        last = groups[0][orders[0][counts[0] - 1]] if counts[0] else 0.0
        threshold.append(float(last) if scope == "global" else math.nan)
    return SparsityCurve(
        sparsity=torch.tensor(sparsity, dtype=torch.float64),
        threshold=torch.tensor(threshold, dtype=torch.float64),
        score=torch.tensor(score, dtype=torch.float64),
        dense_score=_score(evaluate, copy.deepcopy(model)),
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


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    return float(torch.as_tensor(evaluate(model)).detach())


def _effective(model: nn.Module) -> nn.Module:
    """Return a deep copy whose parametrized weights are plain parameters."""
    clone = copy.deepcopy(model)
    for module in list(clone.modules()):
        if parametrize.is_parametrized(module):
            _fold(module)
    return clone


def _fold(module: nn.Module) -> None:
    held = cast("nn.ModuleDict", module.parametrizations)
    values = {name: getattr(module, name).detach().clone() for name in held}
    del module.parametrizations
    # A deep copy shares its generated class with the user's model, which
    # parametrize.remove_parametrizations would edit and so break.
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: w for name, w in model.named_parameters() if w.ndim >= 2}


def _magnitudes(model: nn.Module, *, scope: Scope) -> list[Tensor]:
    weights = _weights(_effective(model))
    if not weights:
        raise MetricError(
            "the model has no parameter with 2 dimensions or more to set to zero"
        )
    for name, weight in weights.items():
        check_finite(weight, name=f"parameter {name!r}")
    flat = [w.detach().flatten().abs().to(torch.float64) for w in weights.values()]
    if scope == "layer":
        return flat
    if scope == "balanced":
        flat = [_over_rms(magnitudes) for magnitudes in flat]
    return [torch.cat(flat)]


def _over_rms(magnitudes: Tensor) -> Tensor:
    rms = magnitudes.square().mean().sqrt()
    return magnitudes / rms if rms > 0 else magnitudes


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
def _pruned(model: nn.Module, keep: Tensor) -> nn.Module:
    clone = _effective(model)
    weights = list(_weights(clone).values())
    pieces = torch.split(keep, [weight.numel() for weight in weights])
    for weight, piece in zip(weights, pieces, strict=True):
        weight.masked_fill_(~piece.view_as(weight), 0.0)
    return clone


SPARSITY_METRICS: dict[str, Callable[[SparsityCurve], Tensor]] = {
    "accuracy_at_90": _accuracy_at_90,
    "accuracy_at_95": _accuracy_at_95,
}
