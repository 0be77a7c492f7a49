from __future__ import annotations

import dataclasses
import math

import cases
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from torch import nn

import repscope as rs
from repscope.errors import (
    LabelError,
    LabelMismatch,
    MetricError,
    NonFiniteError,
    NotEnoughSamples,
    UsageError,
)

FEATURES = ("nc1", "cdnv", "nc2_equinorm", "nc2_equiangular")
ALL = (*FEATURES, "nc3", "nc4", "accuracy")


def numbers(found, names=ALL):
    return {name: getattr(found, name).item() for name in names}


def blobs(n_classes=5, n_features=8, n_samples=120, spread=0.7):
    """Return unbalanced, ReLU-like features, with a common offset, and labels."""
    centres = 2 * torch.randn(n_classes, n_features, dtype=torch.float64)
    sizes = torch.arange(1, n_classes + 1, dtype=torch.float64)
    y = torch.multinomial(sizes, n_samples, replacement=True)
    y[: 2 * n_classes] = torch.arange(n_classes).repeat(2)
    noise = torch.randn(n_samples, n_features, dtype=torch.float64)
    return torch.relu(centres[y] + spread * noise) + 0.3, y


def collapsed(n_classes, *, pad=0):
    """Return an exact simplex with a common offset: three equal samples a class."""
    means = nn.functional.pad(cases.simplex_etf(n_classes), (0, pad + 1), value=0.25)
    return means.repeat(3, 1), torch.arange(n_classes).repeat(3), means


# -- against the oracle --------------------------------------------------------
@pytest.mark.parametrize(("C", "d"), [(2, 3), (5, 8), (7, 4), (10, 30)])
def test_every_number_is_the_papers(C, d):
    X, y = blobs(C, d)
    layer = nn.Linear(d, C).double()
    expected = oracles.neural_collapse(X, y, *(p.detach() for p in layer.parameters()))
    found = numbers(rs.neural_collapse(X, y, classifier=layer))
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)
    single = numbers(rs.neural_collapse(X.float(), y, classifier=layer.float()))
    assert single == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_bias_decides():
    X, y = blobs(4, 6)
    weight = torch.randn(4, 6)
    for bias in (None, torch.tensor([0.0, 0.0, 90.0, 0.0])):
        found = rs.neural_collapse(X, y, classifier=(weight, bias))
        expected = oracles.neural_collapse(
            X, y, weight, torch.zeros(4) if bias is None else bias
        )
        assert numbers(found) == pytest.approx(expected, rel=1e-9)
    assert found.accuracy.item() == (y == 2).double().mean().item()


def test_a_regression_against_the_nearest_centroid_of_sklearn():
    X, y = blobs(5, 8)
    reader = LogisticRegression(max_iter=1000).fit(X, y)
    nearest = NearestCentroid().fit(X, y).predict(X)
    found = rs.neural_collapse(X, y, classifier=(reader.coef_, reader.intercept_))
    assert found.nc4.item() == np.mean(reader.predict(X) != nearest) > 0
    assert found.accuracy.item() == reader.score(X, y)


# -- closed forms --------------------------------------------------------------
@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("pad", [0, 5])
def test_a_simplex_is_collapsed(n_classes, pad):
    X, y, means = collapsed(n_classes, pad=pad)
    found = rs.neural_collapse(X, y, classifier=(3 * (means - means.mean(0)), None))
    assert numbers(found) == pytest.approx(dict.fromkeys(ALL, 0) | {"accuracy": 1})
    assert found.nc1.item() == found.cdnv.item() == 0
    assert found.note == "no within-class variance"


