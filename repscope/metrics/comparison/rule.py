"""What is claimed of a difference before the run, and what the seeds say to it.

A verdict compares an interval with a margin that was fixed before the run. It is never
"does not hold" because an interval contains 0: that is "not decided".
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from repscope._checks import check_choice
from repscope.errors import (
    MetricError,
    NotEnoughSamples,
    UnknownName,
    UsageError,
    suggest,
)
from repscope.metrics.comparison.intervals import (
    by_seed,
    check_same_seeds,
    mean_interval,
    sign_flip_p,
)
from repscope.results import Compared, Comparison, Holm, Interval, Primary

Verdict = Literal["holds", "opposite sign", "no difference", "not decided"]

# More lost than this, and whoever fails more would be flattered.
_MAX_DIVERGED = 0.1
# Fewer seeds than this carry a preview, not a verdict.
_SEEDS_FOR_A_VERDICT = 10

_Values = Mapping[Hashable, float]
_Array = np.ndarray[Any, Any]


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
        wholly within plus or minus the margin, else ``"not decided"``. Within it is
        the equivalence test of two one-sided t tests (TOST), at 2.5 % a side for a
        95 % interval.

    Raises:
        UsageError: If ``margin`` is negative or not finite.

    References:
        Schuirmann (1987), J. Pharmacokinetics and Biopharmaceutics 15(6) (TOST).

    Example:
        >>> verdict(Interval(2.0, 1.2, 2.8, 5, "t"), margin=1.0, direction="greater")
        'holds'
    """  # noqa: DOC502 - raised by _check_claim
    _check_claim(margin, direction)
    low, high = interval.low, interval.high
    if direction == "less":
        low, high = -high, -low
    if low > margin:
        return "holds"
    if high < -margin:
        return "opposite sign"
    # NaN bounds fail every comparison.
    return "no difference" if -margin <= low and high <= margin else "not decided"


def holm(p_values: Mapping[str, float]) -> Holm:
    r"""Return p values adjusted by Holm's step-down rule.

    With the m values in ascending order, :math:`\tilde p_{(i)} = \max_{j \le i}
    \min(1, (m - j + 1)\, p_{(j)})`: whatever depends on what, the chance that any true
    null hypothesis is rejected at :math:`\tilde p \le \alpha` is at most
    :math:`\alpha`. That holds for the metrics declared before the run, all of them and
    no other.

    Args:
        p_values: Primary metric -> p, in [0, 1].

    Returns:
        Both p values of each metric, in the order given.

    Raises:
        UsageError: If the metrics are not named or there are none.
        MetricError: If a p is not in [0, 1].

    References:
        Holm (1979), A simple sequentially rejective multiple test procedure,
        Scandinavian Journal of Statistics 6(2).

    Example:
        >>> holm({"accuracy": 0.02, "rank": 0.01, "forgetting": 0.4}).adjusted
        (0.04, 0.03, 0.4)
    """
    if not isinstance(p_values, Mapping) or not p_values:
        raise UsageError(
            "p_values must map at least one declared primary metric to its p, got "
            f"{p_values!r}"
        )
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise MetricError(f"p_values[{name!r}] must lie in [0, 1], got {p}")
    given = np.array(list(p_values.values()), dtype=float)
    order = np.argsort(given, kind="stable")
    stepped = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1))
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(stepped, 1)
    return Holm(tuple(p_values), tuple(given.tolist()), tuple(adjusted.tolist()))


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    primary: Mapping[str, Primary],
    confidence: float = 0.95,
) -> Comparison:
    r"""Return what paired seeds say about every metric of two conditions.

    A metric that was declared before the run gets a verdict: that of `verdict` on its
    paired t interval and, for *holds* and *opposite sign*, only where its p after
    `holm` is at most ``1 - confidence``. The p is the exact sign-flip p of the
    differences less :math:`\mathrm{clip}(\bar d, -m, m)`: of the null hypothesis that
    the difference is no larger than the margin m. Everything else is exploratory: an
    interval, no p, no verdict.

    A value that is not finite is a diverged run, which is an outcome: counted, left
    out of the interval, and replaced in the worst case, by the bounds that are
    most against the first condition and by those that are most for it. With diverged
    runs a verdict stands only if the worst case says the same, p is the largest of the
    three, and beyond a tenth of the seeds it is ``"not reported"``.

    Args:
        a: Metric -> (seed -> value) of the first condition; a `DataFrame` with a row
            a seed will do. NaN or infinity where the run diverged.
        b: The same metrics and seeds of the second.
        primary: Metric -> `Primary`: direction, margin, bounds; fixed before the run.
        confidence: Coverage of every interval, in (0, 1).

    Returns:
        A row a metric, primary ones first, in the order declared.

    Raises:
        UnknownName: If a primary metric was not measured.
        UsageError: If nothing is declared, or a value lies outside its bounds.
        MetricError: If metrics or seeds are on one side only.

    References:
        Holm (1979), Scandinavian Journal of Statistics 6(2); Horowitz and Manski
        (2000), Nonparametric analysis of randomized experiments with missing covariate
        and outcome data, JASA 95(449) (worst-case bounds).

    Example:
        >>> a = {"rank": {s: 20.0 + s % 3 for s in range(10)}}
        >>> b = {"rank": {s: 25.0 + s % 2 for s in range(10)}}
        >>> claim = Primary("less", margin=1.0)
        >>> row = compare(a, b, primary={"rank": claim})["rank"]
        >>> row.interval.estimate, row.verdict, row.p_holm
        (-4.6, 'holds', 0.001953125)
    """  # noqa: DOC502 - raised by what it calls
    first, second = dict(a), dict(b)
    _check_metrics(first, second, primary)
    pairs = {
        name: _pair(name, first[name], second[name], primary.get(name))
        for name in [*primary, *(name for name in first if name not in primary)]
    }
    adjusted = holm({name: pairs[name].p_value(primary[name]) for name in primary})
    p_holm = dict(zip(adjusted.metrics, adjusted.adjusted, strict=True))
    rows = (
        _compared(
            name, pair, primary.get(name), p_holm.get(name), confidence=confidence
        )
        for name, pair in pairs.items()
    )
    n, alpha = len(primary), 1 - confidence
    return Comparison(
        tuple(replace(row, note=_notes(row, n_primary=n, alpha=alpha)) for row in rows)
    )


