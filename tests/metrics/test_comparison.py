from __future__ import annotations

import math

import numpy as np
import oracles
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repscope as rs
from repscope.errors import (
    MetricError,
    NonFiniteError,
    NotEnoughSamples,
    UnknownName,
    UsageError,
)
from repscope.metrics.comparison import band
from repscope.results import Interval

VALUES = [93.1, 92.4, 95.0, 91.8, 94.2]
OTHERS = [92.0, 92.6, 93.1, 90.0, 93.9]


# -- intervals ---------------------------------------------------------------
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_mean_interval_is_scipys(confidence):
    found = rs.mean_interval(VALUES, confidence=confidence)
    expected = scipy.stats.t.interval(
        confidence, 4, np.mean(VALUES), scipy.stats.sem(VALUES)
    )
    assert found.estimate == pytest.approx(np.mean(VALUES))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.method) == (5, f"t, {100 * confidence:g} %")
    assert (found.p_value, found.p_min) == (None, None)


def test_values_may_come_in_any_container():
    expected = rs.mean_interval(VALUES)
    for values in (
        torch.tensor(VALUES, dtype=torch.float64),
        np.array(VALUES),
        pd.Series(VALUES),
        dict(enumerate(VALUES)),
    ):
        assert rs.mean_interval(values) == expected


