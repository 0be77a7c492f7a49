"""Intervals over seeds, paired differences, and the verdict on a claim.

A verdict compares an interval with a margin that was fixed before the run. It is never
"does not hold" because an interval contains 0: that is "not decided".
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from repscope._checks import as_float, check_choice
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError
from repscope.results import Band, Interval

Verdict = Literal["holds", "opposite sign", "no difference", "not decided"]

# Two halves of 2^20 sums each: the exact test stays under a second and 100 MB.
_EXACT_SEEDS = 40


def mean_interval(values: Any, *, confidence: float = 0.95) -> Interval:
    r"""Return the mean with its t interval.

    :math:`\bar v \pm t_{n-1} \, s / \sqrt n`, exact for normal values.

    Args:
        values: One number per seed: a sequence, tensor or Series, or seed -> value.
        confidence: Coverage, in (0, 1).

    Returns:
        Mean, bounds and n; the bounds are NaN for a single value.

    Raises:
        NotEnoughSamples: If there is no value.

    Example:
        >>> found = mean_interval([1.0, 2.0, 3.0])
        >>> found.estimate, round(found.low, 3), round(found.high, 3)
        (2.0, -0.484, 4.484)
    """
    seeds, _ = _by_seed(values, name="values")
    if not seeds:
        raise NotEnoughSamples("values is empty; an interval needs at least 1 value")
    return _t_interval(list(seeds.values()), confidence=confidence, method="t")


def paired_difference(a: Any, b: Any, *, confidence: float = 0.95) -> Interval:
    r"""Return the mean of ``a - b`` over seeds, with interval and exact p.

    The paired t interval :math:`\bar d \pm t_{n-1}\, s_d / \sqrt n`, and the two-sided
    sign-flip p: the share of the :math:`2^n` sign patterns of the differences whose
    mean is at least as large in magnitude. ``n`` seeds cannot give a p below
    ``p_min`` :math:`= 2^{1-n}`.

    Args:
        a: seed -> value (a mapping or a Series), or a sequence in an order shared
            with ``b``.
        b: The same for the other condition, over the same seeds.
        confidence: Coverage, in (0, 1).

    Returns:
        Mean difference, bounds (NaN for one seed), n, p_value and p_min; above 40
        seeds, where 2^n patterns are too many, both are None and ``method`` says so.

    Raises:
        MetricError: If the seeds of ``a`` and ``b`` differ, or only one names them.
        NotEnoughSamples: If there is no seed.

    References:
        Fisher (1935), The design of experiments, section 21.

    Example:
        >>> a, b = {0: 3.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 3.0, 2: 3.0}
        >>> found = paired_difference(a, b)
        >>> found.estimate, found.n, found.p_value, found.p_min
        (2.0, 3, 0.25, 0.25)
    """
    (ours, named), (theirs, named_too) = _by_seed(a, name="a"), _by_seed(b, name="b")
    if named != named_too:
        raise MetricError(
            "a and b must both map seed -> value, or both be plain sequences; one of "
            "them does not name its seeds"
        )
    only_a = [seed for seed in ours if seed not in theirs]
    only_b = [seed for seed in theirs if seed not in ours]
    if only_a or only_b:
        raise MetricError(
            f"a and b must hold the same seeds; only in a: {only_a}, only in b: "
            f"{only_b}; drop them from both, or run what is missing"
        )
    if not ours:
        raise NotEnoughSamples("a and b are empty; a difference needs at least 1 seed")
    differences = [ours[seed] - theirs[seed] for seed in ours]
    method = "paired t" if named else "paired t by position"
    found = _t_interval(differences, confidence=confidence, method=method)
    if found.n > _EXACT_SEEDS:
        return replace(found, method=f"{found.method}, no p above {_EXACT_SEEDS} seeds")
    p_value = _sign_flip_p(np.asarray(differences))
    return replace(found, p_value=p_value, p_min=2.0 ** (1 - found.n))


def verdict(
    interval: Interval, *, margin: float, direction: Literal["greater", "less"]
) -> Verdict:
    """Return what an interval says about a claimed difference.

    Args:
        interval: Of a difference, first minus second.
        margin: Smallest difference that matters, fixed before the run; at least 0, in
            the unit of the interval.
        direction: What was claimed of the first: ``"greater"`` or ``"less"``.

    Returns:
        ``"holds"`` when the interval lies wholly beyond the margin on the claimed
        side, ``"opposite sign"`` wholly beyond it on the other, ``"no difference"``
        wholly within plus or minus the margin, else ``"not decided"``.

    Raises:
        UsageError: If ``margin`` is negative or not finite.

    Example:
        >>> verdict(Interval(2.0, 1.2, 2.8, 5, "t"), margin=1.0, direction="greater")
        'holds'
    """
    check_choice(direction, ("greater", "less"), name="direction")
    if not 0 <= margin < float("inf"):
        raise UsageError(f"margin must be finite and at least 0, got {margin}")
    low, high = interval.low, interval.high
    if direction == "less":
        low, high = -high, -low
    if low > margin:
        return "holds"
    if high < -margin:
        return "opposite sign"
    # NaN bounds fail every comparison.
    return "no difference" if -margin <= low and high <= margin else "not decided"


def band(
    curves: Mapping[Any, Any] | Sequence[Any], *, x: Any, confidence: float = 0.95
) -> Band:
    """Return mean and t interval over seeds at each point of a curve.

    Args:
        curves: seed -> values, or a list of them, each of shape ``(n_points,)``; NaN
            where a seed has no value.
        x: Positions, shape ``(n_points,)``.
        confidence: Coverage, in (0, 1).

    Returns:
        Mean, bounds and number of seeds at each point; the mean is NaN where there is
        none, the bounds where there are fewer than 2.

    Raises:
        MetricError: If there are no curves or one has another length than ``x``.

    Example:
        >>> found = band([[1.0, 5.0], [3.0, float("nan")]], x=[0, 100])
        >>> found.estimate.tolist(), found.n.tolist()
        ([2.0, 5.0], [2, 1])
    """
    named = curves if isinstance(curves, Mapping) else dict(enumerate(curves))
    if not named:
        raise MetricError("curves is empty; a band needs at least 1 seed")
    positions = as_float(x, name="x")
    rows = {
        seed: as_float(row, name=f"curves[{seed!r}]") for seed, row in named.items()
    }
    for seed, row in rows.items():
        _check_curve(row, positions, name=f"curves[{seed!r}]")
    table = torch.stack([row.to(torch.float64) for row in rows.values()])
    n = table.isfinite().sum(0)
    mean = table.nanmean(0)
    variance = (table - mean).square().nansum(0) / (n - 1)
    quantile = _t_quantile(n.cpu().numpy(), confidence=confidence)
    half = torch.as_tensor(quantile, device=n.device) * (variance / n).sqrt()
    return Band(x=positions, estimate=mean, low=mean - half, high=mean + half, n=n)


# -- helpers -----------------------------------------------------------------
def _by_seed(values: Any, *, name: str) -> tuple[dict[Hashable, float], bool]:
    named = isinstance(values, Mapping) or hasattr(values, "to_dict")
    if not named:
        row = as_float(values, name=name)
        if row.ndim != 1:
            raise MetricError(
                f"{name} must hold one number per seed, got shape {tuple(row.shape)}"
            )
        seeds: dict[Hashable, float] = dict(enumerate(row.tolist()))
    elif isinstance(values, Mapping):
        seeds = {seed: float(value) for seed, value in values.items()}
    else:
        if not values.index.is_unique:
            repeated = values.index[values.index.duplicated()].unique().tolist()
            raise MetricError(f"{name} has more than one value for seeds {repeated}")
        seeds = {seed: float(value) for seed, value in values.to_dict().items()}
    for seed, value in seeds.items():
        if not np.isfinite(value):
            raise NonFiniteError(
                f"{name}[{seed!r}] is {value}; a diverged run is an outcome to count, "
                f"not a number to average: drop that seed and say so"
            )
    return seeds, named


def _t_interval(values: list[float], *, confidence: float, method: str) -> Interval:
    n = len(values)
    mean = float(np.mean(values))
    quantile = float(_t_quantile(np.asarray(n), confidence=confidence))
    half = quantile * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")
    label = f"{method}, {100 * confidence:g} %"
    return Interval(mean, mean - half, mean + half, n, label)


def _t_quantile(n: Any, *, confidence: float) -> Any:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie in (0, 1), got {confidence}")
    return np.where(n > 1, stdtrit(np.maximum(n - 1, 1), 0.5 + confidence / 2), np.nan)


def _sign_flip_p(differences: np.ndarray[Any, Any]) -> float:
    """Return the exact two-sided p over all sign patterns, meeting in the middle."""
    half = len(differences) // 2
    left = _signed_sums(differences[:half])
    right = np.sort(_signed_sums(differences[half:]))
    # Sums that differ only by rounding tie, and ties count.
    reach = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if reach <= 0:
        return 1.0
    count = (len(right) - np.searchsorted(right, reach - left)).sum()
    return float(2 * count / 2.0 ** len(differences))


def _signed_sums(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _check_curve(row: Tensor, x: Tensor, *, name: str) -> None:
    if x.ndim != 1 or row.shape != x.shape:
        raise MetricError(
            f"{name} and x must have the same shape (n_points,), got "
            f"{tuple(row.shape)} and {tuple(x.shape)}"
        )
    if bool(row.isinf().any()):
        raise NonFiniteError(f"{name} holds infinity; use NaN where a value is missing")
