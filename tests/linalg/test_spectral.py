"""Many matrices at once: stacked, cut or padded, each has its own spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import repscope as rs
from repscope.errors import MetricError, NotPositiveSemidefinite
from repscope.linalg import condensed, spectral

SHAPES = [(40, 6), (6, 40), (3, 40, 6), (12, 7), (2, 2, 12, 7), (7, 7), (2, 1)]


def mixed():
    return [
        torch.rand(SHAPES[i % len(SHAPES)]) ** 3 * 10.0 ** (i % 5) + i
        for i in range(3 * len(SHAPES))
    ]


def oracle(X, center=True):
    """Return the eigenvalues of each covariance by numpy, in float64."""
    rows = X.double().numpy()
    n, d = rows.shape[-2:]
    flat = []
    for one in rows.reshape(-1, n, d):
        C = np.cov(one, rowvar=False) if center else one.T @ one / max(n - 1, 1)
        flat.append(np.linalg.eigvalsh(np.atleast_2d(C))[::-1].clip(0))
    return np.reshape(flat, (*rows.shape[:-2], d))


def assert_right(X, values, *, tolerance=1e-12):
    exact = oracle(X)
    assert values.shape == exact.shape
    assert (np.abs(values.numpy() - exact) <= tolerance * exact[..., :1]).all()


@pytest.mark.parametrize("limit", [1, 2000, 2**23])
def test_stacks_may_be_cut_anywhere(limit, monkeypatch):
    monkeypatch.setitem(condensed._STACK_BYTES, "cpu", limit)
    monkeypatch.setitem(spectral._ROUND_BYTES, "cpu", limit)
    Xs = mixed()
    for X, found in zip(Xs, rs.spectra(Xs), strict=True):
        assert_right(X, found.eigenvalues)
        shares = np.maximum(oracle(X), 1e-300)
        shares /= shares.sum(-1, keepdims=True)
        entropy = -(shares * np.log(shares)).sum(-1)
        np.testing.assert_allclose(found.effective_rank, np.exp(entropy), rtol=1e-9)


def test_a_later_stack_may_be_longer_than_the_first(monkeypatch):
    monkeypatch.setitem(condensed._STACK_BYTES, "cpu", 10 * 30 * 6 * 4)
    Xs = [torch.rand(count, 30, 6) for count in (3, 3, 6, 2, 2, 25, 1)]
    for accuracy, tolerance in (("eigenvalues", 1e-12), ("ranks", 2e-6)):
        for X, found in zip(Xs, rs.spectra(Xs, accuracy=accuracy), strict=True):
            assert_right(X, found.eigenvalues, tolerance=tolerance)


def decompositions(monkeypatch):
    sizes = []
    real = spectral.decompose
    monkeypatch.setattr(
        spectral, "decompose", lambda C: sizes.append(tuple(C.shape)) or real(C)
    )
    return sizes


def test_sizes_that_are_close_share_a_decomposition(monkeypatch):
    monkeypatch.setitem(spectral._SIZES_WITHIN, "cpu", 1.1)
    sizes = decompositions(monkeypatch)
    widths = [20, 30, 19, 18, 28, 20, 17]
    Xs = [torch.relu(torch.randn(90, d)).double() * 10.0**d for d in widths]
    found = rs.spectra(Xs)
    assert sizes == [(2, 30, 30), (3, 20, 20), (2, 18, 18)]
    for X, one in zip(Xs, found, strict=True):
        assert_right(X, one.eigenvalues)


def test_what_is_no_covariance_is_found_out_beside_a_wider_one(monkeypatch):
    monkeypatch.setitem(spectral._SIZES_WITHIN, "cpu", 2.0)
    own = rs.Moments().update(torch.randn(30, 3)).to_tensor()
    own[3, 1] = own[4, 0] = 1e3  # far beyond the variances
    wrong = rs.Moments.from_tensor(own)
    with pytest.raises(NotPositiveSemidefinite, match=r"X\['a'\]"):
        rs.spectra({"a": wrong, "b": torch.randn(30, 4)})


def test_no_call_takes_more_than_its_share_of_memory(monkeypatch):
    sizes = decompositions(monkeypatch)
    X = torch.randn(30, 40).expand(40_000, 30, 40)  # 192 MB that are not there
    found = rs.spectrum(X)
    assert found.eigenvalues.shape == (40_000, 40)
    assert max(8 * np.prod(size) for size in sizes) <= 2 * condensed._STACK_BYTES["cpu"]
    assert_right(X[:2], found.eigenvalues[-2:])


@pytest.mark.parametrize("accuracy", ["eigenvalues", "ranks"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.int16]
)
@pytest.mark.parametrize("scale", [1.0, 2.0**70])
def test_the_rows_stay_as_they_are(accuracy, dtype, scale):
    wide = dtype in (torch.float32, torch.float64)
    X = (torch.randn(8, 50, 6) * 100 * (scale if wide else 1.0)).to(dtype)
    before = X.clone()
    rs.spectra(list(X), accuracy=accuracy)
    rs.spectra([X], accuracy=accuracy)
    rs.participation_ratio_from_features(X)
    assert torch.equal(X, before)


def test_the_matrix_that_leaves_the_range_is_named():
    X = torch.randn(3, 9, 4, dtype=torch.float64)
    named = {"a": X[0], "b": X[1] * 1e200, "c": X[2]}
    with pytest.raises(MetricError, match=r"variances of X\['b'\] leave the float64"):
        rs.spectra(named)


@pytest.mark.parametrize("accuracy", ["eigenvalues", "ranks"])
def test_the_doubtful_among_many_are_computed_again(accuracy, monkeypatch):
    X = torch.relu(torch.randn(6, 80, 10))
    X[1] = 0.1
    X[3] = X[3, :, :1] * torch.rand(10)  # one direction: all else is rounding
    X[4] *= 1e-30
    X[5, :, 4:] = 0
    constant, line = X[1], X[3]
    line[:, 5] += 1e-4 * torch.randn(80)
    found = rs.spectra([*X], accuracy=accuracy)
    assert [one.degenerate for one in found] == [None, "constant"] + 4 * [None]
    assert not found[1].eigenvalues.any()
    assert (constant == 0.1).all()
    for one, rows in zip(found, X, strict=True):
        if one.degenerate:
            continue
        exact = rs.effective_rank(torch.from_numpy(oracle(rows).copy()))
        assert one.effective_rank == pytest.approx(exact.item(), rel=1e-5)
    assert int((found[5].eigenvalues > 0).sum()) == 4


# -- trace and participation ratio -------------------------------------------
@pytest.mark.parametrize("center", [True, False])
def test_the_participation_ratio_needs_no_eigenvalues(center, monkeypatch):
    Xs = [*mixed(), torch.randn(30, 8).half(), torch.arange(12).reshape(4, 3)]
    exact = []
    for X in Xs:
        values = oracle(X, center)
        exact.append(values.sum(-1) ** 2 / (values**2).sum(-1))
    decomposed = decompositions(monkeypatch)
    for X, expected in zip(Xs, exact, strict=True):
        found = rs.participation_ratio_from_features(X, center=center)
        np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert not decomposed


def test_moments_and_constants_have_a_participation_ratio():
    X = torch.randn(50, 5, dtype=torch.float64)
    read = rs.participation_ratio_from_features
    assert read(rs.Moments().update(X)).item() == pytest.approx(read(X).item())
    for flat in (torch.full((9, 3), 0.1), torch.zeros(9, 3), torch.full((9, 3), 1e6)):
        assert read(flat).item() == 0
    both = read(torch.stack([torch.full((9, 3), 0.1), torch.randn(9, 3)]))
    assert both[0] == 0
    assert both[1] > 1


def test_invariants_of_any_scale():
    X = torch.randn(50, 5, dtype=torch.float64)
    ratio = rs.participation_ratio_from_features(X).item()
    for scale in (1e85, 1e-85):  # whose squares have no squares
        found = rs.participation_ratio_from_features(X * scale)
        assert found.item() == pytest.approx(ratio)
    trace = spectral.covariance_invariants(
        [X * 1e100], names=["X"], center=True, ddof=1
    )[0].trace
    assert trace.item() == pytest.approx(oracle(X).sum() * 1e200)
    for scale in (1e200, 1e-200):
        with pytest.raises(MetricError, match="variances of X leave the float64 range"):
            rs.participation_ratio_from_features(X * scale)