def test_one_value_has_no_interval_and_none_is_refused():
    found = rs.mean_interval([3.0])
    assert (found.estimate, found.n) == (3.0, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    for empty in ([], {}):
        with pytest.raises(NotEnoughSamples, match="values is empty"):
            rs.mean_interval(empty)


def test_paired_difference_is_scipys_paired_t():
    found = rs.paired_difference(
        dict(enumerate(VALUES)), dict(reversed(list(enumerate(OTHERS))))
    )
    expected = scipy.stats.ttest_rel(VALUES, OTHERS).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.estimate == pytest.approx(np.mean(VALUES) - np.mean(OTHERS))
    assert found.method == "paired t, 95 %"
    differences = np.subtract(VALUES, OTHERS)
    assert found.p_value == pytest.approx(oracles.sign_flip_p(differences))
    assert found.p_min == 2 / 2**5


def test_pairs_are_matched_by_seed_or_openly_by_position():
    a, b = {7: 1.0, 3: 5.0}, {3: 4.0, 7: 3.0}
    assert rs.paired_difference(a, b).estimate == -0.5
    assert rs.paired_difference(pd.Series(a), pd.Series(b)).estimate == -0.5
    by_position = rs.paired_difference([1.0, 5.0], np.array([4.0, 3.0]))
    assert by_position.method == "paired t by position, 95 %"


@settings(deadline=None, max_examples=40)
@given(
    differences=st.lists(st.integers(-4, 4), min_size=1, max_size=9).map(
        lambda d: [0.1 * v for v in d]
    )
)
def test_sign_flip_p_counts_every_pattern_and_its_ties(differences):
    found = rs.paired_difference(differences, [0.0] * len(differences))
    assert found.p_value == pytest.approx(oracles.sign_flip_p(differences))
    assert found.p_min <= found.p_value <= 1


def test_twenty_seeds_are_exact_and_beyond_forty_there_is_no_p():
    d = list(range(1, 21))
    found = rs.paired_difference(d, [0] * 20)
    assert found.p_value == found.p_min == 2 / 2**20
    d[0] = -1
    assert rs.paired_difference(d, [0] * 20).p_value == 4 / 2**20
    assert rs.paired_difference([1] * 40, [0] * 40).p_value == 2 / 2**40
    many = rs.paired_difference(range(41), [0] * 41)
    assert (many.p_value, many.p_min) == (None, None)
    assert many.method.endswith("no p above 40 seeds")


def test_one_pair_has_a_p_of_one():
    found = rs.paired_difference([3.0], [1.0])
    assert (found.estimate, found.p_value, found.p_min) == (2.0, 1.0, 1.0)
    assert math.isnan(found.low)


@pytest.mark.parametrize(
    ("a", "b", "error", "text"),
    [
        ({0: 1.0, 1: 2.0}, {0: 1.0, 5: 2.0}, MetricError, r"only in a: \[1\].*: \[5\]"),
        ([1.0, 2.0], [1.0], MetricError, r"only in a: \[1\], only in b: \[\]"),
        ({0: 1.0}, [1.0], MetricError, "both map seed -> value"),
        ({}, {}, NotEnoughSamples, "a and b are empty"),
        (
            {"s1": math.nan},
            {"s1": 1.0},
            NonFiniteError,
            r"a\['s1'\] is nan; a diverged",
        ),
        ({0: 1.0}, {0: math.inf}, NonFiniteError, r"b\[0\] is inf"),
        ([[1.0]], [[1.0]], MetricError, r"one number per seed, got shape \(1, 1\)"),
        (
            pd.Series([1.0, 2.0], index=[4, 4]),
            pd.Series([1.0], index=[4]),
            MetricError,
            r"a has more than one value for seeds \[4\]",
        ),
    ],
)
def test_pairs_that_do_not_match_are_refused_by_name(a, b, error, text):
    with pytest.raises(error, match=text):
        rs.paired_difference(a, b)


@settings(deadline=None, max_examples=20)
@given(differences=st.lists(st.integers(-9, 9), min_size=2, max_size=8))
def test_sign_flip_p_is_scipys_permutation_test(differences):
    d = np.array(differences, dtype=float)
    found = scipy.stats.permutation_test(
        (d, np.zeros_like(d)),
        lambda x, y, axis: np.abs((x - y).mean(axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=True,
    )
    ours = rs.paired_difference(d, np.zeros_like(d)).p_value
    assert ours == pytest.approx(found.pvalue)


# -- the bootstrap -----------------------------------------------------------
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_bca_is_scipys_from_the_same_draws(confidence):
    values = np.random.default_rng(5).exponential(size=30)
    found = rs.mean_interval(values, confidence=confidence, method="bca", seed=7)
    expected = scipy.stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)
    assert (found.n, found.method) == (30, f"BCa, {100 * confidence:g} %")
    scaled = rs.mean_interval(
        values * 1e150, confidence=confidence, method="bca", seed=7
    )
    assert scaled.high / 1e150 == pytest.approx(found.high)


def test_bca_of_pairs_keeps_the_exact_p_and_the_draws_of_its_seed():
    a, b = np.random.default_rng(1).normal(size=(2, 20))
    found = rs.paired_difference(a, b, method="bca")
    assert found.method == "paired BCa by position, 95 %"
    assert found == rs.paired_difference(a, b, method="bca")
    assert found.low != rs.paired_difference(a, b, method="bca", seed=1).low
    assert found.p_value == rs.paired_difference(a, b).p_value
    equal = rs.mean_interval([0.3] * 20, method="bca")
    assert (equal.low, equal.high) == pytest.approx((0.3, 0.3))


def test_bca_of_few_seeds_is_refused_with_what_was_measured():
    text = r"at least 20 seeds, got 19: .* too often .* 15 % at 5.* use method=\"t\""
    with pytest.raises(UsageError, match=text):
        rs.mean_interval(range(19), method="bca")
    with pytest.raises(UsageError, match=text):
        rs.paired_difference(range(19), [0] * 19, method="bca")
    with pytest.raises(UsageError, match="method='BCa' is not one of"):
        rs.mean_interval(range(20), method="BCa")


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_confidence_is_a_probability(confidence):
    with pytest.raises(UsageError, match=r"confidence must lie in \(0, 1\)"):
        rs.mean_interval(VALUES, confidence=confidence)


# -- the verdict: known answers, never the outcome of a study ----------------
@pytest.mark.parametrize(
    ("low", "high", "greater", "less"),
    [
        (1.1, 5.0, "holds", "opposite sign"),
        (-5.0, -1.1, "opposite sign", "holds"),
        (-0.9, 0.9, "no difference", "no difference"),
        (0.2, 0.8, "no difference", "no difference"),
        (-1.0, 1.0, "no difference", "no difference"),
        (0.5, 3.0, "not decided", "not decided"),
        (1.0, 3.0, "not decided", "not decided"),
        (-3.0, 3.0, "not decided", "not decided"),
        (math.nan, math.nan, "not decided", "not decided"),
    ],
)
def test_verdict_on_intervals_with_known_answers(low, high, greater, less):
    interval = Interval((low + high) / 2, low, high, 5, "t")
    assert rs.verdict(interval, margin=1.0, direction="greater") == greater
    assert rs.verdict(interval, margin=1.0, direction="less") == less


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(4.0, "holds"), (-4.0, "opposite sign"), (0.0, "no difference")],
)
def test_verdict_on_synthetic_seeds(shift, expected):
    rng = np.random.default_rng(3)
    base = rng.normal(90, 5, 10)
    other = base + rng.normal(0, 0.3, 10)
    found = rs.paired_difference(base + shift, other)
    assert rs.verdict(found, margin=1.0, direction="greater") == expected


