from __future__ import annotations

import itertools
import math

import cases
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import repscope as rs
from repscope.errors import (
    MetricError,
    NonFiniteError,
    NotEnoughSamples,
    NotPositiveSemidefinite,
    UsageError,
)
from repscope.metrics.spectra import SPECTRUM_METRICS, trace

READINGS = ("effective_rank", "participation_ratio", "stable_rank")
COUNTS = ("n_components", "n_significant")


def relu_features(n=200, d=12):
    mixing = torch.randn(d, d) * torch.logspace(0, -2, d)
    return torch.relu(torch.randn(n, d) @ mixing + 0.3)


# -- known answers -----------------------------------------------------------
@pytest.mark.parametrize("case", cases.SPECTRA, ids=lambda case: case.name)
def test_planted_spectra_and_their_closed_forms(case):
    found = rs.spectrum(case.features)
    expected = torch.tensor(case.eigenvalues, dtype=torch.float64)
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-10, atol=1e-12)
    for name in (*READINGS, "trace"):
        number = SPECTRUM_METRICS[name](found).item()
        assert number == pytest.approx(getattr(case, name), rel=1e-10), name
    for name in COUNTS:
        assert SPECTRUM_METRICS[name](found).item() == getattr(case, name), name
    assert found.effective_rank.item() == pytest.approx(case.effective_rank)


@pytest.mark.parametrize("case", cases.SPECTRA, ids=lambda case: case.name)
def test_raw_eigenvalues_read_like_their_spectrum(case):
    for name in (*READINGS, *COUNTS, "trace"):
        number = SPECTRUM_METRICS[name](case.eigenvalues).item()
        assert number == pytest.approx(getattr(case, name), rel=1e-5), name


@pytest.mark.parametrize(("n", "d"), [(200, 12), (9, 30), (30, 30), (2, 5), (50, 1)])
def test_readings_are_those_of_scipy_and_sklearn(n, d):
    X = relu_features(n, d) + 1.0
    expected = oracles.spectrum_readings(X)
    found = rs.spectrum(X)
    np.testing.assert_allclose(
        found.eigenvalues, oracles.pca_variances(X), rtol=1e-8, atol=1e-12
    )
    for name, metric in SPECTRUM_METRICS.items():
        assert metric(found).item() == pytest.approx(expected[name], rel=1e-6), name


def test_a_spectrum_says_what_it_is():
    found = rs.spectrum(torch.randn(9, 4), ddof=0)
    assert (found.kind, found.n_samples, found.n_features) == ("covariance", 9, 4)
    assert (found.ddof, found.degenerate) == (0, None)
    uncentred = rs.spectrum(torch.randn(9, 4), center=False)
    assert uncentred.kind == "second_moment"
    frame = found.to_frame()
    assert frame.share.sum() == pytest.approx(1)


def test_uncentred_is_the_second_moment():
    X = relu_features()
    sigma = np.linalg.svd(X.double().numpy(), compute_uv=False)
    found = rs.spectrum(X, center=False, ddof=0).eigenvalues
    np.testing.assert_allclose(found, sigma**2 / len(X), rtol=1e-9)


def test_fewer_samples_than_features_give_rank_n_minus_1_and_exact_zeros():
    found = rs.spectrum(torch.randn(10, 100))
    assert found.eigenvalues.shape == (100,)
    assert int((found.eigenvalues > 0).sum()) == 9
    assert rs.hill_number(found, q=0).item() == 9
    assert 1 <= found.effective_rank.item() <= 9


# -- many at once ------------------------------------------------------------
def test_spectra_equal_the_loop_with_one_decomposition_per_size(monkeypatch):
    calls = []
    real = torch.linalg.eigvalsh
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda C: calls.append(C.shape) or real(C)
    )
    shapes = {"a": (40, 6), "b": (6, 50), "c": (3, 30, 6), "d": (40, 7), "e": (9, 7)}
    named = {name: torch.randn(shape) for name, shape in shapes.items()}
    together = rs.spectra(named, ddof=0)
    assert sorted(calls) == [(2, 7, 7), (5, 6, 6)]
    assert list(together) == list(named)
    for name, X in named.items():
        alone = rs.spectrum(X, ddof=0)
        one = together[name]
        assert one.eigenvalues.shape == alone.eigenvalues.shape
        assert (one.n_samples, one.n_features) == (alone.n_samples, alone.n_features)
        torch.testing.assert_close(one.eigenvalues, alone.eigenvalues)
        torch.testing.assert_close(one.effective_rank, alone.effective_rank)
    as_list = rs.spectra(list(named.values()), ddof=0)
    assert isinstance(as_list, list)
    assert torch.equal(as_list[2].eigenvalues, together["c"].eigenvalues)
    assert rs.spectra([]) == []
    assert rs.spectra({}) == {}


