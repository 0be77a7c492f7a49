"""How often the rule for verdicts fires when nothing differs, by simulation.

The table of docs/explanation/honest-comparison.md is this file at `DOCUMENTED` trials.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import repscope as rs
from repscope.metrics.comparison import band
from repscope.metrics.comparison.intervals import bca_bounds, sign_flip_p
from repscope.results import Interval

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "honest-comparison.md"
SEEDS = (5, 10, 20)
DOCUMENTED = 20_000
FIRES = {"holds", "opposite sign"}

# Differences between two runs of equal seed that in truth differ by 0 on average.
DIFFERENCES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy tails (t, 3 degrees of freedom)": lambda rng, s: rng.standard_t(3, s),
    "one seed in ten is far off": lambda rng, shape: (
        rng.normal(size=shape) * np.where(rng.random(shape) < 0.1, 10.0, 1.0)
    ),
    "skewed (exponential)": lambda rng, shape: rng.exponential(size=shape) - 1,
}
SYMMETRIC = [name for name in DIFFERENCES if not name.startswith("skewed")]


def verdicts(differences, *, margin):
    """Return the verdict on each column of differences (n_seeds, n_trials)."""
    n, trials = differences.shape
    # A band is the interval of `paired_difference` at every column at once.
    found = band(differences, x=np.arange(trials))
    ends = zip(found.low.tolist(), found.high.tolist(), strict=True)
    return [
        rs.verdict(Interval(0.0, low, high, n, "t"), margin=margin, direction="greater")
        for low, high in ends
    ]


def rate(draw, n, *, trials, margin=0.0, shift=0.0, fires=FIRES, with_p=False):
    """Return how often a verdict is among ``fires`` (and p at most 0.05)."""
    d = draw(np.random.default_rng(n), (n, trials)) + shift
    fired = np.array([word in fires for word in verdicts(d, margin=margin)])
    if with_p:
        fired[fired] = [sign_flip_p(column) <= 0.05 for column in d.T[fired]]
    return float(fired.mean())


def of_family(n, *, trials, n_metrics=5):
    """Return how often any of some related primary metrics fires, Holm included."""
    rng = np.random.default_rng(n)
    names = [f"m{i}" for i in range(n_metrics)]
    claims = {name: rs.Primary("greater", margin=0.0) for name in names}
    zeros = {name: dict.fromkeys(range(n), 0.0) for name in names}
    fired = 0
    for _ in range(trials):
        # Metrics of one run are correlated: half of the variance is common.
        d = rng.normal(size=(n_metrics, n)) + rng.normal(size=n)
        a = {name: dict(enumerate(row)) for name, row in zip(names, d, strict=True)}
        found = rs.compare(a, zeros, primary=claims)
        fired += bool(FIRES & {row.verdict for row in found.rows})
    return fired / trials


def by_bootstrap(n, *, trials):
    rng = np.random.default_rng(n)
    ends = [
        bca_bounds(rng.normal(size=n), confidence=0.95, seed=i) for i in range(trials)
    ]
    return float(np.mean([low > 0 or high < 0 for low, high in ends]))


def documented():
    """Return the table of the page: row -> rates in per cent."""
    rows = re.findall(r"^\| ([^|]+) ((?:\| [\d.]+ % )+)\|$", PAGE.read_text(), re.M)
    return {name.strip(): [float(x) for x in re.findall(r"[\d.]+", cells)]
            for name, cells in rows}  # fmt: skip


# -- fast --------------------------------------------------------------------
@pytest.mark.parametrize("n", SEEDS)
@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_rule_rarely_fires_when_nothing_differs(name, n):
    draw = DIFFERENCES[name]
    with_p = rate(draw, n, trials=4000, with_p=True)
    assert with_p <= 0.06
    assert with_p <= rate(draw, n, trials=4000)
    assert (with_p == 0) == (n == 5), "five seeds cannot have a p of 0.05"


@pytest.mark.parametrize("n", SEEDS)
def test_a_difference_of_the_margin_rarely_holds_or_is_none(n):
    at = {"margin": 1.0, "shift": 1.0, "trials": 4000}
    normal = DIFFERENCES["normal"]
    assert rate(normal, n, fires={"holds"}, **at) <= 0.035

    def narrow(rng, shape):
        return 0.3 * normal(rng, shape)

    assert rate(narrow, n, fires={"no difference"}, **at) <= 0.035
    assert rate(normal, n, fires={"opposite sign"}, **at) <= 0.01


@pytest.mark.parametrize("n", SEEDS)
def test_columns_of_a_band_are_the_pairs_of_the_rule(n):
    d = np.random.default_rng(0).normal(size=(n, 20)) + 1
    for column, word in zip(d.T, verdicts(d, margin=0.5), strict=True):
        pair = rs.paired_difference(column, np.zeros(n))
        assert rs.verdict(pair, margin=0.5, direction="greater") == word


@pytest.mark.parametrize("n", SEEDS)
def test_of_many_primary_metrics_rarely_any_fires(n):
    assert of_family(n, trials=100) <= 0.1


# -- the documented table ----------------------------------------------------
def measured():
    rows = {
        f"{name}, {how}": [
            rate(draw, n, trials=DOCUMENTED, with_p=with_p) for n in SEEDS
        ]
        for name, draw in DIFFERENCES.items()
        for how, with_p in (("interval alone", False), ("with p", True))
    }
    return rows | {
        "any of five primary metrics": [of_family(n, trials=2000) for n in SEEDS],
        "normal, BCa interval": [by_bootstrap(n, trials=4000) for n in SEEDS],
    }


@pytest.mark.slow
def test_the_documented_rates_are_what_is_measured():
    found = measured()
    for name, rates in found.items():
        cells = " | ".join(f"{100 * share:.1f} %" for share in rates)
        print(f"| {name} | {cells} |")
    table = documented()
    assert table.keys() == found.keys()
    for name, rates in found.items():
        assert table[name] == pytest.approx([100 * r for r in rates], abs=0.15), name
        if name.endswith("with p") and not name.startswith("skewed"):
            assert max(rates) <= 0.06, name
    assert max(found["any of five primary metrics"]) <= 0.06