def test_verdict_is_not_decided_by_few_noisy_seeds():
    found = rs.paired_difference([90.0, 97.0, 88.0], [89.0, 91.0, 90.0])
    assert found.estimate > 1
    assert rs.verdict(found, margin=1.0, direction="greater") == "not decided"


@settings(deadline=None, max_examples=40)
@given(
    differences=st.lists(st.floats(-2, 2), min_size=2, max_size=12),
    confidence=st.sampled_from([0.9, 0.95]),
)
def test_no_difference_is_what_two_one_sided_tests_say(differences, confidence):
    d = np.array(differences) + np.linspace(0, 0.1, len(differences))
    found = rs.paired_difference(d, np.zeros_like(d), confidence=confidence)
    p = max(
        scipy.stats.ttest_1samp(d, -1.0, alternative="greater").pvalue,
        scipy.stats.ttest_1samp(d, 1.0, alternative="less").pvalue,
    )
    alpha = (1 - confidence) / 2
    if abs(p - alpha) > 1e-9:
        equivalent = rs.verdict(found, margin=1.0, direction="less") == "no difference"
        assert equivalent == (p < alpha)


@pytest.mark.parametrize("margin", [-1.0, math.inf, math.nan])
def test_margins_and_directions_that_make_no_sense_are_named(margin):
    interval = Interval(0.0, -1.0, 1.0, 5, "t")
    with pytest.raises(UsageError, match="margin must be finite"):
        rs.verdict(interval, margin=margin, direction="greater")
    with pytest.raises(UsageError, match="direction='higher' is not one of"):
        rs.verdict(interval, margin=1.0, direction="higher")


# -- many metrics ------------------------------------------------------------
@settings(deadline=None, max_examples=40)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_over_all_subsets(p):
    found = rs.holm({f"m{i}": value for i, value in enumerate(p)})
    assert found.adjusted == pytest.approx(oracles.closed_bonferroni(p))
    assert all(x >= y for x, y in zip(found.adjusted, found.p_values, strict=True))


def test_holm_keeps_the_names_and_the_order():
    found = rs.holm({"rank": 0.04, "accuracy": 0.01, "forgetting": 0.03})
    assert found.metrics == ("rank", "accuracy", "forgetting")
    assert found.adjusted == pytest.approx((0.06, 0.03, 0.06))
    frame = found.to_frame()
    assert frame.columns.tolist() == ["metric", "p_value", "p_holm"]
    assert frame["p_holm"].tolist() == pytest.approx([0.06, 0.03, 0.06])