def test_a_bad_matrix_among_many_is_named():
    good = torch.randn(5, 2)
    with pytest.raises(NonFiniteError, match=r"X\['fc2'\] has 1 non-finite"):
        rs.spectra({"fc1": good, "fc2": [[1.0, 2.0], [float("nan"), 3.0]]})
    with pytest.raises(NotEnoughSamples, match=r"X\[1\] needs at least 2 samples"):
        rs.spectra([good, good[:1]])


# -- from moments ------------------------------------------------------------
def moments_of(X, rows=64):
    moments = rs.Moments()
    for block in X.split(rows):
        moments.update(block)
    return moments


@pytest.mark.parametrize("options", [{}, {"ddof": 0}, {"center": False}])
@pytest.mark.parametrize(
    ("n", "d"), [(200, 12), (9, 30), (30, 30), (31, 30), (2, 5), (50, 1)]
)
def test_moments_have_the_spectrum_of_their_rows(n, d, options):
    X = relu_features(n, d).double() + 1.0
    expected, found = rs.spectrum(X, **options), rs.spectrum(moments_of(X), **options)
    top = float(expected.eigenvalues[0])
    torch.testing.assert_close(
        found.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-13 * top
    )
    assert torch.equal(found.eigenvalues > 0, expected.eigenvalues > 0)
    for field in ("kind", "n_samples", "n_features", "ddof", "degenerate"):
        assert getattr(found, field) == getattr(expected, field)
    for name, metric in SPECTRUM_METRICS.items():
        number = metric(found).item()
        assert number == pytest.approx(metric(expected).item(), rel=1e-9), name


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [1e140, 1.0, 1e-140])
def test_moments_of_any_scale_have_the_ranks_of_their_rows(scale, center):
    X = relu_features(40, 6).double() * scale + 1e6 * scale
    expected = rs.spectrum(X, center=center)
    found = rs.spectrum(moments_of(X), center=center)
    torch.testing.assert_close(
        found.effective_rank, expected.effective_rank, rtol=1e-8, atol=0
    )
    torch.testing.assert_close(
        found.eigenvalues[0], expected.eigenvalues[0], rtol=1e-9, atol=0
    )


def test_moments_with_a_mean_beyond_squaring_have_a_spectrum():
    X = torch.tensor([[1e200, 1.0], [1e200, 3.0]], dtype=torch.float64)
    assert rs.spectrum(moments_of(X)).eigenvalues.tolist() == [2.0, 0.0]
    with pytest.raises(MetricError, match="variances of X leave the float64 range"):
        rs.spectrum(moments_of(X), center=False)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_moments_of_a_constant_layer_have_rank_zero(value, center):
    X = torch.full((1000, 3), value, dtype=torch.float64)
    found = rs.spectrum(moments_of(X, rows=7), center=center)
    flat = center or value == 0
    assert found.degenerate == ("constant" if flat else None)
    assert int((found.eigenvalues > 0).sum()) == (not flat)
    assert found.effective_rank.item() == pytest.approx(float(not flat))


def test_rows_and_moments_are_decomposed_together(monkeypatch):
    calls = []
    real = torch.linalg.eigvalsh
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda C: calls.append(C.shape) or real(C)
    )
    X = torch.randn(40, 6)
    rows, moments, wide = rs.spectra([X, moments_of(X), moments_of(X[:4])])
    assert calls == [(3, 6, 6)]
    torch.testing.assert_close(moments.eigenvalues, rows.eigenvalues)
    assert int((wide.eigenvalues > 0).sum()) == 3


def test_moments_of_too_few_rows_have_no_spectrum():
    for n in (0, 1):
        with pytest.raises(NotEnoughSamples, match=f"at least 2 samples, got {n}"):
            rs.spectrum(rs.Moments().update(torch.ones(n, 3)))


