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
from repscope.metrics.alignment import (
    ALIGNMENT_METRICS,
    centred_cosine_std,
    class_norm_cv,
    mean_share,
)


@pytest.fixture
def data():
    X = torch.relu(torch.randn(90, 6) + torch.randn(6))
    y = torch.cat([torch.full((5,), 9), torch.full((50,), 2), torch.full((35,), 4)])
    return X, y[torch.randperm(90)]


def test_class_means_are_in_order_of_the_label(data):
    X, y = data
    found = rs.class_means(X, y)
    expected = [X[y == label].double().mean(0) for label in (2, 4, 9)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("center", [False, True])
def test_cosine_of_means_is_sklearns(data, center):
    found = rs.class_cosine(*data, center=center)
    expected = oracles.class_cosine_means(*data, center=center)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-12)
    assert found.classes.tolist() == [2, 4, 9]
    assert found.n_excluded == 0
    mean = rs.cross_class_cosine(*data, center=center).item()
    assert mean == pytest.approx(oracles.off_diagonal_mean(expected))


def test_cosine_of_pairs_is_the_mean_over_all_pairs(data):
    X, y = data
    found = rs.class_cosine(X, y, of="pairs")
    expected = oracles.class_cosine_pairs(X, y)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-12)
    mean = rs.cross_class_cosine(X, y, of="pairs").item()
    # Over class pairs: the class of 5 weighs as much as the class of 50.
    assert mean == pytest.approx(oracles.off_diagonal_mean(expected))


@pytest.mark.parametrize("n_classes", [2, 5, 10])
@pytest.mark.parametrize("offset", [0.0, 0.3, 2.0])
def test_a_simplex_with_an_offset_has_its_closed_form(n_classes, offset):
    X, y, cosine = cases.etf_with_offset(n_classes, offset)
    assert rs.cross_class_cosine(X, y).item() == pytest.approx(cosine, abs=1e-12)
    share = offset**2 / (offset**2 + 1)
    assert mean_share(X, y).item() == pytest.approx(share, abs=1e-12)
    assert rs.class_cosine(X, y).mean_share.item() == pytest.approx(share, abs=1e-12)
    # Centring removes the offset: -1/(C-1), whatever was learned.
    centred = rs.cross_class_cosine(X, y, center=True).item()
    assert centred == pytest.approx(-1 / (n_classes - 1))
    norms = rs.class_cosine(X, y, center=True).norms
    torch.testing.assert_close(norms, torch.ones(n_classes, dtype=torch.float64))


def test_spreads_are_numpys(data):
    X, y = data
    centred = oracles.class_cosine_means(X, y, center=True)
    off = centred[~np.eye(3, dtype=bool)]
    assert centred_cosine_std(X, y).item() == pytest.approx(off.std(), abs=1e-12)
    means = np.stack([X[y == c].double().numpy().mean(0) for c in (2, 4, 9)])
    norms = np.linalg.norm(means, axis=1)
    assert class_norm_cv(X, y).item() == pytest.approx(norms.std() / norms.mean())
    found = rs.class_cosine(X, y)
    assert found.counts.tolist() == [50, 35, 5]
    torch.testing.assert_close(found.norms, torch.from_numpy(norms))
    assert found.centred_std == centred_cosine_std(X, y)
    assert found.norm_cv == class_norm_cv(X, y)
    norms = np.linalg.norm(means - means.mean(0), axis=1)
    centred_cv = rs.class_cosine(X, y, center=True).norm_cv.item()
    assert centred_cv == pytest.approx(norms.std() / norms.mean())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), n_classes=st.integers(2, 8))
def test_equal_norms_make_the_cosine_a_function_of_the_share(seed, n_classes):
    means = np.random.default_rng(seed).normal(size=(n_classes, 5)) + 0.5
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    y = range(n_classes)
    share = mean_share(means, y).item()
    expected = share - (1 - share) / (n_classes - 1)
    assert rs.cross_class_cosine(means, y).item() == pytest.approx(expected)
    assert class_norm_cv(means, y).item() == pytest.approx(0, abs=1e-7)


def test_a_simplex_has_no_spread_whatever_its_offset():
    X, y, _ = cases.etf_with_offset(6, 2.0)
    assert centred_cosine_std(X, y).item() == pytest.approx(0, abs=1e-7)
    assert class_norm_cv(X, y).item() == pytest.approx(0, abs=1e-7)
    X[-1] *= 3
    assert centred_cosine_std(X, y) > 0.1


def test_readings_stand_beside_those_of_baselines(data):
    X, y = data
    init, inputs = torch.randn(90, 6), torch.rand(90, 40)
    found = rs.class_alignment(X, y, baselines={"init": init, "inputs": inputs})
    frame = found.to_frame().set_index("features")
    assert frame.index.tolist() == ["features", "init", "inputs"]
    for name, values in {"features": X, "init": init, "inputs": inputs}.items():
        for metric, function in ALIGNMENT_METRICS.items():
            assert frame.loc[name, metric] == function(values, y).item()
    assert rs.class_alignment(X, y).values.shape == (1, len(ALIGNMENT_METRICS))