def test_isotropic_noise_around_a_simplex_has_its_closed_form():
    # Two samples at +e and -e along each of the d axes, round each of C means.
    C, e = 4, 0.3
    means = cases.simplex_etf(C)
    axes = e * torch.cat([torch.eye(C), -torch.eye(C)]).double()
    X = (means[:, None] + axes).flatten(0, 1)
    found = rs.neural_collapse(X, torch.arange(C).repeat_interleave(2 * C))
    # Sigma_W = e^2/C I, Sigma_B has C - 1 eigenvalues 1/(C-1).
    assert found.nc1.item() == pytest.approx((C - 1) ** 2 * e**2 / C / C)
    # v = e^2, squared distance of two means 2 C/(C-1).
    assert found.cdnv.item() == pytest.approx(e**2 * (C - 1) / (2 * C))


def test_norms_and_angles_are_told_apart():
    # Orthogonal means of equal norm, centred: an exact simplex again.
    X = torch.eye(3).repeat_interleave(2, 0)
    y = torch.arange(3).repeat_interleave(2)
    found = numbers(rs.neural_collapse(X, y))
    assert found["nc2_equinorm"] == pytest.approx(0, abs=1e-12)
    assert found["nc2_equiangular"] == pytest.approx(0, abs=1e-12)
    # Centred means -4, -1 and 5 on a line: norms 4, 1, 5; cosines 1, -1, -1.
    line = rs.neural_collapse([[0.0], [0.0], [3.0], [3.0], [9.0], [9.0]], y)
    assert line.nc2_equinorm.item() == pytest.approx(np.std([4, 1, 5]) / (10 / 3))
    assert line.nc2_equiangular.item() == pytest.approx((1.5 + 0.5 + 0.5) / 3)
    assert "n_features < 2: no simplex fits" in line.note


