"""Inverse roots against scipy, and where float32 gives up."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from repscope.errors import MetricError, NonFiniteError
from repscope.linalg import inverse_root


def covariance_like(n: int, rank: int, *, seed: int = 0) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(rank, n))
    return torch.from_numpy(rows.T @ rows)


@pytest.mark.parametrize("p", [1, 2, 4, 6])
@pytest.mark.parametrize("rank", [3, 20])
def test_equals_scipy(p: int, rank: int) -> None:
    C = covariance_like(7, rank)
    expected = scipy.linalg.fractional_matrix_power(
        C.numpy() + 0.01 * np.eye(7), -1 / p
    )
    np.testing.assert_allclose(inverse_root(C, p=p, eps=0.01), expected, rtol=1e-9)


def test_each_matrix_of_a_batch_has_its_own_order() -> None:
    C = torch.stack([covariance_like(5, 9, seed=s) for s in range(3)])
    roots = inverse_root(C, p=torch.tensor([2, 4, 6]), eps=0.1)
    for root, one, p in zip(roots, C, (2, 4, 6), strict=True):
        torch.testing.assert_close(root, inverse_root(one, p=p, eps=0.1))


def test_a_direction_without_variance_has_the_gain_of_eps_alone() -> None:
    C = torch.zeros(400, 400)
    C[:40, :40] = covariance_like(40, 8).float()
    root = inverse_root(C, p=4, eps=1e-4)
    torch.testing.assert_close(root[40:, 40:], 10.0 * torch.eye(360))


def test_noise_below_zero_counts_as_zero() -> None:
    C = torch.diag(torch.tensor([1.0, -1e-9], dtype=torch.float64))
    expected = torch.tensor(1e-12, dtype=torch.float64) ** -0.5
    torch.testing.assert_close(inverse_root(C, p=2, eps=1e-12)[1, 1], expected)


def test_input_is_untouched_and_dtype_kept() -> None:
    C = covariance_like(4, 6).float()
    before = C.clone()
    assert inverse_root(C, p=4, eps=1e-4).dtype == torch.float32
    assert torch.equal(C, before)


def raises(C: torch.Tensor) -> None:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def returns_nan(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return C[..., 0] * torch.nan, C * torch.nan


@pytest.mark.parametrize("failure", [raises, returns_nan])
def test_float32_failure_is_repeated_in_float64(failure, monkeypatch) -> None:
    C = covariance_like(6, 3).float()
    expected = inverse_root(C.double(), p=4, eps=1e-3).float()
    eigh = torch.linalg.eigh

    def only_float64(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return eigh(C) if C.dtype == torch.float64 else failure(C)

    monkeypatch.setattr(torch.linalg, "eigh", only_float64)
    root = inverse_root(C, p=4, eps=1e-3)
    assert root.dtype == torch.float32
    torch.testing.assert_close(root, expected)


def test_float64_failure_is_not_hidden(monkeypatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", raises)
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        inverse_root(covariance_like(3, 3), p=2, eps=1e-3)


@pytest.mark.parametrize(
    ("C", "p", "eps", "message"),
    [
        (torch.zeros(3), 2, 1e-3, r"\(\.\.\., n, n\), got \(3,\)"),
        (torch.zeros(2, 3), 2, 1e-3, r"got \(2, 3\)"),
        (torch.eye(2), 2, 0.0, "eps must be positive, got 0.0"),
        (torch.eye(2), 2, float("nan"), "eps must be positive, got nan"),
        (torch.eye(2), 0, 1e-3, "p must be positive, got 0"),
    ],
)
def test_what_has_no_root_is_refused(C, p, eps, message) -> None:
    with pytest.raises(MetricError, match=message):
        inverse_root(C, p=p, eps=eps)


def test_non_finite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="C has 1 non-finite of 4 entries"):
        inverse_root(torch.tensor([[1.0, 0.0], [0.0, torch.inf]]), p=2, eps=1e-3)