# -- helpers -----------------------------------------------------------------
def _check_claim(margin: float, direction: str) -> None:
    check_choice(direction, ("greater", "less"), name="direction")
    if not 0 <= margin < float("inf"):
        raise UsageError(f"margin must be finite and at least 0, got {margin}")


@dataclass(frozen=True)
class _Pair:
    """Differences of one metric: where both runs are fine, and in the worst case."""

    n_seeds: int
    fine: _Array
    least: _Array  # favourable to the first
    most: _Array
    bounds: tuple[float, float] | None
    n_diverged: tuple[int, int]

    def p_value(self, claim: Primary) -> float:
        if not len(self.fine):
            return 1.0
        cases = (self.fine, self.least, self.most) if self.bounds else (self.fine,)
        return max(_p_beyond(d, claim.margin) for d in cases)

    def worst(self, *, confidence: float) -> tuple[float, float]:
        # The favourable case may reach further down: one run far off widens it.
        ends = [_of_pairs(d, confidence=confidence) for d in (self.least, self.most)]
        return min(end.low for end in ends), max(end.high for end in ends)


def _check_metrics(
    a: Mapping[str, Any], b: Mapping[str, Any], primary: Mapping[str, Primary]
) -> None:
    if a.keys() != b.keys():
        raise MetricError(
            f"a and b must hold the same metrics; only in a: "
            f"{[name for name in a if name not in b]}, only in b: "
            f"{[name for name in b if name not in a]}"
        )
    if not primary:
        raise UsageError(
            'primary is empty; declare at least one metric, as {"accuracy": '
            'rs.Primary("greater", margin=0.01)}'
        )
    for name, claim in primary.items():
        if name not in a:
            raise UnknownName(f"no primary metric {name!r} in a{suggest(name, a)}")
        _check_claim(claim.margin, claim.direction)