def test_variance_where_no_class_means_lie_does_not_count():
    X, y = blobs(3, 5)
    wide = torch.cat([X, 1e3 * torch.ones(len(X), 1)], 1)
    for label in range(3):  # a feature that no class mean uses
        rows = (y == label).nonzero()[:, 0]
        wide[rows[: len(rows) // 2 * 2 : 2], 5] += 7
        wide[rows[1 : len(rows) // 2 * 2 : 2], 5] -= 7
    narrow, found = rs.neural_collapse(X, y), rs.neural_collapse(wide, y)
    assert found.nc1.item() == pytest.approx(narrow.nc1.item(), rel=1e-9)
    assert found.cdnv > 2 * narrow.cdnv


def test_means_on_a_line_have_one_direction():
    means = torch.tensor([[0.1, 0.2, 0.3]]) * torch.tensor([[1.0], [2.0], [4.0]])
    e = torch.tensor([[0.3, -0.7, 0.2], [-0.3, 0.7, -0.2]])
    X = (means[:, None] + e).double().flatten(0, 1)
    y = torch.arange(3).repeat_interleave(2)
    found = rs.neural_collapse(X, y)
    u = torch.tensor([1.0, 2.0, 3.0]) / 10
    along = (e[0] @ u).square() / u.dot(u)
    between = u.dot(u) * np.square([-4 / 3, -1 / 3, 5 / 3]).sum()
    assert found.nc1.item() == pytest.approx((along / between).item(), rel=1e-5)
    assert found.note == "class means span 1 directions only"


def test_opposite_weights_are_farthest():
    X, y, means = collapsed(4)
    found = rs.neural_collapse(X, y, classifier=(means.mean(0) - means, None))
    assert found.nc3.item() == pytest.approx(2)
    assert found.nc4.item() == 1
    assert found.accuracy.item() == 0


# -- laws ----------------------------------------------------------------------
@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(2, 6), st.integers(2, 9), st.floats(0.01, 100)
)
def test_laws(seed, C, d, factor):
    torch.manual_seed(seed)
    X, y = blobs(C, d, 60)
    # Two dead classes in one point are a tie, which goes by the label.
    X = X + 0.01 * torch.randn(60, d)
    W, b = torch.randn(C, d).double(), torch.randn(C).double()

    def read(X, y, W=W, b=b):
        return numbers(rs.neural_collapse(X, y, classifier=(W, b)))

    found = pytest.approx(read(X, y), rel=1e-7, abs=1e-9)
    order = torch.randperm(60)
    rotation = torch.linalg.qr(torch.randn(d, d).double())[0]
    shift = torch.randn(d).double()
    names = torch.randperm(C)  # the new name of each class
    assert read(X[order], y[order]) == found
    assert read(X.repeat(2, 1), y.repeat(2)) == found
    assert read(X @ rotation, y, W @ rotation) == found
    assert read(X * factor, y, W, b * factor) == found
    assert read(X + shift, y, W, b - W @ shift) == found
    assert read(X, names[y], W[names.argsort()], b[names.argsort()]) == found
    assert all(value >= 0 for value in read(X, y).values())


@pytest.mark.parametrize("scale", [1e20, 1e-25, 1e150, 1e-200])
def test_no_scale_overflows(scale):
    X, y = blobs()
    W, b = torch.randn(5, 8).double(), torch.randn(5).double()
    expected = numbers(rs.neural_collapse(X, y, classifier=(W, b)))
    found = rs.neural_collapse(X * scale, y, classifier=(W / scale, b))
    assert numbers(found) == pytest.approx(expected, rel=1e-9)


def test_a_large_common_mean_takes_no_digits():
    X, y = blobs()
    X = (X * 2**20).round() / 2**20  # so that adding the offset is exact
    expected = numbers(rs.neural_collapse(X, y), FEATURES)
    found = numbers(rs.neural_collapse(X + 2.0**24, y), FEATURES)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
def test_small_types_are_widened_first(dtype):
    X = (30 * blobs()[0]).to(dtype)
    y = torch.arange(120) % 5
    expected = numbers(rs.neural_collapse(X.double(), y), FEATURES)
    assert numbers(rs.neural_collapse(X, y), FEATURES) == pytest.approx(expected)


def test_the_classifier_is_left_alone_and_needs_no_graph():
    X, y = blobs()
    layer = nn.Linear(8, 5)
    before = [p.detach().clone() for p in layer.parameters()]
    found = rs.neural_collapse(X.requires_grad_(), y, classifier=layer)
    for p, kept in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p.detach(), kept)
        assert p.grad is None
    for field in dataclasses.fields(found)[:-1]:
        value = getattr(found, field.name)
        assert value.ndim == 0
        assert value.dtype == torch.float64
        assert not value.requires_grad


def test_the_frame_has_one_row():
    X, y, _ = collapsed(3)
    frame = rs.neural_collapse(X, y).to_frame()
    assert list(frame.columns) == [*ALL, "note"]
    assert frame["nc1"].tolist() == [0.0]
    assert frame["note"].item() == "no within-class variance"


# -- degenerate input ----------------------------------------------------------
def test_without_a_classifier_its_numbers_are_nan():
    found = rs.neural_collapse(*blobs())
    assert [math.isnan(getattr(found, name)) for name in ALL] == [False] * 4 + [
        True
    ] * 3
    assert found.note == ""


def test_a_single_sample_counts_in_the_means_only():
    X, y = blobs(4, 6)
    lone = torch.cat([X, 5 * torch.ones(1, 6)]), torch.cat([y, torch.tensor([9])])
    found = rs.neural_collapse(*lone)
    assert found.note == "classes 9 have one sample: in the means only"
    # As if the class had many samples, whose variance is not looked at.
    expected = oracles.neural_collapse(*lone)
    for name in ("nc2_equinorm", "nc2_equiangular"):
        assert getattr(found, name).item() == pytest.approx(expected[name])
    assert found.nc1.item() == pytest.approx(expected["nc1"] * len(lone[0]) / len(X))
    # cdnv: over the pairs of classes that have a variance.
    without = oracles.neural_collapse(X, y)["cdnv"]
    assert found.cdnv.item() == pytest.approx(without)


def test_nothing_but_single_samples_has_no_within_class_variance():
    found = rs.neural_collapse(torch.randn(4, 6), range(4))
    assert found.nc1.isnan()
    assert found.cdnv.isnan()
    assert found.nc2_equinorm > 0
    assert found.note == "classes 0, 1, 2, 3 have one sample: in the means only"


def test_empty_classes_are_listed_and_not_renumbered():
    X, y = blobs(3, 6)
    gaps = 2 * y + 1  # of 8 outputs, only 1, 3 and 5 have samples
    weight = 0.2 * torch.randn(8, 6)
    means = rs.class_means(X, y)
    weight[[1, 3, 5]] += means - means.mean(0)
    found = rs.neural_collapse(X, gaps, classifier=(weight, None))
    assert "no samples of classes 0, 2, 4, 6, 7: left out" in found.note
    part = rs.neural_collapse(X, y, classifier=(weight[[1, 3, 5]], None))
    assert found.nc3.item() == pytest.approx(part.nc3.item())
    assert numbers(found, FEATURES) == numbers(part, FEATURES)
    expected = oracles.neural_collapse(X, gaps, weight, torch.zeros(8))
    assert numbers(found) == pytest.approx(expected)
    assert 0 < found.accuracy < 1
    assert 0 < found.nc4 < 1
    many = rs.neural_collapse(X, y, classifier=(torch.randn(50, 6), None))
    assert "no samples of classes 3, 4, 5, 6, 7, ... (47)" in many.note


@pytest.mark.parametrize("n", [10, 50_000])
def test_no_between_class_variance_is_infinite(n):
    rows = torch.rand(n, 4, dtype=torch.float64) + 0.1
    y = torch.arange(2).repeat_interleave(n)
    # The same samples in another order: means that differ by rounding alone.
    X = torch.cat([rows, rows.flip(0)])
    found = rs.neural_collapse(X, y, classifier=nn.Linear(4, 2))
    assert found.nc1.isinf()
    assert found.cdnv.isinf()
    for name in ("nc2_equinorm", "nc2_equiangular", "nc3", "nc4"):
        assert getattr(found, name).isnan(), name
    assert "no between-class variance" in found.note


@pytest.mark.parametrize("name", cases.CONSTANTS)
def test_a_constant_layer_has_neither(name):
    X = cases.CONSTANTS[name]
    found = rs.neural_collapse(X, torch.arange(len(X)) // 2)
    assert all(math.isnan(value) for value in numbers(found).values())
    assert "no within-class variance" in found.note or len(X) == 3
    assert "no between-class variance" in found.note


def test_no_within_class_variance_survives_many_samples_and_rounding():
    means = torch.tensor([[0.1, 0.7], [0.3, 0.2]], dtype=torch.float64)
    y = torch.arange(2).repeat(20_000)
    found = rs.neural_collapse(means[y], y)
    assert found.nc1.item() == found.cdnv.item() == 0
    ulp = means.float()[y].nextafter((torch.arange(40_000.0) % 3)[:, None])
    assert rs.neural_collapse(ulp, y).nc1.item() == 0


def test_one_class_is_nan():
    found = rs.neural_collapse(torch.rand(5, 3), [3] * 5, classifier=nn.Linear(3, 5))
    assert all(math.isnan(v) for v in numbers(found, ALL[:-1]).values())
    assert "a single class (3)" in found.note


def test_pairs_without_distance_are_counted():
    X = [[0.0], [0.0], [0.0], [0.0], [1.0], [3.0]]
    found = rs.neural_collapse(X, [0, 0, 1, 1, 2, 2])
    # Two collapsed classes in one place: 0/0. The others: (0 + 1) / (2 * 4).
    assert found.cdnv.item() == pytest.approx(1 / 8)
    assert "1 pairs of equal points, left out of cdnv" in found.note
    X = [[-1.0], [1.0], [-1.0], [1.0], [4.0], [4.0]]
    found = rs.neural_collapse(X, [0, 0, 1, 1, 2, 2])
    assert found.cdnv.isinf()
    assert "1 pairs of classes with equal means" in found.note


def test_a_class_at_the_global_mean_has_no_angle():
    X = [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    found = rs.neural_collapse(X, [0, 0, 1, 1, 2, 2])
    assert found.nc2_equiangular.item() == pytest.approx(0.5)
    assert found.nc2_equinorm.item() == pytest.approx(np.std([1, 1, 0]) / (2 / 3))
    assert "the mean of classes 2 is the global mean" in found.note
    assert "class means span 1 directions only" in found.note


def test_a_weight_of_zeros_is_nan():
    found = rs.neural_collapse(*blobs(), classifier=(torch.zeros(5, 8), None))
    assert found.nc3.isnan()
    assert 0 < found.nc4 < 1  # it always says 0


# -- the phase it is defined in ------------------------------------------------
def test_a_note_says_when_it_is_not_the_terminal_phase():
    X, y, means = collapsed(3)
    perfect = (means - means.mean(0), None)
    wrong = (means.mean(0) - means, None)

    def note(**options):
        return rs.neural_collapse(X, y, **options).note

    assert "accuracy" not in note() + note(classifier=perfect)
    assert "training accuracy 0 % is below 99 %" in note(classifier=wrong)
    assert "accuracy 98.5 % is below" in note(classifier=perfect, train_accuracy=0.985)
    assert "accuracy" not in note(classifier=wrong, train_accuracy=0.99)
    on_test = note(inputs="test", classifier=wrong)
    assert "on test inputs" in on_test
    assert "accuracy" not in on_test  # that of the training set is not known


# -- bad input -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("X", "y", "error", "text"),
    [
        (torch.ones(4, 2), [0, 1], LabelMismatch, r"shape \(4,\) .* got \(2,\)"),
        (torch.ones(2, 2), [0.0, math.nan], LabelError, "must be integers"),
        (torch.ones(1, 2), [0], NotEnoughSamples, "at least 2"),
        (torch.ones(2, 2, 2), [0, 1], MetricError, r"\(n_samples, n_features\)"),
        ([[1.0], [math.inf]], [0, 1], NonFiniteError, "X has 1 non-finite"),
    ],
)
def test_bad_input_is_named(X, y, error, text):
    with pytest.raises(error, match=text):
        rs.neural_collapse(X, y)


@pytest.mark.parametrize(
    ("classifier", "error", "text"),
    [
        (nn.Conv2d(1, 1, 1), UsageError, r"pair \(weight, bias\), got Conv2d"),
        ((torch.ones(2, 3),), UsageError, "got tuple; pass the last layer"),
        (nn.Linear(4, 3), MetricError, r"shape \(n_outputs, 3\) .* got \(3, 4\)"),
        ((torch.ones(3), None), MetricError, r"got \(3,\)"),
        ((torch.ones(0, 3), None), MetricError, r"got \(0, 3\)"),
        ((torch.ones(3, 3), torch.ones(2)), MetricError, r"\(3,\) .* got \(2,\)"),
        ((torch.full((3, 3), math.nan), None), NonFiniteError, "weight has 9"),
        ((torch.ones(3, 3), [0, 1, math.inf]), NonFiniteError, "bias has 1"),
        (nn.Linear(3, 2), LabelError, r"outputs 0..1, got 2; map"),
    ],
)
def test_a_classifier_that_does_not_fit_is_named(classifier, error, text):
    with pytest.raises(error, match=text):
        rs.neural_collapse(torch.randn(6, 3), [0, 1, 2] * 2, classifier=classifier)


def test_negative_labels_are_no_outputs():
    X = torch.randn(4, 3)
    assert rs.neural_collapse(X, [-1, -1, 0, 0]).nc1 > 0
    with pytest.raises(LabelError, match="got -1"):
        rs.neural_collapse(X, [-1, -1, 0, 0], classifier=nn.Linear(3, 2))


def test_options_that_make_no_sense_are_named():
    X, y = blobs()
    with pytest.raises(UsageError, match="inputs='validation' is not one of"):
        rs.neural_collapse(X, y, inputs="validation")
    with pytest.raises(UsageError, match=r"share in \[0, 1\], got 99.5"):
        rs.neural_collapse(X, y, train_accuracy=99.5)
