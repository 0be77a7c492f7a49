"""Intervals over seeds, of values and of differences between pairs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import ndtr, ndtri, stdtrit
from torch import Tensor

from repscope._checks import as_float, check_choice
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError
from repscope.results import Band, Interval

Method = Literal["t", "bca"]

# Two halves of 2^20 sums each: the exact test stays under a second and 100 MB.
_EXACT_SEEDS = 40
# A bootstrap interval of fewer is too short; the message has what was measured.
_BCA_SEEDS = 20
_RESAMPLES = 9999
_BCA_RATES = "27 % at 3 seeds, 15 % at 5, 10 % at 10"


def mean_interval(
    values: Any, *, confidence: float = 0.95, method: Method = "t", seed: int = 0
) -> Interval:
    r"""Return the mean with its t interval, or a bootstrap one.

    :math:`\bar v \pm t_{n-1} \, s / \sqrt n`, exact for normal values. ``"bca"`` is the
    bias-corrected and accelerated interval from 9999 resamples, for skewed values of
    many seeds.

    Args:
        values: One number per seed: a sequence, tensor or Series, or seed -> value.
        confidence: Coverage, in (0, 1).
        method: ``"t"``, or ``"bca"`` from 20 values on: with fewer its interval is too
            short.
        seed: Of the resampling; the same numbers give the same interval.

    Returns:
        Mean, bounds and n; the bounds are NaN for a single value. Equal values have
        an interval of length 0.

    Raises:
        NotEnoughSamples: If there is no value.
        UsageError: If ``method="bca"`` gets fewer than 20 values.

    References:
        Efron (1987), Better bootstrap confidence intervals, JASA 82(397) (BCa).

    Example:
        >>> found = mean_interval([1.0, 2.0, 3.0])
        >>> found.estimate, round(found.low, 3), round(found.high, 3)
        (2.0, -0.484, 4.484)
    """  # noqa: DOC502 - raised by what it calls
    seeds, _ = by_seed(values, name="values")
    if not seeds:
        raise NotEnoughSamples("values is empty; an interval needs at least 1 value")
    return _interval(
        np.array(list(seeds.values())), confidence=confidence, method=method, seed=seed
    )


def paired_difference(
    a: Any, b: Any, *, confidence: float = 0.95, method: Method = "t", seed: int = 0
) -> Interval:
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
        method: Of the interval: ``"t"``, or ``"bca"`` from 20 seeds on, see
            ``mean_interval``.
        seed: Of the resampling of ``"bca"``.

    Returns:
        Mean difference, bounds (NaN for one seed), n, p_value and p_min; above 40
        seeds, where 2^n patterns are too many, both are None and ``method`` says so.

    Raises:
        MetricError: If the seeds of ``a`` and ``b`` differ, or only one names them.
        NotEnoughSamples: If there is no seed.
        UsageError: If ``method="bca"`` gets fewer than 20 seeds.

    References:
        Fisher (1935), The design of experiments, section 21.

    Example:
        >>> a, b = {0: 3.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 3.0, 2: 3.0}
        >>> found = paired_difference(a, b)
        >>> found.estimate, found.n, found.p_value, found.p_min
        (2.0, 3, 0.25, 0.25)
    """  # noqa: DOC502 - raised by what it calls
    (ours, named), (theirs, named_too) = by_seed(a, name="a"), by_seed(b, name="b")
    if named != named_too:
        raise MetricError(
            "a and b must both map seed -> value, or both be plain sequences; one of "
            "them does not name its seeds"
        )
    check_same_seeds(ours, theirs)
    if not ours:
        raise NotEnoughSamples("a and b are empty; a difference needs at least 1 seed")
    differences = np.array([ours[seed] - theirs[seed] for seed in ours])
    found = _interval(differences, confidence=confidence, method=method, seed=seed)
    label = f"paired {found.method}"
    if not named:
        label = label.replace(",", " by position,")
    if found.n > _EXACT_SEEDS:
        return replace(found, method=f"{label}, no p above {_EXACT_SEEDS} seeds")
    p_value, p_min = sign_flip_p(differences), 2.0 ** (1 - found.n)
    return replace(found, method=label, p_value=p_value, p_min=p_min)


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