@pytest.mark.parametrize(
    ("p", "error", "text"),
    [
        ({}, UsageError, "at least one declared primary metric"),
        ([0.1], UsageError, r"must map .* got \[0.1\]"),
        (
            {"rank": 1.5},
            MetricError,
            r"\['rank'\] must lie in \[0, 1\], got 1.5",
        ),
        ({"rank": math.nan}, MetricError, "got nan"),
    ],
)
def test_holm_takes_named_probabilities(p, error, text):
    with pytest.raises(error, match=text):
        rs.holm(p)


def runs(n=10, shift=0.0, seed=0, spread=0.3):
    """Return two conditions whose first is ``shift`` above the second."""
    rng = np.random.default_rng(seed)
    second = rng.normal(50, 5, n)
    first = second + shift + rng.normal(0, spread, n)
    return dict(enumerate(first)), dict(enumerate(second))


def both(**metrics):
    return (
        {name: pair[0] for name, pair in metrics.items()},
        {name: pair[1] for name, pair in metrics.items()},
    )


def test_primary_metrics_have_a_verdict_and_the_others_no_p():
    a, b = both(loss=runs(shift=-9), rank=runs(shift=-4), cosine=runs(shift=0))
    claims = {
        "rank": rs.Primary("less", margin=1.0),
        "cosine": rs.Primary("greater", margin=1.0),
    }
    found = rs.compare(a, b, primary=claims)
    assert [row.metric for row in found.rows] == ["rank", "cosine", "loss"]
    assert [row.verdict for row in found.rows] == ["holds", "no difference", ""]
    rank, loss = found["rank"], found["loss"]
    pair = rs.paired_difference(a["rank"], b["rank"])
    assert (rank.interval.low, rank.interval.high) == (pair.low, pair.high)
    assert (rank.worst_low, rank.worst_high) == (pair.low, pair.high)
    assert (rank.interval.p_value, rank.interval.p_min) == (2**-9, 2**-9)
    assert rank.p_holm == 2 * 2**-9
    assert (loss.label, loss.p_holm, loss.interval.p_value) == (
        "exploratory",
        None,
        None,
    )
    assert found["cosine"].p_holm == 1.0
    frame = found.to_frame()
    assert frame["p_holm"].isna().tolist() == [False, False, True]
    assert frame["margin"].tolist()[:2] == [1.0, 1.0]
    assert frame["low"].notna().all()
    again = rs.compare(pd.DataFrame(a), pd.DataFrame(b), primary=claims)
    assert again == found


def test_p_is_of_a_difference_no_larger_than_the_margin():
    a, b = both(rank=runs(shift=1.3, spread=0.5))
    d = np.subtract(list(a["rank"].values()), list(b["rank"].values()))
    assert 1 < d.mean() < 1.5
    for margin, nearest in ((0.0, 0.0), (1.0, 1.0), (2.0, d.mean())):
        claim = rs.Primary("greater", margin=margin)
        found = rs.compare(a, b, primary={"rank": claim})["rank"]
        expected = oracles.sign_flip_p(d - nearest)
        assert found.interval.p_value == pytest.approx(expected)


def test_an_interval_beyond_the_margin_needs_a_p_to_hold():
    a, b = both(**{f"m{i}": runs(n=8, shift=3, seed=i) for i in range(7)})
    claims = {name: rs.Primary("greater", margin=0.0) for name in a}
    one = rs.compare(a, b, primary={"m0": claims["m0"]})["m0"]
    assert (one.verdict, one.note) == ("holds", "preview, n = 8")
    seven = rs.compare(a, b, primary=claims)["m0"]
    assert seven.interval.low > 0
    assert seven.p_holm == pytest.approx(7 / 128)
    assert seven.verdict == "not decided"
    assert "smallest p of 8 seeds among 7 primary metrics is 0.0546875" in seven.note


