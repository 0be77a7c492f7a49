"""Against the dense Hessian of a tiny network, by second derivatives of autograd."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import repscope as rs
from repscope.errors import NonFiniteError, UsageError
from repscope.optim import Shampoo, inverse_sqrt_preconditioner

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(2)).double()
Y = torch.arange(30) % 3


def mlp(dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loss(model):
    return nn.functional.cross_entropy(model(X.to(model[0].weight.dtype)), Y)


def dense(model):
    """Return the Hessian, parameters in order and flat."""
    names = dict(model.named_parameters())
    sizes = [p.numel() for p in names.values()]

    def of_flat(flat):
        pieces = flat.split(sizes)
        pairs = zip(names.items(), pieces, strict=True)
        state = {name: piece.view_as(p) for (name, p), piece in pairs}
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, state, X), Y
        )

    flat = torch.cat([p.detach().flatten() for p in names.values()])
    return torch.autograd.functional.hessian(of_flat, flat).numpy()


def stepped(optimizer, **hyper):
    """Return a network and its optimizer after a few steps."""
    model = mlp()
    optimizer = optimizer(model.parameters(), lr=0.05, **hyper)
    for _ in range(4):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model, optimizer


def inverse_preconditioner(model, optimizer):
    """Return P^-1 as a dense matrix, written down from the optimizer's state."""
    blocks = []
    for p in model.parameters():
        state = optimizer.state[p]
        if "exp_avg_sq" in state:
            v = state["exp_avg_sq"].numpy() / (1 - 0.999 ** int(state["step"]))
            blocks.append(np.diag(1 / (np.sqrt(v.ravel()) + 1e-8)))
        elif "roots" in state:
            roots = [root.numpy() for root in state["roots"]]
            blocks.append(np.kron(*roots) if len(roots) == 2 else roots[0])
        else:
            blocks.append(np.eye(p.numel()))
    return scipy.linalg.block_diag(*blocks)


KINDS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "shampoo": (Shampoo, {}),
}


# -- plain -------------------------------------------------------------------
def test_the_top_eigenvalue_is_that_of_the_dense_hessian():
    model = mlp()
    expected = scipy.linalg.eigvalsh(dense(model))[-1]
    found = rs.hessian_top_eigenvalue(model, loss, tolerance=1e-9)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.converged
    assert not found.preconditioned
    quick = rs.hessian_top_eigenvalue(model, loss)
    assert abs(quick.value - expected) <= quick.residual <= 1e-3 * expected
    assert quick.n_products < found.n_products <= 43
    single = rs.hessian_top_eigenvalue(copy.deepcopy(model).float(), loss)
    assert single.value == pytest.approx(expected, rel=1e-5)


def test_the_trace_lies_within_its_standard_error():
    model = mlp()
    expected = np.trace(dense(model))
    found = rs.hessian_trace(model, loss, n_probes=200)
    assert abs(found.value - expected) < 4 * found.stderr
    assert found.stderr < 0.1 * abs(expected)
    # Var of z'Hz is 2 sum of squares off the diagonal.
    H = dense(model)
    off = H - np.diag(np.diag(H))
    assert found.stderr == pytest.approx(
        math.sqrt(2 * np.square(off).sum() / 200), rel=0.2
    )
    assert rs.hessian_trace(model, loss, n_probes=200) == found


def quadratic(values):
    model = nn.Linear(len(values), 1, bias=False, dtype=torch.float64)
    scale = torch.tensor(values, dtype=torch.float64)
    return model, lambda m: (scale * m.weight.square()).sum() / 2


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([3.0, -5.0, 1.0], 3.0),  # the largest, not the one largest in magnitude
        ([-1.0, -2.0], -1.0),
        ([2.0, 2.0, 2.0], 2.0),
        ([7.0], 7.0),
    ],
)
def test_quadratics_of_which_everything_is_known(values, top):
    model, bowl = quadratic(values)
    found = rs.hessian_top_eigenvalue(model, bowl)
    assert found.value == pytest.approx(top)
    assert found.converged
    trace = rs.hessian_trace(model, bowl, n_probes=3)
    assert (trace.value, trace.stderr) == pytest.approx((sum(values), 0), abs=1e-12)
    assert trace.to_frame().shape == (1, 4)
    assert found.to_frame().shape == (1, 5)


