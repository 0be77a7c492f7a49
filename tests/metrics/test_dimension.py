from __future__ import annotations

import math

import cases
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import repscope as rs
from repscope.errors import (
    LabelError,
    LabelMismatch,
    MetricError,
    NonFiniteError,
    NotEnoughSamples,
)


@pytest.fixture
def data():
    X = torch.relu(torch.randn(90, 6).double() + torch.randn(6).double() + 0.5)
    y = torch.cat([torch.full((5,), 9), torch.full((50,), 2), torch.full((35,), 4)])
    return X, y[torch.randperm(90)]


def entropy_rank(covariance):
    return oracles.entropy_rank(np.linalg.eigvalsh(covariance).clip(1e-14))


# -- within and between classes ----------------------------------------------
def test_parts_are_those_of_linear_discriminant_analysis(data):
    X, y = data
    found = rs.class_dimension(X, y)
    model = LinearDiscriminantAnalysis(solver="eigen", store_covariance=True).fit(X, y)
    within = model.covariance_
    total = np.cov(X.numpy().T, ddof=0)
    assert found.within_rank.item() == pytest.approx(entropy_rank(within))
    assert found.between_rank.item() == pytest.approx(entropy_rank(total - within))
    share = np.trace(within) / np.trace(total)
    assert found.within_share.item() == pytest.approx(share)
    assert found.between_share.item() == pytest.approx(1 - share)
    assert found.classes.tolist() == [2, 4, 9]
    assert found.counts.tolist() == [50, 35, 5]
    frame = found.to_frame()
    assert frame["part"].tolist() == ["within", "between"]
    assert frame["share"].sum() == pytest.approx(1)


@pytest.mark.parametrize("n_classes", [2, 5, 10])
def test_a_simplex_with_isotropic_noise_has_its_closed_form(n_classes):
    means = cases.simplex_etf(n_classes) * 3
    noise = torch.eye(n_classes, dtype=torch.float64) * 0.5
    X = torch.cat([means + step for row in noise for step in (row, -row)]) + 7
    y = torch.arange(n_classes).repeat(2 * n_classes)
    found = rs.class_dimension(X, y)
    assert found.between_rank.item() == pytest.approx(n_classes - 1)
    assert found.within_rank.item() == pytest.approx(n_classes)
    assert found.between_share.item() == pytest.approx(9 / (9 + 0.25))


def test_parts_that_do_not_vary_have_rank_zero():
    X = torch.tensor([[0.1, 3.0], [0.1, 3.0], [0.7, 1.0], [0.7, 1.0], [0.3, 0.9]])
    collapsed = rs.class_dimension(X, [0, 0, 1, 1, 5])
    assert collapsed.within_rank.item() == collapsed.within_share.item() == 0
    assert collapsed.between_share.item() == 1
    assert collapsed.counts.tolist() == [2, 2, 1]
    for dtype in (torch.float32, torch.float64):
        rows = torch.rand(300, 3, dtype=dtype) + 5
        same = rs.class_dimension(rows.repeat(2, 1), [0] * 300 + [1] * 300)
        assert same.between_rank.item() == same.between_share.item() == 0
        one = rs.class_dimension(rows, [4] * 300)
        assert one.between_rank.item() == one.between_share.item() == 0
        alone = rs.class_dimension(rows, range(300))
        assert alone.within_rank.item() == alone.within_share.item() == 0
    flat = rs.class_dimension(cases.CONSTANTS["float32 rounding"], [0, 1] * 10)
    assert flat.within_rank.item() == flat.between_rank.item() == 0
    assert flat.within_share.isnan()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-25, 1.0, 1e20, 1e200]))
def test_laws_of_the_parts(seed, scale):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(2, 40, 5)) + 3
    y = rng.integers(0, 4, 40) * 3 - 1
    X[:, :, :2] += y[:, None]
    found = rs.class_dimension(X, y)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    order = rng.permutation(40)
    single = torch.from_numpy(X).float()
    for rows, labels, rel in (
        (X @ turn * scale, y, 1e-8),
        (X[:, order] + 10, y[order], 1e-8),
        (np.concatenate([X, X], 1), np.concatenate([y, y]), 1e-8),
        (single, -2 * y, 1e-5),
    ):
        other = rs.class_dimension(rows, labels)
        for part in ("within_rank", "between_rank", "within_share", "between_share"):
            torch.testing.assert_close(
                getattr(other, part), getattr(found, part), rtol=rel, atol=0
            )
    one = rs.class_dimension(X[1], y)
    assert one.between_rank.item() == pytest.approx(found.between_rank[1].item())
    assert (found.within_share + found.between_share).tolist() == pytest.approx([1, 1])
    assert len(found.to_frame()) == 4


