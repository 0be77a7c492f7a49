from __future__ import annotations

import math

import cases
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repscope as rs
from repscope.errors import (
    LabelError,
    LabelMismatch,
    MetricError,
    NonFiniteError,
    NotEnoughSamples,
    UsageError,
)
from repscope.metrics.units import OVERLAP_METRICS, UNIT_METRICS

Y = torch.arange(60).remainder(3) * 4 - 2  # labels -2, 2, 6


@pytest.fixture(name="X")
def activations():
    X = torch.relu(torch.randn(60, 10) + torch.linspace(-3, 2, 10))
    X[:, 0] = 0
    X[:, 1] = 0
    X[7, 1] = 0.3
    X[11] = 0
    return X


# -- dormant units -------------------------------------------------------------
def test_scores_are_sokars(X):
    signed = X - 0.4
    for activations in (X, signed):
        expected = oracles.sokar_scores(activations)
        np.testing.assert_allclose(rs.dormant_scores(activations), expected, rtol=1e-12)
        for tau in (0.0, 0.025, 0.5):
            found = rs.dormant_fraction(activations, tau=tau).item()
            assert found == np.mean([s <= tau for s in expected])
    assert rs.dormant_scores(X).mean().item() == pytest.approx(1)
    assert rs.dormant_fraction(X, tau=0).item() == 0.1
    assert rs.dormant_fraction(X).item() == 0.2  # one sample in 60 is next to nothing


def test_an_all_zero_layer_is_dormant_and_only_that_is():
    assert rs.dormant_fraction(torch.zeros(5, 4)).item() == 1
    assert rs.dormant_fraction(torch.zeros(5, 4), tau=0).item() == 1
    assert rs.dormant_scores(torch.zeros(5, 4)).tolist() == [0, 0, 0, 0]
    for X in (torch.full((5, 4), 1e-30), torch.eye(5)[:, :4] * 1e-40, torch.ones(5, 1)):
        assert rs.dormant_fraction(X, tau=0.999).item() < 1


def test_a_score_on_the_threshold_is_dormant():
    X = torch.tensor([[0.5, 1.5], [0.5, 1.5]])
    assert rs.dormant_fraction(X, tau=0.5).item() == 0.5
    assert rs.dormant_fraction(X, tau=0.499).item() == 0


@pytest.mark.parametrize("name", cases.CONSTANTS)
def test_constant_layers(name):
    X = cases.CONSTANTS[name]
    zero = name == "zeros"
    assert rs.dormant_fraction(X).item() == zero
    sparseness = rs.population_sparseness(X).item()
    assert math.isnan(sparseness) if zero else sparseness == pytest.approx(0, abs=1e-7)
    mean = rs.activation_overlap(X, torch.arange(len(X))).mean.item()
    assert math.isnan(mean) if zero else mean == pytest.approx(1)


@pytest.mark.parametrize("tau", [-0.1, 1.0, math.nan])
def test_a_threshold_that_makes_no_sense_is_named(X, tau):
    with pytest.raises(UsageError, match=r"tau must be in \[0, 1\), got"):
        rs.dormant_fraction(X, tau=tau)


# -- sparseness ----------------------------------------------------------------
def test_sparseness_is_that_of_treves_and_rolls(X):
    expected = oracles.treves_rolls(X)  # sample 11 is silent and left out
    assert rs.population_sparseness(X).item() == pytest.approx(expected, rel=1e-12)
    lifetime = oracles.treves_rolls(X.T)  # so is unit 0
    assert rs.population_sparseness(X.T).item() == pytest.approx(lifetime, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_k_equal_units_of_d_have_their_closed_form(k):
    X = torch.zeros(4, 10)
    X[torch.arange(4)[:, None], torch.stack([torch.randperm(10)[:k] for _ in X])] = 7
    assert rs.population_sparseness(X).item() == pytest.approx(1 - k / 10)
    # Half rectified Gaussians: 1 - 1/pi.
    wide = torch.randn(50, 20_000).relu()
    assert rs.population_sparseness(wide).item() == pytest.approx(
        1 - 1 / math.pi, abs=0.005
    )


def test_a_faint_sample_counts_as_much_as_a_strong_one():
    X = torch.tensor([[1e200, 1e200], [1e-200, 0.0]], dtype=torch.float64)
    assert rs.population_sparseness(X).item() == 0.25


# -- overlap -------------------------------------------------------------------
def test_overlap_is_the_mean_of_smaller_activations(X):
    found = rs.activation_overlap(X, Y)
    expected = oracles.overlap(X, Y)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-12)
    assert found.classes.tolist() == [-2, 2, 6]
    assert found.mean.item() == pytest.approx(oracles.off_diagonal_mean(expected))
    assert found.n_excluded == 0
    assert found.matrix.diagonal().tolist() == [1, 1, 1]
    assert torch.equal(found.matrix, found.matrix.mT)