def test_a_loss_without_curvature_has_none():
    model = nn.Linear(3, 2)
    found = rs.hessian_top_eigenvalue(model, lambda m: m(torch.ones(1, 3)).sum())
    assert (found.value, found.residual, found.converged) == (0, 0, True)
    assert rs.hessian_trace(model, lambda m: m.weight.sum()).value == 0


def test_parameters_without_gradient_or_use_take_no_part():
    model = mlp()
    model[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(7)))
    found = rs.hessian_top_eigenvalue(model, loss, tolerance=1e-9)
    H = dense(mlp_of(model))[25:, 25:]
    assert found.value == pytest.approx(scipy.linalg.eigvalsh(H)[-1], rel=1e-8)


def mlp_of(model):
    clone = mlp()
    clone.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k != "unused"}
    )
    return clone


def test_what_did_not_converge_says_so():
    found = rs.hessian_top_eigenvalue(mlp(), loss, tolerance=1e-12, max_products=2)
    assert (found.n_products, found.converged) == (2, False)
    assert found.residual > 0


def test_a_curvature_that_is_not_finite_is_nan():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    found = rs.hessian_top_eigenvalue(model, lambda m: m.weight.abs().pow(1.5).sum())
    assert math.isnan(found.value)
    assert not found.converged


def test_the_model_and_the_random_state_are_left_alone():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)
    )
    model.double().train()
    model(X).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    rs.hessian_top_eigenvalue(model, loss, max_products=3)
    with torch.no_grad():
        rs.hessian_trace(model, loss, n_probes=2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


# -- preconditioned ----------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_preconditioned_curvature_is_that_of_the_dense_matrices(kind):
    make, hyper = KINDS[kind]
    model, optimizer = stepped(make, **hyper)
    half = inverse_sqrt_preconditioner(optimizer)
    found = rs.hessian_top_eigenvalue(model, loss, preconditioner=half, tolerance=1e-10)
    H, inverse = dense(model), inverse_preconditioner(model, optimizer)
    # scipy solves H v = lambda P v
    expected = scipy.linalg.eigh(H, np.linalg.inv(inverse), eigvals_only=True)
    assert found.value == pytest.approx(expected[-1], rel=1e-6)
    assert found.preconditioned
    trace = rs.hessian_trace(model, loss, preconditioner=half, n_probes=100)
    assert abs(trace.value - np.trace(inverse @ H)) < 4 * trace.stderr


def test_rescaling_a_relu_pair_moves_the_plain_eigenvalue_only():
    """The same function, sharper; Shampoo and Adam feel it less than SGD."""
    a = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[0].weight *= 10
        b[0].bias *= 10
        b[2].weight /= 10
    torch.testing.assert_close(a(X), b(X))
    plain = [rs.hessian_top_eigenvalue(m, loss).value for m in (a, b)]
    assert plain[1] > 10 * plain[0]
    # A preconditioner that rescales along with the weights undoes it exactly.
    scale = {id(b[0].weight): 10.0, id(b[0].bias): 10.0, id(b[2].weight): 0.1}
    undone = rs.hessian_top_eigenvalue(
        b, loss, preconditioner=lambda p, v: v * scale.get(id(p), 1.0)
    )
    assert undone.value == pytest.approx(plain[0], rel=1e-5)


# -- bad input ---------------------------------------------------------------
@pytest.mark.parametrize("reading", [rs.hessian_top_eigenvalue, rs.hessian_trace])
def test_losses_that_have_no_curvature_are_named(reading):
    model = mlp()
    with pytest.raises(UsageError, match="must return a scalar tensor, got float"):
        reading(model, lambda m: 1.0)
    with pytest.raises(UsageError, match=r"got Tensor of shape \(30, 3\)"):
        reading(model, lambda m: m(X))
    with pytest.raises(UsageError, match="does not depend on the model it is given"):
        reading(model, lambda m: loss(model))
    with pytest.raises(UsageError, match="does not depend on the model it is given"):
        reading(model, lambda m: loss(m).detach())
    with pytest.raises(NonFiniteError, match="is nan, which has no curvature"):
        reading(model, lambda m: loss(m) * math.nan)


def test_numbers_out_of_range_are_named():
    with pytest.raises(UsageError, match="tolerance must be positive and max_products"):
        rs.hessian_top_eigenvalue(mlp(), loss, tolerance=0)
    with pytest.raises(UsageError, match=r"got 0\.001 and 0"):
        rs.hessian_top_eigenvalue(mlp(), loss, max_products=0)
    with pytest.raises(UsageError, match="n_probes must be at least 2"):
        rs.hessian_trace(mlp(), loss, n_probes=1)