@pytest.mark.parametrize(
    ("baselines", "error", "text"),
    [
        ({"init": torch.ones(3, 2)}, LabelMismatch, r"\['init'\] must have shape \(4,"),
        ({"px": torch.ones(4, 1, 2)}, LabelMismatch, r"\(4, 1, 2\); flatten inputs"),
        (
            {"px": torch.full((4, 2), math.nan)},
            NonFiniteError,
            r"baselines\['px'\] has",
        ),
        ({"features": torch.ones(4, 2)}, UsageError, 'called "features"'),
    ],
)
def test_baselines_that_do_not_fit_are_named(baselines, error, text):
    with pytest.raises(error, match=text):
        rs.class_alignment(torch.ones(4, 2), [0, 0, 1, 1], baselines=baselines)


def test_one_class_has_no_cross_class_cosine():
    X = torch.rand(5, 3)
    for of in ("means", "pairs"):
        assert math.isnan(rs.cross_class_cosine(X, [3] * 5, of=of).item())
    assert rs.class_cosine(X, [3] * 5).matrix.item() == pytest.approx(1)
    centred = rs.class_cosine(X, [3] * 5, center=True)
    assert centred.matrix.isnan().all()
    assert centred.n_excluded == 1


def test_a_zero_class_mean_is_excluded_and_counted():
    X = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [2.0, -3.0], [-2.0, 3.0]]
    found = rs.class_cosine(X, [0, 1, 2, 3, 3])
    assert found.n_excluded == 2
    assert found.matrix[2:].isnan().all()
    assert found.matrix[:, 2:].isnan().all()
    assert found.norms.tolist() == pytest.approx([1, 2**0.5, 0, 0])
    mean = rs.cross_class_cosine(X, [0, 1, 2, 3, 3]).item()
    assert mean == pytest.approx(0.5**0.5)


def test_a_mean_cancelled_down_to_rounding_has_no_direction():
    third = torch.tensor([[0.1, 0.2], [0.2, 0.4], [-0.3, -0.6]], dtype=torch.float64)
    assert third.mean(0).any(), "the sum leaves rounding behind"
    X = torch.cat([third, torch.ones(2, 2, dtype=torch.float64)])
    assert rs.class_cosine(X, [0, 0, 0, 1, 1]).n_excluded == 1
    same = torch.ones(4, 2, dtype=torch.float64) * 0.1
    assert rs.class_cosine(same, [0, 0, 1, 2], center=True).n_excluded == 3


def test_zero_samples_are_excluded_from_pairs_and_counted():
    X = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [3.0, 3.0], [0.0, 0.0]]
    found = rs.class_cosine(X, [0, 0, 1, 1, 2], of="pairs")
    assert found.n_excluded == 2
    assert found.matrix[0, 1].item() == pytest.approx(0.5**0.5)
    assert found.matrix[1, 1].item() == pytest.approx(1)
    assert math.isnan(found.matrix[0, 0].item()), "one sample has no other to meet"
    assert found.matrix[2].isnan().all()


def test_pairs_of_single_sample_classes_are_their_cosines():
    X = torch.randn(20, 5)
    found = rs.class_cosine(X, range(20), of="pairs").matrix
    off = ~torch.eye(20, dtype=torch.bool)
    expected = rs.class_cosine(X, range(20)).matrix
    torch.testing.assert_close(found[off], expected[off])
    assert found.diagonal().isnan().all()


def test_single_sample_classes_and_gaps_between_labels_are_fine():
    found = rs.class_cosine(torch.eye(3), [-5, 0, 70])
    assert found.classes.tolist() == [-5, 0, 70]
    torch.testing.assert_close(found.matrix, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e20, 1e-25, 1e200, 1e-200])
def test_no_scale_overflows(data, scale):
    X, y = data[0].double(), data[1]
    for metric in ALIGNMENT_METRICS.values():
        assert metric(X * scale, y).item() == pytest.approx(metric(X, y).item())
    norms = rs.class_cosine(X, y).norms
    torch.testing.assert_close(rs.class_cosine(X * scale, y).norms / scale, norms)


@pytest.mark.parametrize("metric", ALIGNMENT_METRICS.values(), ids=ALIGNMENT_METRICS)
@pytest.mark.parametrize(
    ("X", "y", "error", "text"),
    [
        (torch.ones(4, 2), [0, 1], LabelMismatch, r"shape \(4,\) .* got \(2,\)"),
        (torch.ones(2, 2), [[0], [1]], LabelMismatch, r"got \(2, 1\)"),
        (torch.ones(2, 2), [0.0, math.nan], LabelError, "must be integers"),
        (torch.ones(1, 2), [0], NotEnoughSamples, "at least 2"),
        (torch.ones(2, 2, 2), [0, 1], MetricError, r"\(n_samples, n_features\)"),
        ([[1.0], [math.inf]], [0, 1], NonFiniteError, "X has 1 non-finite"),
    ],
)
def test_bad_input_is_named(metric, X, y, error, text):
    with pytest.raises(error, match=text):
        metric(X, y)


def test_all_zero_features_have_no_share():
    assert mean_share(torch.zeros(4, 2), [0, 0, 1, 1]).isnan()
    assert rs.cross_class_cosine(torch.zeros(4, 2), [0, 0, 1, 1]).isnan()


def test_options_that_make_no_sense_are_named(data):
    with pytest.raises(UsageError, match="of='mean' is not one of"):
        rs.class_cosine(*data, of="mean")
    with pytest.raises(UsageError, match="no agreed meaning"):
        rs.cross_class_cosine(*data, center=True, of="pairs")