# -- degenerate and extreme input --------------------------------------------
@pytest.mark.parametrize("name", cases.CONSTANTS)
def test_a_constant_layer_has_rank_zero_and_says_so(name):
    found = rs.spectrum(cases.CONSTANTS[name])
    assert found.degenerate == "constant"
    assert not found.eigenvalues.any()
    assert found.effective_rank.item() == 0.0
    for metric in SPECTRUM_METRICS.values():
        assert metric(found).item() == 0
    for q in (0, 0.5, 1, 2, math.inf):
        assert rs.hill_number(found, q=q).item() == 0.0
    assert rs.explained_variance_ratio(found).isnan().all()
    fit = rs.power_law(found)
    assert math.isnan(fit.exponent)
    assert fit.note.startswith("0 eigenvalues")


def test_a_constant_matrix_in_a_batch_is_flagged_and_spoils_no_other():
    X = torch.stack([torch.ones(20, 3), torch.randn(20, 3)])
    found = rs.spectrum(X)
    assert found.degenerate == "constant"
    assert found.effective_rank[0] == 0
    torch.testing.assert_close(
        found.effective_rank[1], rs.spectrum(X[1]).effective_rank
    )


def test_a_large_constant_feature_does_not_hide_a_small_one_that_varies():
    X = torch.zeros(50, 2)
    X[:, 0] = 1e8
    X[:, 1] = torch.randn(50)
    found = rs.spectrum(X)
    assert found.degenerate is None
    assert found.effective_rank.item() == pytest.approx(1.0)
    assert trace(found).item() == pytest.approx(X[:, 1].var().item(), rel=1e-5)


def test_uncentred_ones_have_rank_one_and_only_zeros_are_degenerate():
    ones = rs.spectrum(torch.ones(9, 3), center=False)
    assert ones.degenerate is None
    assert ones.effective_rank.item() == pytest.approx(1.0)
    zeros = rs.spectrum(torch.zeros(9, 3), center=False)
    assert zeros.degenerate == "constant"


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e20, torch.float32),
        (1e-25, torch.float32),
        (1e150, torch.float64),
        (1e-150, torch.float64),
    ],
)
def test_extreme_scales_give_the_same_ranks(scale, dtype):
    X = relu_features().to(dtype)
    base, scaled = rs.spectrum(X), rs.spectrum(X * scale)
    assert scaled.degenerate is None
    for name in ("effective_rank", *READINGS):
        metric = SPECTRUM_METRICS[name]
        assert metric(scaled).item() == pytest.approx(metric(base).item(), rel=1e-5)
    assert rs.rankme(X * scale).item() == pytest.approx(rs.rankme(X).item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_variances_beyond_float64_are_refused_with_the_remedy(scale):
    X = torch.randn(9, 3, dtype=torch.float64) * scale
    with pytest.raises(MetricError, match="divide it by its largest magnitude"):
        rs.spectrum(X)
    with pytest.raises(MetricError, match="variances of W leave"):
        rs.weight_spectrum(X)
    assert 1 < rs.rankme(X).item() <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_narrow_types_equal_their_float64_values(dtype):
    X = (torch.randn(3000, 4) * 30).to(dtype)
    expected = rs.spectrum(X.to(torch.float64)).eigenvalues
    torch.testing.assert_close(rs.spectrum(X).eigenvalues, expected)


def test_a_mean_a_million_times_the_spread_changes_nothing():
    # 2^20 and steps of 2^-20 keep the shifted values exact in float64.
    X = (torch.randn(300, 5, dtype=torch.float64) * 2**20).round() / 2**20
    torch.testing.assert_close(
        rs.spectrum(X + 2**20).eigenvalues,
        rs.spectrum(X).eigenvalues,
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize(
    ("X", "error", "text"),
    [
        (torch.ones(1, 3), NotEnoughSamples, "at least 2 samples, got 1"),
        (torch.ones(0, 3), NotEnoughSamples, "at least 2 samples, got 0"),
        (torch.ones(4, 0), MetricError, "X is empty"),
        (torch.ones(4), MetricError, "must have shape"),
        (torch.tensor([[1.0], [math.inf]]), NonFiniteError, r"first at \(1, 0\)"),
        (torch.tensor([[1.0], [math.nan]]), NonFiniteError, "1 non-finite of 2"),
    ],
)
@pytest.mark.parametrize("function", [rs.spectrum, rs.rankme])
def test_bad_features_are_refused_by_name(function, X, error, text):
    with pytest.raises(error, match=text):
        function(X)


# -- weights and rankme ------------------------------------------------------
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 3, 2, 2), (4, 2, 3)])
def test_weight_spectrum_is_squared_singular_values(shape):
    W = torch.randn(shape)
    found = rs.weight_spectrum(W)
    matrix = W.double().flatten(1).numpy()
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert (found.kind, found.ddof) == ("weight", None)
    assert (found.n_samples, found.n_features) == matrix.shape
    np.testing.assert_allclose(found.eigenvalues[: len(sigma)], sigma**2, rtol=1e-10)
    assert not found.eigenvalues[len(sigma) :].any()
    norm = np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2
    assert rs.stable_rank(found).item() == pytest.approx(norm)


