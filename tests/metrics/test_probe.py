from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

import repscope as rs
from repscope.errors import (
    LabelMismatch,
    MetricError,
    NonFiniteError,
    NotEnoughSamples,
    UsageError,
)


@pytest.fixture
def data():
    y = torch.arange(200).remainder(4) * 3 - 1
    return torch.randn(200, 6) * 5 + 20 + 3 * torch.nn.functional.one_hot(y + 1, 12)[
        :, :6
    ].float(), y


def by_hand(X, y, seed, share, C):
    """Standardise, fit and score without scikit-learn's pipeline and scaler."""
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y)
    splitter = StratifiedShuffleSplit(1, test_size=share, random_state=seed)
    ((train, test),) = splitter.split(X, y)
    mean, std = X[train].mean(0), X[train].std(0)
    reader = LogisticRegression(C=C, max_iter=1000)
    reader.fit((X[train] - mean) / std, y[train])
    logits = (X[test] - mean) / std @ reader.coef_.T + reader.intercept_
    return float(np.mean(reader.classes_[logits.argmax(1)] == y[test]))


@pytest.mark.parametrize(("seed", "share", "C"), [(0, 0.2, 1.0), (5, 0.4, 0.01)])
def test_the_accuracy_is_that_of_a_regression_by_hand(data, seed, share, C):
    found = rs.linear_probe_accuracy(*data, seed=seed, test_share=share, C=C)
    assert found.ndim == 0
    assert found.dtype == torch.float64
    assert found.item() == by_hand(*data, seed, share, C)
    assert 0.25 < found < 1


def test_it_depends_on_the_seed_and_on_nothing_else(data):
    X, y = data
    found = [rs.linear_probe_accuracy(X, y, seed=seed).item() for seed in range(4)]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - must not matter
    again = [rs.linear_probe_accuracy(X, y, seed=seed).item() for seed in range(4)]
    assert found == again
    assert len(set(found)) > 1
    renamed = rs.linear_probe_accuracy(X.numpy(), (70 + 2 * y).tolist()).item()
    assert renamed == found[0]


def test_features_that_show_the_class_are_read_and_others_are_not():
    y = torch.arange(300).remainder(3)
    X = torch.randn(300, 5)
    X[:, 2] += 100.0 * y
    assert rs.linear_probe_accuracy(X, y).item() == 1
    # Labels that do not depend on the features: chance.
    chance = rs.linear_probe_accuracy(torch.randn(900, 2), torch.arange(900) % 3)
    assert chance.item() == pytest.approx(1 / 3, abs=0.1)


def test_pairs_that_are_separable_need_not_be_all_together():
    # Three classes on a line: the middle one is linear against either neighbour,
    # but no softmax over the fold |x| tells all of them apart.
    x = torch.linspace(-1, 1, 303)[:, None]
    y = torch.tensor([0] * 101 + [1] * 101 + [2] * 101)
    folded = x.abs()
    pair = y != 2
    assert rs.linear_probe_accuracy(folded[pair], y[pair]) > 0.95
    assert rs.linear_probe_accuracy(folded, y) < 0.75


def test_constant_features_give_the_share_of_the_largest_class():
    y = torch.tensor([4] * 60 + [7] * 30 + [9] * 10)
    assert rs.linear_probe_accuracy(torch.ones(100, 3), y).item() == 0.6
    assert rs.linear_probe_accuracy(torch.zeros(100, 3), y).item() == 0.6


@pytest.mark.parametrize("scale", [1e20, 1e-25, 1e250, 1e-250])
def test_no_scale_overflows(data, scale):
    X, y = data[0].double(), data[1]
    expected = rs.linear_probe_accuracy(X, y).item()
    assert rs.linear_probe_accuracy(X * scale, y).item() == expected


def test_the_input_is_left_alone_and_no_graph_is_kept(data):
    X, y = data[0].double(), data[1]
    before = X.clone()
    found = rs.linear_probe_accuracy(X.requires_grad_(), y)
    assert not found.requires_grad
    assert torch.equal(X.detach(), before)


@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        ([0] * 16 + [5] * 4, {}, "at least 5 of each class, got 4 of class 5"),
        ([0] * 18 + [5, 6], {}, r"\(2 of 3 classes are too small\)"),
        ([0] * 17 + [5] * 3, {"test_share": 0.7}, "at least 4 of each class, got 3"),
    ],
)
def test_classes_too_small_for_the_split_are_named(labels, options, text):
    with pytest.raises(NotEnoughSamples, match=text):
        rs.linear_probe_accuracy(torch.randn(20, 2), labels, **options)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_the_smallest_class_allowed_is_on_both_sides(share):
    least = math.ceil(1 / min(share, 1 - share))
    y = torch.tensor([0] * 40 + [1] * least)
    X = torch.nn.functional.one_hot(y).double() * 50
    for seed in range(5):
        assert rs.linear_probe_accuracy(X, y, test_share=share, seed=seed).item() == 1


@pytest.mark.parametrize(
    ("X", "y", "error", "text"),
    [
        (torch.ones(6, 2), [3] * 6, MetricError, "at least 2 classes, got 3 alone"),
        (torch.ones(4, 2), [0, 1], LabelMismatch, r"got \(2,\)"),
        (torch.ones(1, 2), [0], NotEnoughSamples, "at least 2"),
        ([[1.0], [math.nan]], [0, 1], NonFiniteError, "X has 1 non-finite"),
    ],
)
def test_bad_input_is_named(X, y, error, text):
    with pytest.raises(error, match=text):
        rs.linear_probe_accuracy(X, y)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"test_share": 0.0}, r"test_share must be in \(0, 1\), got 0.0"),
        ({"test_share": 20}, r"got 20"),
        ({"C": 0}, "C must be a finite number above 0, got 0"),
        ({"C": math.nan}, "got nan"),
    ],
)
def test_options_that_make_no_sense_are_named(data, options, text):
    with pytest.raises(UsageError, match=text):
        rs.linear_probe_accuracy(*data, **options)
