from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from repscope import covariance, eigvalsh
from repscope.errors import MetricError, NonFiniteError, NotPositiveSemidefinite
from repscope.linalg.eigen import clip_rounding
from repscope.linalg.spectral import Eigenvalues


@pytest.fixture
def symmetric():
    A = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    return A + A.mT


def test_values_are_scipys_in_descending_order(symmetric):
    found = eigvalsh(symmetric)
    assert found.shape == (2, 3, 6)
    for index in np.ndindex(2, 3):
        expected = scipy.linalg.eigh(symmetric[index].numpy(), eigvals_only=True)[::-1]
        np.testing.assert_allclose(found[index], expected, rtol=1e-12, atol=1e-12)
    assert found.min() < 0, "an indefinite matrix keeps its negative values"


def test_float32_stays_float32_within_the_bound_of_its_size():
    C = covariance(torch.randn(400, 100)).float()
    found, exact = eigvalsh(C), eigvalsh(C.double())
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() / exact.max() <= 4 * 100**0.5 * 1.2e-7


@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_float32_scales(scale):
    C = torch.tensor([[2.0, 1.0], [1.0, 2.0]]) * scale
    np.testing.assert_allclose(eigvalsh(C), [3 * scale, scale], rtol=1e-5)


def test_both_triangles_count(symmetric):
    C = symmetric[0, 0].clone()
    C[0, 1] += 2e-5
    C[1, 0] -= 2e-5
    np.testing.assert_allclose(eigvalsh(C), eigvalsh(symmetric[0, 0]), atol=1e-12)
    C[0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"C has 1 non-finite .* \(0, 1\)"):
        eigvalsh(C)


@pytest.mark.parametrize(
    ("C", "text"),
    [
        (torch.ones(5, 3), r"must have shape \(..., n, n\), got \(5, 3\)"),
        (torch.ones(3), r"got \(3,\)"),
        (torch.ones(0, 3, 3), "C is empty"),
        (torch.ones(0, 0), "C is empty"),
        (torch.ones(3, 3).triu(), "not symmetric: .* reaches 1 of its largest"),
        (torch.stack([torch.eye(2), torch.ones(2, 2).triu()]), "not symmetric"),
        (torch.eye(2, dtype=torch.complex64), "C must be a dense real tensor"),
    ],
)
def test_what_is_not_symmetric_is_refused(C, text):
    with pytest.raises(MetricError, match=text):
        eigvalsh(C)


def test_float64_takes_over_when_float32_lapack_fails(monkeypatch):
    real = torch.linalg.eigvalsh

    def failing(C):
        if C.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(C)

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    found = eigvalsh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert found.dtype == torch.float32
    assert found.tolist() == [3.0, 1.0]


def test_a_failure_in_float64_is_not_hidden(monkeypatch):
    def failing(C):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    with pytest.raises(torch.linalg.LinAlgError, match="converge"):
        eigvalsh(torch.eye(2, dtype=torch.float64))


def test_rounding_below_zero_is_clipped_and_more_is_refused():
    values = torch.tensor([[3.0, -7e-15], [1.0, 0.5]], dtype=torch.float64)
    assert clip_rounding(values, name="C").tolist() == [[3.0, 0.0], [1.0, 0.5]]
    with pytest.raises(NotPositiveSemidefinite, match=r"eigenvalue of -0.5 .* 3\)"):
        clip_rounding(torch.tensor([3.0, -0.5]), name="C")


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_what_counts_as_rounding_grows_with_the_matrix(scale):
    values = torch.tensor([1.0, -1e-9], dtype=torch.float64) * scale
    assert clip_rounding(values, name="C").tolist() == [scale, 0.0]
    with pytest.raises(NotPositiveSemidefinite):
        clip_rounding(values * torch.tensor([1.0, 1e3]), name="C")


@pytest.mark.parametrize("exponent", [600.0, -600.0])
def test_eigenvalues_beyond_float64_are_refused(exponent):
    found = Eigenvalues(
        "X['fc']",
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        torch.tensor(exponent, dtype=torch.float64),
        torch.tensor(False),
        (9, 2),
    )
    with pytest.raises(MetricError, match=r"variances of X\['fc'\] leave the float64"):
        found.restored()