def test_weight_spectrum_keeps_small_singular_values_and_flags_zero():
    W = torch.tensor([[1.0, 0.0], [0.0, 1e-10]], dtype=torch.float64)
    assert rs.weight_spectrum(W).eigenvalues.tolist() == pytest.approx([1.0, 1e-20])
    zero = rs.weight_spectrum(torch.zeros(3, 4))
    assert zero.degenerate == "constant"
    assert zero.effective_rank.item() == 0.0


@pytest.mark.parametrize("W", [torch.ones(3), torch.ones(0, 3), torch.tensor(1.0)])
def test_weights_without_a_spectrum_are_refused(W):
    with pytest.raises(MetricError, match="W must be a non-empty matrix"):
        rs.weight_spectrum(W)


def test_weights_that_diverged_are_refused():
    with pytest.raises(NonFiniteError, match="W has 1 non-finite"):
        rs.weight_spectrum([[1.0, math.inf]])


@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("shape", [(60, 8), (8, 60)])
def test_rankme_is_the_entropy_of_uncentred_singular_values(shape, eps):
    X = torch.relu(torch.randn(shape)) + 0.5
    assert rs.rankme(X, eps=eps).item() == pytest.approx(oracles.rankme(X, eps))
    assert rs.rankme(X[None].repeat(3, 1, 1)).shape == (3,)


def test_rankme_and_effective_rank_are_different_numbers():
    X = relu_features()
    uncentred = rs.spectrum(X, center=False)
    same = rs.effective_rank(uncentred, of="singular_values").item()
    assert rs.rankme(X).item() == pytest.approx(same)
    assert rs.rankme(X).item() > 1.5 * rs.effective_rank(uncentred).item()
    assert rs.rankme(torch.zeros(4, 2)).item() == 0.0


# -- the family of readings --------------------------------------------------
eigenvalues = arrays(
    np.float64, st.integers(1, 20), elements=st.floats(0, 1e6, width=32)
).map(lambda v: np.sort(v)[::-1].copy())


@settings(deadline=None, max_examples=80)
@given(values=eigenvalues)
def test_hill_numbers_fall_with_their_order(values):
    orders = (0, 0.3, 1, 1.5, 2, 7.0, math.inf)
    numbers = [rs.hill_number(values, q=q).item() for q in orders]
    # q = 0 leaves out what is rounding beside the largest; the others weigh it.
    for high, low in itertools.pairwise(numbers[1:]):
        assert high >= low * (1 - 1e-9)
    positive = float((values > len(values) * 2.3e-16 * values.max()).sum())
    assert numbers[0] == positive
    assert (numbers[-1] >= 1 - 1e-12) == (values.max() > 0)


def test_hill_numbers_are_the_named_ranks():
    values = torch.tensor([5.0, 3.0, 1.0, 0.5])
    p = values.double() / values.double().sum()
    for q in (0.5, 3.0):
        expected = p.pow(q).sum().pow(1 / (1 - q)).item()
        assert rs.hill_number(values, q=q).item() == pytest.approx(expected)
    named = {1: rs.effective_rank, 2: rs.participation_ratio, math.inf: rs.stable_rank}
    for q, reading in named.items():
        assert rs.hill_number(values, q=q).item() == pytest.approx(
            reading(values).item()
        )
    near = rs.hill_number(values, q=1 + 1e-7).item()
    assert near == pytest.approx(rs.effective_rank(values).item(), rel=1e-5)


@settings(deadline=None, max_examples=80)
@given(pair=st.tuples(eigenvalues, eigenvalues))
def test_a_spectrum_that_majorizes_has_the_lower_ranks(pair):
    s, t = pair
    if not (s.any() and t.any()):
        assert not rs.majorizes(s, t)
        return
    assert rs.majorizes(s, s)
    if rs.majorizes(s, t):
        for rank in (rs.effective_rank, rs.participation_ratio, rs.stable_rank):
            assert rank(s).item() <= rank(t).item() * (1 + 1e-6)


