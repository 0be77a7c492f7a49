"""Tridiagonalisation and bisection in torch, and what the route around them refuses."""

from __future__ import annotations

import pytest
import torch
from matrices import after_relu, assert_eigenvalues, of_all_families, symmetric

from repscope.linalg.routes import Unavailable, tridiagonal
from repscope.linalg.routes.invariants import invariants_hold

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 33, 100])
def test_values_are_lapacks_and_the_input_stays(n, dtype):
    C = of_all_families(n, dtype)
    before = C.clone()
    assert_eigenvalues(tridiagonal.eigenvalues(C), C)
    assert torch.equal(C, before)


def tridiagonal_matrix(d, e):
    beside = torch.diag_embed(e[:, :-1], 1)
    return torch.diag_embed(d) + beside + beside.mT


def test_the_tridiagonal_matrix_has_the_eigenvalues_of_the_matrix():
    C = symmetric(20)
    scale, d, e = tridiagonal.tridiagonalise(C)
    largest = C.abs().amax((-2, -1)) / scale
    assert ((largest >= 1) & (largest < 2) & (scale.log2() % 1 == 0)).all()
    assert (e[:, -1] == 0).all()
    T = tridiagonal_matrix(d, e) * scale[:, None, None]
    assert_eigenvalues(torch.linalg.eigvalsh(T), C)


def test_a_count_is_the_number_of_eigenvalues_below():
    d, e = torch.randn(2, 3, 12, dtype=torch.float64)
    e[:, -1] = e[0, 5] = 0  # falls apart into two
    exact = torch.linalg.eigvalsh(tridiagonal_matrix(d, e))
    between = (exact[:, 1:] + exact[:, :-1]) / 2
    assert tridiagonal.count_below(d, e, between).tolist() == [[*range(1, 12)]] * 3


def test_a_pivot_of_zero_is_counted_as_it_is_divided_by():
    d, e = torch.ones(1, 2), torch.tensor([[1.0, 0.0]])  # eigenvalues 0 and 2
    found = tridiagonal.count_below(d, e, torch.tensor([[-0.5, 1.0, 2.5]]))
    assert found.tolist() == [[0, 1, 2]]


def test_other_dtypes_are_refused():
    with pytest.raises(Unavailable, match=r"not torch\.float16"):
        tridiagonal.eigenvalues(torch.eye(3, dtype=torch.float16)[None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 64, 150])
def test_right_values_keep_trace_and_norm(n, dtype):
    C = of_all_families(n, dtype)
    before = C.clone()
    assert invariants_hold(C, torch.linalg.eigvalsh(C))
    assert torch.equal(C, before)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e30])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w[0, 3].mul_(1.01),
        lambda w: w[1, 5].neg_(),
        lambda w: w[2].copy_(w[1]),
        lambda w: w[2].zero_(),
        lambda w: w[:].zero_(),
        lambda w: w[0, 0].copy_(torch.tensor(float("nan"))),
        lambda w: w[0, 0].copy_(torch.tensor(float("inf"))),
        # The trace stays, or the norm.
        lambda w: w[1].copy_(w[1].mean()),
        lambda w: w[1].neg_(),
    ],
)
def test_wrong_values_lose_trace_or_norm(spoil, scale):
    C = after_relu(8).float() * scale
    values = torch.linalg.eigvalsh(C).flip(-1)
    assert invariants_hold(C, values)
    spoil(values)
    assert not invariants_hold(C, values)
