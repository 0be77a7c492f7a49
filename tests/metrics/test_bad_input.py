"""What every function does with input that is wrong, hard or degenerate.

`FEATURES` and `LABELLED` are all that read features; the numbered tests hold for each
of them. `ELSEWHERE` names the tests of single functions that belong to the same list.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path

import cases
import pytest
import torch

import repscope as rs
from repscope.errors import (
    LabelError,
    LabelMismatch,
    NonFiniteError,
    NotEnoughSamples,
)
from repscope.metrics.alignment import ALIGNMENT_METRICS

TESTS = Path(__file__).parents[1]

# name -> a number read from features (n_samples, n_features)
FEATURES = {
    "spectrum": lambda X: rs.spectrum(X).effective_rank,
    "spectra": lambda X: rs.spectra([X])[0].effective_rank,
    "moments": lambda X: rs.spectrum(rs.Moments().update(X)).effective_rank,
    "participation_ratio": rs.participation_ratio_from_features,
    "rankme": rs.rankme,
    "rank_stability": lambda X: rs.rank_stability(X).effective_rank,
}
# name -> a number read from features and labels
LABELLED = ALIGNMENT_METRICS | {
    "class_means": lambda X, y: (
        rs.class_means(X, y)[0, 0] / rs.class_means(X, y)[-1, 0]
    ),
    "within_rank": lambda X, y: rs.class_dimension(X, y).within_rank,
    "between_rank": lambda X, y: rs.class_dimension(X, y).between_rank,
    "between_share": lambda X, y: rs.class_dimension(X, y).between_share,
}
SCALES = {torch.float32: (1e20, 1e-25), torch.float64: (1e140, 1e-140)}

each = pytest.mark.parametrize("read", FEATURES.values(), ids=FEATURES)
each_labelled = pytest.mark.parametrize("read", LABELLED.values(), ids=LABELLED)


@pytest.fixture(name="X")
def features():
    mixing = torch.randn(6, 6) * torch.logspace(0, -1, 6)
    return torch.randn(60, 6) @ mixing + 0.5


@pytest.fixture
def y():
    return torch.arange(60) % 4


def same(found, expected, rel=1e-9):
    assert found.item() == pytest.approx(expected.item(), rel=rel, abs=1e-12)


# -- the numbered list -------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_50_what_is_not_finite_is_refused_with_its_place(X, y, bad):
    X[7, 2] = bad
    for read in FEATURES.values():
        with pytest.raises(NonFiniteError, match=r"1 non-finite .* \(7, 2\)"):
            read(X)
    for read in LABELLED.values():
        with pytest.raises(NonFiniteError, match=r"X has 1 non-finite .* \(7, 2\)"):
            read(X, y)


@pytest.mark.parametrize("n", [0, 1])
def test_51_fewer_than_two_samples_are_refused(n):
    for read in FEATURES.values():
        with pytest.raises(NotEnoughSamples, match=rf"at least 2 samples, got {n}"):
            read(torch.ones(n, 3))
    for read in LABELLED.values():
        with pytest.raises(NotEnoughSamples, match=rf"at least 2 samples, got {n}"):
            read(torch.ones(n, 3), [0] * n)


@each
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_52_a_constant_layer_has_rank_zero(read, value):
    centred = read is not rs.rankme
    expected = 0.0 if centred or value == 0 else 1.0
    assert read(torch.full((20, 5), value)).item() == pytest.approx(expected)
    assert rs.spectrum(torch.full((20, 5), value)).degenerate == "constant"


@each
def test_53_fewer_samples_than_features_have_a_finite_rank_below_their_number(read):
    n = 8
    rank = read(torch.randn(n, 40)).item()
    assert 1 <= rank <= (n if read is rs.rankme else n - 1)


@each
def test_54_a_mean_of_a_million_changes_no_centred_rank(read):
    # 2^20 and steps of 2^-20 keep the shifted values exact in float64.
    X = (torch.randn(60, 5, dtype=torch.float64) * 2**20).round() / 2**20
    shifted = X + 2**20
    if read is rs.rankme:
        assert read(shifted).item() == pytest.approx(1, abs=1e-4)
    else:
        rel = 1e-6 if read is FEATURES["participation_ratio"] else 1e-9
        same(read(shifted), read(X), rel)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(d, s) for d, scales in SCALES.items() for s in scales]
)
def test_55_any_scale_has_the_same_finite_numbers(X, y, dtype, scale):
    X = X.to(dtype)
    for read in FEATURES.values():
        same(read(X * scale), read(X), 1e-5)
    for read in LABELLED.values():
        same(read(X * scale, y), read(X, y), 1e-5)


@each_labelled
def test_56_labels_of_another_length_are_refused(read, X, y):
    with pytest.raises(LabelMismatch, match=r"shape \(60,\) .*, got \(59,\)"):
        read(X, y[:59])


@each_labelled
@pytest.mark.parametrize("label", [1.5, math.nan])
def test_57_labels_that_are_no_integers_are_refused(read, X, label):
    with pytest.raises(LabelError, match=r"must be integers, got torch\.float"):
        read(X, [label] * 60)


@each_labelled
def test_58_classes_with_a_gap_and_of_one_sample_leave_numbers_finite(read, X, y):
    y = 10 * y
    y[0] = 7
    assert read(X, y).isfinite()
    for found in (rs.class_cosine(X, y), rs.class_dimension(X, y)):
        assert found.classes.tolist() == [0, 7, 10, 20, 30]
        assert found.counts.tolist() == [14, 1, 15, 15, 15]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
def test_59_narrow_types_have_the_numbers_of_float64(y, dtype):
    X = (torch.randn(60, 6) * 30 + 20).to(dtype)
    wide = X.to(torch.float64)
    for read in FEATURES.values():
        same(read(X), read(wide), 1e-6)
    for read in LABELLED.values():
        same(read(X, y), read(wide, y))


# -- rules for numbers -------------------------------------------------------
def test_one_bad_row_is_refused_and_the_others_can_be_read(X):
    spoilt = X.clone()
    spoilt[3] = math.nan
    with pytest.raises(NonFiniteError, match="drop those rows"):
        rs.spectrum(spoilt)
    good = spoilt[spoilt.isfinite().all(1)]
    assert len(good) == 59
    assert rs.spectrum(good).effective_rank > 1


@each
def test_rounding_below_zero_makes_no_rank_nan(read):
    X = torch.randn(10, 2) @ torch.randn(2, 100)
    assert 1 <= read(X).item() <= 2 + 1e-6


@each
def test_a_constant_feature_beside_others_adds_nothing(read, X):
    wider = torch.nn.functional.pad(X, (0, 1), value=0.0)
    same(read(wider), read(X), 1e-6)
    if read is not rs.rankme:
        same(read(torch.nn.functional.pad(X, (0, 1), value=3.0)), read(X), 1e-6)


def test_no_warning_comes_with_degenerate_input(recwarn):
    for X in cases.CONSTANTS.values():
        y = torch.arange(len(X)) % 2
        for read in FEATURES.values():
            if len(X) > 3 or read is not FEATURES["rank_stability"]:
                read(X)
        for read in LABELLED.values():
            read(X, y)
    assert not recwarn


# Lines of the list that concern single functions: file -> their tests.
ELSEWHERE = {
    "linalg/test_bad_input.py": {
        # NaN, infinity above the diagonal
        "test_what_has_no_eigenvalues_is_refused_by_name",
        # asymmetry by rounding
        "test_asymmetry_by_rounding_is_averaged_wherever_it_is",
    },
    "linalg/test_moments.py": {
        # one-pass sums in float32
        "test_float32_products_bear_any_mean",
        # one-pass sums in float64
        "test_covariance_survives_a_mean_far_above_the_spread",
        # float16 and integer Gram matrices
        "test_narrow_types_equal_their_float64_values",
        # variances beyond float64
        "test_covariance_beyond_float64_is_refused_not_infinite",
    },
    "metrics/test_spectra.py": {
        # tiny negative eigenvalues
        "test_fewer_samples_than_features_give_rank_n_minus_1_and_exact_zeros",
        # constant layer
        "test_a_constant_layer_has_rank_zero_and_says_so",
        # constant in a batch
        "test_a_constant_matrix_in_a_batch_is_flagged_and_spoils_no_other",
        # one constant feature
        "test_a_large_constant_feature_does_not_hide_a_small_one_that_varies",
        # power law of few eigenvalues
        "test_power_law_says_why_it_has_no_number",
    },
    "metrics/test_dimension.py": {
        # zero variance within classes
        "test_parts_that_do_not_vary_have_rank_zero",
    },
    "metrics/test_alignment.py": {
        # zero vectors
        "test_zero_samples_are_excluded_from_pairs_and_counted",
    },
    "test_analysis.py": {
        # one bad stream
        "test_one_bad_stream_spoils_no_other",
        # diverged activations
        "test_what_has_no_meaning_is_nan_with_a_note",
    },
}


@pytest.mark.parametrize("file", ELSEWHERE)
def test_the_other_lines_have_their_tests(file):
    tree = ast.parse((TESTS / file).read_text())
    named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ELSEWHERE[file] <= named
