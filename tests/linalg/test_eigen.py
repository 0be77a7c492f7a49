from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from repscope import covariance, eigvalsh
from repscope.errors import (
    MetricError,
    NonFiniteError,
    NotPositiveSemidefinite,
    UsageError,
)
from repscope.linalg import choice, eigen
from repscope.linalg.eigen import clip_rounding
from repscope.linalg.routes import Unavailable


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


def giving_up(C):
    raise Unavailable("failed to converge")


def test_another_route_takes_over_and_is_announced_once(monkeypatch):
    monkeypatch.setitem(choice.ROUTES, "torch", giving_up)
    monkeypatch.setattr(eigen, "_told", set())
    C = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    with pytest.warns(RuntimeWarning, match="by torch .* failed to converge"):
        assert eigvalsh(C).tolist() == pytest.approx([3.0, 1.0])
    assert eigvalsh(C).tolist() == pytest.approx([3.0, 1.0])


def test_float64_takes_over_when_float32_fails(monkeypatch):
    real = choice.ROUTES["torch"]
    monkeypatch.setattr(eigen, "_told", {"torch", "scipy"})
    for name in ("torch", "scipy"):
        monkeypatch.setitem(
            choice.ROUTES,
            name,
            lambda C: real(C) if C.dtype == torch.float64 else giving_up(C),
        )
    found = eigvalsh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert found.dtype == torch.float32
    assert found.tolist() == [3.0, 1.0]


def test_a_failure_of_every_route_is_not_hidden(monkeypatch):
    monkeypatch.setattr(eigen, "_told", set(choice.ROUTES))
    for name in choice.ROUTES:
        monkeypatch.setitem(choice.ROUTES, name, giving_up)
    with pytest.raises(MetricError, match=r"no route could .* failed to converge"):
        eigvalsh(torch.eye(2))


def test_several_threads_give_the_same_values():
    C = covariance(torch.randn(9, 60, 20))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = eigvalsh(C)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(C)[:, ::-1], rtol=1e-10)


@pytest.mark.parametrize("backend", ["cusolver", "cupy", "triton"])
def test_a_backend_that_is_not_here_says_why(backend):
    with pytest.raises(UsageError, match=f"backend='{backend}' cannot do this here"):
        eigvalsh(torch.eye(2), backend=backend)


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