@pytest.mark.parametrize(
    ("X", "y", "error", "text"),
    [
        (torch.ones(4, 2), [0, 1], LabelMismatch, r"shape \(4,\) .* got \(2,\)"),
        (torch.ones(2, 2), [0.0, 1.0], LabelError, "must be integers"),
        (torch.ones(1, 2), [0], NotEnoughSamples, "at least 2"),
        (torch.ones(2), [0, 1], MetricError, "must have shape"),
        ([[1.0], [math.nan]], [0, 1], NonFiniteError, "X has 1 non-finite"),
    ],
)
def test_bad_input_is_named(X, y, error, text):
    with pytest.raises(error, match=text):
        rs.class_dimension(X, y)


# -- halves ------------------------------------------------------------------
def test_halves_are_of_other_examples_and_of_equal_size():
    X = torch.randn(21, 4).double()
    found = rs.rank_stability(X, seed=3)
    assert found.n_examples == 21
    assert found.effective_rank == rs.spectrum(X).effective_rank
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3)).argsort()
    halves = [rs.spectrum(X[order[:10]]), rs.spectrum(X[order[10:20]])]
    expected = [half.effective_rank.item() for half in halves]
    assert found.halves.tolist() == pytest.approx(expected)
    assert found.ratio.item() == pytest.approx(
        np.mean(expected) / found.effective_rank.item()
    )
    assert torch.equal(found.halves, rs.rank_stability(X, seed=3).halves)
    assert not torch.equal(found.halves, rs.rank_stability(X, seed=4).halves)
    assert len(found.to_frame()) == 1


def test_more_examples_make_the_halves_agree():
    few, many = (rs.rank_stability(torch.randn(n, 10).double()) for n in (30, 5000))
    assert few.ratio < 0.9
    assert many.ratio.item() == pytest.approx(1, abs=0.01)
    assert (few.note, many.note) == ("n_examples < 5 n_features", "")


def test_rows_of_an_example_stay_together():
    # Ten directions, each met by one example only: halves have five of them.
    X = torch.eye(10).double().repeat_interleave(40, 0)
    X = X * torch.tensor([1.0, -1.0]).repeat(200)[:, None]
    groups = torch.arange(10).repeat_interleave(40) * 7 - 3
    order = torch.randperm(400)
    by_example = rs.rank_stability(X[order], groups=groups[order])
    assert by_example.effective_rank.item() == pytest.approx(10)
    assert by_example.halves.tolist() == pytest.approx([5, 5])
    assert by_example.n_examples == 10
    assert by_example.note == "n_examples < 5 n_features"
    by_row = rs.rank_stability(X)
    assert by_row.halves.min() > 9
    assert by_row.note == ""


def test_stacks_are_split_alike():
    X = torch.randn(3, 20, 4)
    found = rs.rank_stability(X, seed=1)
    assert (found.effective_rank.shape, found.halves.shape) == ((3,), (3, 2))
    torch.testing.assert_close(found.halves[2], rs.rank_stability(X[2], seed=1).halves)
    assert len(found.to_frame()) == 3
    flat = rs.rank_stability(torch.ones(20, 4))
    assert flat.effective_rank.item() == 0
    assert flat.ratio.isnan()


@pytest.mark.parametrize(
    ("X", "groups", "error", "text"),
    [
        (torch.ones(3, 2), None, NotEnoughSamples, "at least 4 examples, got 3"),
        (torch.ones(6, 2), [0, 0, 1, 1, 2, 2], NotEnoughSamples, r"got 3 \(6 rows\)"),
        (torch.ones(6, 2), [0, 1], LabelMismatch, r"shape \(6,\)"),
        (torch.ones(6, 2), [0.5] * 6, LabelError, "must be integers"),
        (torch.full((6, 2), math.inf), None, NonFiniteError, "X has 12 non-finite"),
    ],
)
def test_what_cannot_be_halved_is_named(X, groups, error, text):
    with pytest.raises(error, match=text):
        rs.rank_stability(X, groups=groups)


def test_inputs_stay_as_they_are_and_need_no_gradient(data):
    X, y = data
    X = X.requires_grad_()
    before = X.detach().clone()
    assert not rs.class_dimension(X, y).within_rank.requires_grad
    assert not rs.rank_stability(X).ratio.requires_grad
    assert torch.equal(X.detach(), before)