def test_the_label_of_a_claim_swaps_with_its_sides_and_direction():
    a, b = both(rank=runs(shift=3))
    up, down = (rs.Primary(way, margin=1.0) for way in ("greater", "less"))
    assert rs.compare(a, b, primary={"rank": up})["rank"].verdict == "holds"
    assert rs.compare(b, a, primary={"rank": down})["rank"].verdict == "holds"
    assert rs.compare(b, a, primary={"rank": up})["rank"].verdict == "opposite sign"


# -- diverged runs -----------------------------------------------------------
def test_diverged_runs_are_counted_left_out_and_given_the_worst():
    a, b = both(accuracy=runs(n=20, shift=8.0))
    a["accuracy"][3], b["accuracy"][7] = math.nan, math.inf
    claim = rs.Primary("greater", margin=1.0, bounds=(0.0, 100.0))
    found = rs.compare(a, b, primary={"accuracy": claim})["accuracy"]
    assert found.n_diverged == (1, 1)
    assert found.note == "diverged: 1 of a, 1 of b"
    fine = [seed for seed in range(20) if seed not in (3, 7)]
    kept = rs.paired_difference(
        {s: a["accuracy"][s] for s in fine}, {s: b["accuracy"][s] for s in fine}
    )
    assert (found.interval.low, found.interval.high, found.interval.n) == (
        kept.low,
        kept.high,
        18,
    )
    ends = []
    for ours, theirs in ((0.0, 100.0), (100.0, 0.0)):
        worst = rs.paired_difference(
            a["accuracy"] | {3: ours}, b["accuracy"] | {7: theirs}
        )
        ends.append(worst)
    assert found.worst_low == pytest.approx(min(end.low for end in ends))
    assert found.worst_high == pytest.approx(max(end.high for end in ends))
    assert found.verdict == "not decided"
    assert rs.verdict(kept, margin=1.0, direction="greater") == "holds"


def test_the_worst_case_is_the_wider_of_two():
    a, b = both(accuracy=runs(n=20, shift=-40.0))
    a["accuracy"][3] = math.nan
    claim = rs.Primary("less", margin=1.0, bounds=(-10.0, 100.0))
    found = rs.compare(a, b, primary={"accuracy": claim})["accuracy"]
    # At its upper bound the lost run is far from the others: a wide interval.
    wide = rs.paired_difference(a["accuracy"] | {3: 100.0}, b["accuracy"])
    assert (found.worst_low, found.worst_high) == pytest.approx((wide.low, wide.high))
    assert found.verdict == "holds"


def test_the_extremes_that_were_seen_bound_what_has_no_bounds():
    a, b = both(rank=runs(n=20, shift=30.0, spread=1.0), loss=runs(n=20))
    a["rank"][0] = a["loss"][0] = math.nan
    claim = rs.Primary("greater", margin=1.0)
    found = rs.compare(a, b, primary={"rank": claim})
    row = found["rank"]
    fine = [v for v in [*a["rank"].values(), *b["rank"].values()] if math.isfinite(v)]
    assert row.bounds == (min(fine), max(fine))
    assert row.worst_low < row.interval.low < row.interval.high < row.worst_high
    assert row.verdict == "holds"
    for end in (min(fine), max(fine)):
        filled = {s: v - 1.0 for s, v in (a["rank"] | {0: end}).items()}
        assert rs.paired_difference(filled, b["rank"]).p_value <= row.interval.p_value
    assert found["loss"].n_diverged == (1, 0)
    assert found["loss"].worst_low < found["loss"].interval.low