def _pair(name: str, a: Any, b: Any, claim: Primary | None) -> _Pair:
    (ours, named), (theirs, named_too) = (
        by_seed(values, name=f"{side}[{name!r}]", finite=False)
        for side, values in (("a", a), ("b", b))
    )
    if not (named and named_too):
        raise MetricError(f"a and b of {name!r} must map seed -> value")
    check_same_seeds(ours, theirs, where=f" of {name!r}")
    if not ours:
        raise NotEnoughSamples(f"a and b of {name!r} are empty; give at least 1 seed")
    x = np.array(list(ours.values()))
    y = np.array([theirs[seed] for seed in ours])
    lost = ~np.isfinite(x), ~np.isfinite(y)
    fine = (x - y)[~(lost[0] | lost[1])]
    n_diverged = int(lost[0].sum()), int(lost[1].sum())
    bounds = _bounds(name, np.concatenate([x[~lost[0]], y[~lost[1]]]), claim)
    if not any(n_diverged) or bounds is None:
        return _Pair(len(x), fine, fine, fine, None, n_diverged)
    low, high = bounds
    least = np.where(lost[0], low, x) - np.where(lost[1], high, y)
    most = np.where(lost[0], high, x) - np.where(lost[1], low, y)
    return _Pair(len(x), fine, least, most, bounds, n_diverged)


def _bounds(
    name: str, values: _Array, claim: Primary | None
) -> tuple[float, float] | None:
    if claim is None or claim.bounds is None:
        return (float(values.min()), float(values.max())) if len(values) else None
    low, high = claim.bounds
    outside = values[~((low <= values) & (values <= high))]
    if len(outside) or not np.isfinite([low, high]).all():
        raise UsageError(
            f"primary[{name!r}] must have finite bounds around every value, got "
            f"({low}, {high}) and a value of {outside[0] if len(outside) else low}"
        )
    return low, high


def _of_pairs(differences: _Array, *, confidence: float) -> Interval:
    if len(differences):
        found = mean_interval(differences, confidence=confidence)
        return replace(found, method=f"paired {found.method}")
    nan = float("nan")
    return Interval(nan, nan, nan, 0, "no pair without a diverged run")


def _p_beyond(differences: _Array, margin: float) -> float:
    """Return the sign-flip p of a difference no larger than the margin."""
    nearest = np.clip(differences.mean(), -margin, margin)
    return sign_flip_p(differences - nearest)


def _compared(
    name: str,
    pair: _Pair,
    claim: Primary | None,
    p_holm: float | None,
    *,
    confidence: float,
) -> Compared:
    interval = _of_pairs(pair.fine, confidence=confidence)
    worst_low, worst_high = pair.worst(confidence=confidence)
    if claim is not None:
        p_min = 2.0 ** (1 - interval.n) if interval.n else 1.0
        interval = replace(interval, p_value=pair.p_value(claim), p_min=p_min)
    row = Compared(
        metric=name,
        label="exploratory" if claim is None else "primary",
        interval=interval,
        worst_low=worst_low,
        worst_high=worst_high,
        bounds=pair.bounds,
        n_diverged=pair.n_diverged,
        primary=claim,
        p_holm=p_holm,
        verdict="",
        note="",
    )
    if claim is None or p_holm is None:
        return row
    if pair.n_seeds - interval.n > _MAX_DIVERGED * pair.n_seeds:
        return replace(row, verdict="not reported")
    return replace(row, verdict=_decide(row, claim, alpha=1 - confidence))


def _decide(row: Compared, claim: Primary, *, alpha: float) -> Verdict:
    worst = replace(row.interval, low=row.worst_low, high=row.worst_high)
    word, in_worst_case = (
        verdict(interval, margin=claim.margin, direction=claim.direction)
        for interval in (row.interval, worst)
    )
    if word != in_worst_case:
        return "not decided"
    fires = word in ("holds", "opposite sign")
    return "not decided" if fires and (row.p_holm or 0.0) > alpha else word


def _notes(row: Compared, *, n_primary: int, alpha: float) -> str:
    """Return what limits a row."""
    said = []
    n = row.interval.n
    if row.label == "primary" and n < _SEEDS_FOR_A_VERDICT:
        said.append(f"preview, n = {n}")
    p_min = row.interval.p_min
    if p_min is not None and n_primary * p_min > alpha:
        said.append(
            f"the smallest p of {n} seeds among {n_primary} primary metrics is "
            f"{min(1.0, n_primary * p_min):g}"
        )
    if any(row.n_diverged):
        said.append(f"diverged: {row.n_diverged[0]} of a, {row.n_diverged[1]} of b")
    return "; ".join(said)