def test_crossing_spectra_majorize_in_neither_direction():
    s, t = [0.6, 0.2, 0.2], [0.5, 0.4, 0.1]
    assert not rs.majorizes(s, t)
    assert not rs.majorizes(t, s)
    assert rs.majorizes([1.0], [0.5, 0.5])


@pytest.mark.parametrize(
    ("s", "t", "expected"),
    [
        ([3.0, 1.0], [2.0, 2.0], "lower for every definition"),
        ([2.0, 2.0], [9.0, 1.0, 0.0], "higher for every definition"),
        ([4.0, 2.0], [2.0, 1.0, 0.0], "equal for every definition"),
        ([6.0, 1.0, 1.0], [5.0, 3.0, 0.0], "definition-dependent"),
        ([0.0, 0.0], [1.0, 1.0], "undefined"),
        ([1.0], [0.0], "undefined"),
    ],
)
def test_spectra_are_ordered_or_depend_on_the_definition(s, t, expected):
    assert rs.compare_spectra(s, t) == expected
    swapped = {"lower": "higher", "higher": "lower"}
    first = expected.split()[0]
    back = expected.replace(first, swapped.get(first, first))
    assert rs.compare_spectra(t, s) == back


def test_an_order_holds_for_all_that_it_promises():
    lower, seen = 0, set()
    for values in torch.rand(300, 2, 5, dtype=torch.float64).square():
        s, t = values.sort(descending=True).values
        order = rs.compare_spectra(s, t)
        seen.add(order)
        if order == "lower for every definition":
            lower += 1
            for q in (0.5, 1, 2, math.inf):
                assert rs.hill_number(s, q=q) <= rs.hill_number(t, q=q) + 1e-12
            assert rs.n_components(s) <= rs.n_components(t)
    assert lower > 30
    assert len(seen) == 3


def test_spectra_of_batches_are_not_ordered():
    with pytest.raises(MetricError, match=r"one spectrum as t, got shape \(2, 3\)"):
        rs.compare_spectra([1.0, 0.5], torch.ones(2, 3))
    with pytest.raises(MetricError, match="one spectrum as s"):
        rs.compare_spectra(rs.spectrum(torch.randn(2, 5, 3)), [1.0])


def test_components_are_counted_as_documented():
    tenths = [0.1] * 10
    assert [rs.n_components(tenths, fraction=f).item() for f in (0.3, 0.31, 1)] == [
        3,
        4,
        10,
    ]
    assert rs.n_components([1.0, 0.0, 0.0], fraction=1).item() == 1
    assert rs.explained_variance_ratio([3.0, 1.0]).tolist() == [0.75, 0.25]


def test_significance_is_relative_to_what_is_said():
    values = [100.0, 30.0, 1.0, 0.5]
    assert rs.n_significant(values).item() == 2, "strictly above 1 % of the largest"
    assert rs.n_significant(values, threshold=0.004).item() == 4
    assert rs.n_significant([2.0, 1.0, 0.0], threshold=0).item() == 2
    assert rs.n_significant(values, threshold=1.0, relative_to="mean").item() == 1
    assert rs.n_significant(values, threshold=0.9, relative_to="mean").item() == 2


def test_singular_values_give_the_larger_rank():
    values = [4.0, 1.0]
    found = rs.effective_rank(values, of="singular_values").item()
    assert found == pytest.approx(oracles.entropy_rank([2.0, 1.0]))
    assert found > rs.effective_rank(values).item()


def test_eigvalsh_of_a_covariance_can_be_read_directly():
    C = rs.covariance(torch.randn(10, 40))
    raw = rs.eigvalsh(C)
    assert raw.min() < 0, "rounding, clipped by the reading"
    assert rs.effective_rank(raw).item() == pytest.approx(
        oracles.entropy_rank(raw.clamp(min=0))
    )


