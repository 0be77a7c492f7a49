"""Tridiagonalisation and bisection in torch, and what the route around them refuses."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from matrices import after_relu, assert_eigenvalues, of_all_families, symmetric

from repscope.linalg import routes
from repscope.linalg.routes import Unavailable, tridiagonal, triton
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


class OnCuda(torch.Tensor):
    """A tensor of the host that says it is on a CUDA device."""

    is_cuda = True


class Kernel:
    def __init__(self, run):
        self.run, self.grids = run, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.run


@pytest.fixture
def kernels(monkeypatch):
    """Stand in for the kernels with their twins."""

    def tridiagonalise(C, scale, d, e, n, **options):
        found = tridiagonal.tridiagonalise(C.as_subclass(torch.Tensor))
        for out, part in zip((scale, d, e), found, strict=True):
            out.copy_(part)

    def bisect(scale, d, e, w, n, **options):
        w.copy_(tridiagonal.bisect(d, e) * scale[:, None])

    module = types.SimpleNamespace(
        tridiagonalise=Kernel(tridiagonalise), bisect=Kernel(bisect)
    )
    monkeypatch.setattr(routes, "triton_kernels", module, raising=False)
    return module


def on_cuda(n, dtype=torch.float32):
    return symmetric(n).to(dtype).as_subclass(OnCuda)


def test_the_route_launches_twice_a_batch_and_leaves_the_input(kernels):
    C = on_cuda(40)
    before = C.clone()
    found = triton.eigenvalues(C).as_subclass(torch.Tensor)
    assert_eigenvalues(found, C.as_subclass(torch.Tensor))
    assert torch.equal(C, before)
    assert kernels.tridiagonalise.grids == kernels.bisect.grids == [(3,)]


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_the_route_does_not_return_wrong_values(kernels, wrong):
    right = kernels.bisect.run

    def bisect(scale, d, e, w, n, **options):
        right(scale, d, e, w, n)
        w[1, 3] += wrong

    kernels.bisect.run = bisect
    with pytest.raises(Unavailable, match="have not the trace and the norm"):
        triton.eigenvalues(on_cuda(40))


@pytest.mark.parametrize("kernel", ["tridiagonalise", "bisect"])
def test_what_a_launch_raises_is_passed_on(kernels, kernel):
    def failing(*args, **options):
        raise FileNotFoundError("no ptxas")

    getattr(kernels, kernel).run = failing
    text = "do not compile or launch here: FileNotFoundError: no ptxas"
    with pytest.raises(Unavailable, match=text):
        triton.eigenvalues(on_cuda(4))


def test_without_triton_the_route_is_unavailable(monkeypatch):
    name = "repscope.linalg.routes.triton_kernels"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(routes, "triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(Unavailable, match="Triton cannot be imported: import of trit"):
        triton.eigenvalues(on_cuda(4))


@pytest.mark.usefixtures("kernels")
def test_what_the_route_does_not_serve(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unavailable, match="Triton serves CUDA devices, not cpu"):
        triton.eigenvalues(symmetric(4))
    with pytest.raises(Unavailable, match="holds n up to 128, not 129"):
        triton.eigenvalues(on_cuda(129))
    with pytest.raises(Unavailable, match=r"not torch\.float16"):
        triton.eigenvalues(on_cuda(4, torch.float16))


@pytest.mark.parametrize(("n", "block"), [(1, 32), (32, 32), (33, 64), (128, 128)])
def test_a_tile_is_a_power_of_two_that_holds_the_matrix(n, block):
    assert triton.tile(n, torch.float32)[0] == block
