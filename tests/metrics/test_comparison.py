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
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError
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


def test_the_rule_rarely_fires_when_nothing_differs():
    rng = np.random.default_rng(0)
    for n in (5, 10):
        fired = [
            rs.verdict(
                rs.mean_interval(rng.normal(0, 1, n)), margin=0.0, direction="greater"
            )
            in {"holds", "opposite sign"}
            for _ in range(1500)
        ]
        assert np.mean(fired) <= 0.06


@pytest.mark.parametrize("margin", [-1.0, math.inf, math.nan])
def test_margins_and_directions_that_make_no_sense_are_named(margin):
    interval = Interval(0.0, -1.0, 1.0, 5, "t")
    with pytest.raises(UsageError, match="margin must be finite"):
        rs.verdict(interval, margin=margin, direction="greater")
    with pytest.raises(UsageError, match="direction='higher' is not one of"):
        rs.verdict(interval, margin=1.0, direction="higher")


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