@pytest.mark.parametrize("reading", [*SPECTRUM_METRICS.values(), rs.power_law])
@pytest.mark.parametrize(
    ("s", "error", "text"),
    [
        ([1.0, 2.0, 3.0], MetricError, r"ascending order .* pass s.flip\(-1\)"),
        ([2.0, 1.0, 3.0], MetricError, "features or unsorted values"),
        ([2.0, 1.0, -3.0], NotPositiveSemidefinite, "none below 0"),
        ([2.0, math.nan], NonFiniteError, "s has 1 non-finite"),
        ([], MetricError, "must hold eigenvalues"),
        (3.0, MetricError, "must hold eigenvalues"),
    ],
)
def test_what_is_not_eigenvalues_is_named(reading, s, error, text):
    with pytest.raises(error, match=text):
        reading(s)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: rs.effective_rank(s, of="sigma"), "of='sigma' is not one of"),
        (lambda s: rs.hill_number(s, q=-1), "q must be at least 0"),
        (lambda s: rs.n_components(s, fraction=99), r"fraction must lie in \(0, 1\]"),
        (lambda s: rs.n_components(s, fraction=1.1), "got 1.1"),
        (lambda s: rs.n_components(s, fraction=0.0), "got 0.0"),
        (lambda s: rs.n_significant(s, threshold=-1), "threshold must be at least"),
        (
            lambda s: rs.n_significant(s, relative_to="man"),
            "did you mean 'm",
        ),
        (lambda s: rs.power_law(s, first=0), r"range 0..3 must lie within 1..3"),
        (lambda s: rs.power_law(s, last=4), r"range 1..4 must lie within 1..3"),
    ],
)
def test_options_that_make_no_sense_are_named(call, text):
    with pytest.raises(UsageError, match=text):
        call([3.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_order_is_judged_at_the_scale_of_the_values(scale):
    rounding = np.array([1.0, 1e-12, 2e-12]) * scale
    assert rs.stable_rank(rounding).item() == pytest.approx(1)
    with pytest.raises(MetricError, match="must be descending"):
        rs.stable_rank(np.array([1.0, 0.1, 0.2]) * scale)


# -- power law ---------------------------------------------------------------
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.5])
def test_an_exact_power_law_is_recovered_on_any_range(exponent):
    values = torch.arange(1, 101, dtype=torch.float64) ** -exponent
    for first, last in ((1, None), (5, 50)):
        fit = rs.power_law(values, first=first, last=last)
        assert fit.exponent == pytest.approx(exponent)
        assert fit.r2 == pytest.approx(1)
        assert fit.stderr == pytest.approx(0, abs=1e-12)
        assert (fit.first, fit.last, fit.note) == (first, last or 100, "")


def test_a_rough_power_law_is_scipys_regression():
    i = np.arange(1, 41)
    rng = np.random.default_rng(0)
    values = np.sort(i**-1.5 * np.exp(rng.normal(0, 0.3, 40)))[::-1].copy()
    fit = rs.power_law(values, first=3, last=30)
    slope, r2, stderr = oracles.line(np.log(i[2:30]), np.log(values[2:30]))
    assert fit.exponent == pytest.approx(-slope)
    assert fit.r2 == pytest.approx(r2)
    assert fit.stderr == pytest.approx(stderr)


def test_padded_zeros_and_rounding_end_the_default_range():
    spectrum = rs.spectrum(torch.randn(30, 80))
    assert rs.power_law(spectrum).last == 29
    noisy = [2.0**-i for i in range(20)] + [1e-30] * 5
    assert rs.power_law(torch.tensor(noisy, dtype=torch.float64)).last == 20


def test_power_law_says_why_it_has_no_number():
    values = [1.0 / i for i in range(1, 11)]
    assert rs.power_law(values).exponent == pytest.approx(1), "10 points are enough"
    assert rs.power_law(values[:9]).note.startswith("9 eigenvalues")
    short = rs.power_law([3.0, 2.0, 1.0])
    assert math.isnan(short.exponent)
    assert short.note == "3 eigenvalues in the range, 10 needed"
    flat = rs.power_law([2.0] * 20)
    assert flat.exponent == pytest.approx(0)
    assert math.isnan(flat.r2)
    assert flat.note == "all eigenvalues in the range are equal"
    with pytest.raises(MetricError, match="takes one spectrum"):
        rs.power_law(torch.ones(2, 20))


@pytest.mark.parametrize("shape", [(300, 40), (30, 200)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_ranks_in_float32_are_right_to_five_digits(shape, decay):
    scale = torch.arange(1, shape[1] + 1).pow(-decay)
    X = torch.randn(*shape) * scale
    exact = float(rs.spectrum(X).effective_rank)
    (quick,) = rs.spectra([X], accuracy="ranks")
    assert abs(float(quick.effective_rank) / exact - 1) < 1e-5
    with pytest.raises(UsageError, match="accuracy='fast' is not one of"):
        rs.spectra([X], accuracy="fast")