def test_too_many_diverged_runs_are_not_reported():
    a, b = both(rank=runs(shift=30.0))
    claim = {"rank": rs.Primary("greater", margin=1.0)}
    a["rank"][0] = math.nan
    assert rs.compare(a, b, primary=claim)["rank"].verdict != "not reported"
    a["rank"][1] = math.nan
    assert rs.compare(a, b, primary=claim)["rank"].verdict == "not reported"
    a["rank"] = dict.fromkeys(range(10), math.nan)
    nothing = rs.compare(a, b, primary=claim)["rank"]
    assert (nothing.verdict, nothing.interval.n, nothing.p_holm) == (
        "not reported",
        0,
        1.0,
    )
    assert math.isnan(nothing.interval.estimate)
    b["rank"] = a["rank"]
    assert rs.compare(a, b, primary=claim)["rank"].n_diverged == (10, 10)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"a": {}},
            MetricError,
            r"metrics; only in a: \[\], only in b: \['rank'\]",
        ),
        ({"primary": {}}, UsageError, "primary is empty; declare at least one"),
        (
            {"primary": {"rnak": rs.Primary("less", 1.0)}},
            UnknownName,
            "no primary metric 'rnak' in a; did you mean 'rank'",
        ),
        (
            {"primary": {"rank": rs.Primary("less", -1.0)}},
            UsageError,
            "margin must be finite and at least 0, got -1.0",
        ),
        (
            {"primary": {"rank": rs.Primary("lower", 1.0)}},
            UsageError,
            "direction='lower' is not one of",
        ),
        (
            {"primary": {"rank": rs.Primary("less", 1.0, bounds=(0, 2.5))}},
            UsageError,
            r"primary\['rank'\] must have finite bounds .* \(0, 2.5\) and a value of 3",
        ),
        (
            {"primary": {"rank": rs.Primary("less", 1.0, bounds=(0, math.inf))}},
            UsageError,
            "finite bounds",
        ),
        ({"a": {"rank": [1.0, 2.0]}}, MetricError, "of 'rank' must map seed -> value"),
        (
            {"a": {"rank": {0: 1.0, 5: 2.0}}},
            MetricError,
            r"a and b of 'rank' must hold the same seeds; only in a: \[5\]",
        ),
        ({"a": {"rank": {}}, "b": {"rank": {}}}, NotEnoughSamples, "'rank' are empty"),
        ({"confidence": 95}, UsageError, "confidence must lie in"),
        (
            {side: {"rank": dict.fromkeys(range(41), 1.0)} for side in "ab"},
            UsageError,
            "an exact p needs at most 40 seeds, got 41",
        ),
    ],
)
def test_comparisons_that_make_no_sense_are_named(change, error, text):
    usual = {
        "a": {"rank": {0: 1.0, 1: 2.0}},
        "b": {"rank": {0: 3.0, 1: 2.0}},
        "primary": {"rank": rs.Primary("less", 1.0)},
    }
    with pytest.raises(error, match=text):
        rs.compare(**(usual | change))


# -- bands -------------------------------------------------------------------
def test_a_band_is_the_interval_at_every_point():
    curves = np.random.default_rng(0).normal(size=(5, 7))
    curves[2, 3:] = np.nan
    curves[1:, 6] = np.nan
    curves[:, 5] = np.nan
    found = band(dict(enumerate(curves)), x=range(7))
    assert found.n.tolist() == [5, 5, 5, 4, 4, 0, 1]
    for i in (0, 3):
        column = curves[:, i][~np.isnan(curves[:, i])]
        point = rs.mean_interval(column)
        assert found.estimate[i].item() == pytest.approx(point.estimate)
        assert found.low[i].item() == pytest.approx(point.low)
        assert found.high[i].item() == pytest.approx(point.high)
    assert found.estimate[6].item() == pytest.approx(curves[0, 6])
    assert found.low[5:].isnan().all()
    assert found.high[5:].isnan().all()
    assert found.estimate[5].isnan()
    assert found.x.tolist() == list(range(7))


def test_curves_that_do_not_fit_are_named():
    with pytest.raises(MetricError, match=r"curves\['s2'\] and x .* \(2,\) and \(3,\)"):
        band({"s1": [1.0, 2.0, 3.0], "s2": [1.0, 2.0]}, x=[0, 1, 2])
    with pytest.raises(NonFiniteError, match=r"curves\[1\] holds infinity"):
        band([[1.0], [math.inf]], x=[0])
    with pytest.raises(MetricError, match="curves is empty"):
        band([], x=[0])