# -- for the rule ------------------------------------------------------------
def by_seed(
    values: Any, *, name: str, finite: bool = True
) -> tuple[dict[Hashable, float], bool]:
    """Return seed -> value, and whether the seeds are named.

    Args:
        values: A mapping, a Series, or a sequence, whose seeds are its positions.
        name: Argument name for the message.
        finite: Refuse values that are not.

    Returns:
        A dict in the order given, and False for a sequence.

    Raises:
        MetricError: If the values are not one number a seed.
        NonFiniteError: If one is not finite and ``finite`` is set.
    """
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
        if finite and not np.isfinite(value):
            raise NonFiniteError(
                f"{name}[{seed!r}] is {value}; a diverged run is an outcome to count, "
                f"not a number to average: drop that seed and say so"
            )
    return seeds, named


def check_same_seeds(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, where: str = ""
) -> None:
    """Refuse values of which one side lacks a seed.

    Args:
        a: seed -> value.
        b: The same.
        where: What they are of, for the message: ``" of 'rank'"``.

    Raises:
        MetricError: If a seed is on one side only.
    """
    only_a = [seed for seed in a if seed not in b]
    only_b = [seed for seed in b if seed not in a]
    if only_a or only_b:
        raise MetricError(
            f"a and b{where} must hold the same seeds; only in a: {only_a}, only in b: "
            f"{only_b}; drop them from both, or run what is missing"
        )


def sign_flip_p(differences: np.ndarray[Any, Any]) -> float:
    """Return the exact two-sided p over all sign patterns, meeting in the middle.

    Args:
        differences: Of at most 40 seeds, shape ``(n,)``.

    Returns:
        The share of patterns whose sum is at least as far from 0, in (0, 1].

    Raises:
        UsageError: If there are more than 40.
    """
    if len(differences) > _EXACT_SEEDS:
        raise UsageError(
            f"an exact p needs at most {_EXACT_SEEDS} seeds, got {len(differences)}: "
            f"2^n sign patterns are too many"
        )
    half = len(differences) // 2
    left = _signed_sums(differences[:half])
    right = np.sort(_signed_sums(differences[half:]))
    # Sums that differ only by rounding tie, and ties count.
    reach = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if reach <= 0:
        return 1.0
    count = (len(right) - np.searchsorted(right, reach - left)).sum()
    return float(2 * count / 2.0 ** len(differences))


def bca_bounds(
    values: np.ndarray[Any, Any], *, confidence: float, seed: int
) -> tuple[float, float]:
    r"""Return the bias-corrected and accelerated bootstrap interval of the mean.

    The quantiles :math:`\Phi(z_0 + (z_0 \pm z) / (1 - a (z_0 \pm z)))` of the means of
    the resamples, with :math:`z_0` from the share of them below the mean (half of those
    equal to it) and :math:`a` from the third moment of the values.

    Args:
        values: Shape ``(n,)``.
        confidence: Coverage, in (0, 1).
        seed: Of the resampling.

    Returns:
        Low and high, the value itself where all are equal.
    """
    n, mean = len(values), values.mean()
    off = values - mean
    top = np.abs(off).max()
    if top <= np.finfo(float).eps * np.abs(values).max():
        return float(mean), float(mean)
    drawn = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
    means = values[drawn].mean(1)
    bias = ndtri(((means < mean).mean() + (means <= mean).mean()) / 2)
    skew = ((off / top) ** 3).sum() / (6 * ((off / top) ** 2).sum() ** 1.5)
    z = bias + ndtri((1 - confidence) / 2) * np.array([1, -1])
    low, high = np.quantile(means, ndtr(bias + z / (1 - skew * z)))
    return float(low), float(high)


# -- helpers -----------------------------------------------------------------
def _interval(
    values: np.ndarray[Any, Any], *, confidence: float, method: Method, seed: int
) -> Interval:
    check_choice(method, ("t", "bca"), name="method")
    n, mean = len(values), float(values.mean())
    quantile = float(_t_quantile(np.asarray(n), confidence=confidence))
    if method == "bca":
        if n < _BCA_SEEDS:
            raise UsageError(
                f'method="bca" needs at least {_BCA_SEEDS} seeds, got {n}: below that '
                f"its 95 % interval excludes 0 too often when nothing differs "
                f'(measured: {_BCA_RATES}); use method="t"'
            )
        low, high = bca_bounds(values, confidence=confidence, seed=seed)
        return Interval(mean, low, high, n, f"BCa, {100 * confidence:g} %")
    half = quantile * float(values.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    return Interval(mean, mean - half, mean + half, n, f"t, {100 * confidence:g} %")


def _t_quantile(n: Any, *, confidence: float) -> Any:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie in (0, 1), got {confidence}")
    return np.where(n > 1, stdtrit(np.maximum(n - 1, 1), 0.5 + confidence / 2), np.nan)


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