def test_closed_forms_of_overlap():
    X = [[2.0, 2.0, 0.0, 0.0], [0.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 9.0]]
    found = rs.activation_overlap(X, [0, 1, 2])
    assert found.matrix.tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    assert found.mean.item() == pytest.approx(0.5 / 3)
    # A louder class of the same profile overlaps fully.
    loud = rs.activation_overlap([[1.0, 3.0], [20.0, 60.0]], [0, 1])
    assert loud.mean.item() == pytest.approx(1)


def test_a_class_without_active_units_is_excluded_and_counted():
    X = [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    found = rs.activation_overlap(X, [0, 1, 1, 2])
    assert found.n_excluded == 1
    assert found.matrix[1].isnan().all()
    assert found.matrix[:, 1].isnan().all()
    assert found.mean.item() == 0.5
    assert rs.activation_overlap(X, [0, 0, 0, 0]).mean.isnan()  # one class
    frame = found.to_frame()
    assert list(frame.columns) == ["class_a", "class_b", "overlap"]
    assert frame["overlap"].isna().sum() == 5
    assert frame.loc[2].tolist() == [0, 2, 0.5]


def test_tasks_in_place_of_classes():
    first, second = torch.rand(20, 6), torch.rand(30, 6)
    task = torch.tensor([1] * 20 + [2] * 30)
    found = rs.activation_overlap(torch.cat([first, second]), task)
    a, b = (x.double().mean(0) / x.double().mean() for x in (first, second))
    assert found.mean.item() == pytest.approx(torch.minimum(a, b).mean().item())


# -- laws ----------------------------------------------------------------------
@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 9), st.floats(0.01, 90)
)
def test_laws(seed, n, d, factor):
    torch.manual_seed(seed)
    X = torch.randn(n, d, dtype=torch.float64).relu()
    y = torch.randint(3, (n,))
    units = torch.randperm(d)

    def read(X, y):
        values = [metric(X) for metric in UNIT_METRICS.values()]
        values += [metric(X, y) for metric in OVERLAP_METRICS.values()]
        return pytest.approx([v.item() for v in values], nan_ok=True, abs=1e-9)

    def plain(X, y):
        return read(X, y).expected

    expected = read(X, y)
    order = torch.randperm(n)
    assert plain(X[order], y[order]) == expected
    assert plain(X[:, units], y) == expected
    assert plain(X * factor, y) == expected
    assert plain(X.repeat(2, 1), y.repeat(2)) == expected  # the same samples twice
    assert plain(X.repeat(1, 2), y) == expected  # each unit twice
    assert plain(X, 50 - y) == expected
    assert all(0 <= v <= 1 or math.isnan(v) for v in plain(X, y))
    matrix = rs.activation_overlap(X, y).matrix
    # 1 - overlap is a metric.
    gaps = 1 - matrix
    sums = gaps[:, :, None] + gaps[None]
    assert not (gaps[:, None] > sums + 1e-9).any()


@pytest.mark.parametrize("scale", [1e20, 1e-25, 2e307, 1e-300])
def test_no_scale_overflows(X, scale):
    X = X.double()
    for metric in UNIT_METRICS.values():
        assert metric(X * scale).item() == pytest.approx(metric(X).item())
    for metric in OVERLAP_METRICS.values():
        assert metric(X * scale, Y).item() == pytest.approx(metric(X, Y).item())


# -- bad input -----------------------------------------------------------------
@pytest.mark.parametrize("metric", UNIT_METRICS.values(), ids=UNIT_METRICS)
@pytest.mark.parametrize(
    ("X", "error", "text"),
    [
        (torch.ones(1, 2), NotEnoughSamples, "at least 2"),
        (torch.ones(2), MetricError, r"\(..., n_samples, n_features\)"),
        (torch.ones(2, 0), MetricError, "X is empty"),
        ([[1.0], [math.inf]], NonFiniteError, "X has 1 non-finite"),
    ],
)
def test_bad_input_is_named(metric, X, error, text):
    with pytest.raises(error, match=text):
        metric(X)


@pytest.mark.parametrize(
    ("X", "y", "error", "text"),
    [
        (torch.ones(4, 2), [0, 1], LabelMismatch, r"got \(2,\)"),
        (torch.ones(2, 2), [0.0, 1.0], LabelError, "must be integers"),
        (torch.ones(2, 2, 2), [0, 1], MetricError, r"\(n_samples, n_features\)"),
        ([[1.0], [math.nan]], [0, 1], NonFiniteError, "X has 1 non-finite"),
    ],
)
def test_bad_labels_are_named(X, y, error, text):
    with pytest.raises(error, match=text):
        rs.activation_overlap(X, y)


def test_negative_activations_have_no_sparseness_and_no_overlap():
    X = torch.tensor([[1.0, -0.125], [1.0, 1.0]])
    for call in (rs.population_sparseness, lambda X: rs.activation_overlap(X, [0, 1])):
        with pytest.raises(MetricError, match=r"X must be >= 0.*entry of -0.125"):
            call(X)
    assert rs.population_sparseness(X.relu()) > 0
