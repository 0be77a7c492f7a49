"""Shampoo against a package, against a float64 twin, and at its edges."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn

from repscope.errors import NonFiniteError, UsageError
from repscope.optim import Shampoo

EXACT = {"root_every": 1, "norm_cap": False}


def gradients(shape: tuple[int, ...], n_steps: int) -> np.ndarray:
    # Scales that differ between steps tell a running sum from an average.
    noise = np.random.default_rng(1).normal(size=(n_steps, *shape))
    scale = np.linspace(0.3, 2.0, n_steps).reshape(-1, *[1] * len(shape))
    return noise * scale


def trajectory(optimizer, param: nn.Parameter, grads: np.ndarray) -> np.ndarray:
    path = []
    for grad in grads:
        param.grad = torch.as_tensor(grad, dtype=param.dtype).clone()
        optimizer.step()
        path.append(param.detach().numpy().copy())
    return np.stack(path)


@pytest.mark.parametrize("shape", [(7, 5), (7,)])
def test_equals_pytorch_optimizer_step_for_step(shape) -> None:
    start = torch.randn(shape)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    package = pytorch_optimizer.Shampoo(
        [theirs],
        lr=0.1,
        momentum=0.0,
        preconditioning_compute_steps=1,
        matrix_eps=1e-4,
    )
    grads = gradients(shape, 6)
    expected = trajectory(package, theirs, grads) - start.numpy()
    path = trajectory(Shampoo([ours], lr=0.1, **EXACT), ours, grads) - start.numpy()
    for step, truth in zip(path, expected, strict=True):
        assert np.linalg.norm(step - truth) <= 1e-3 * np.linalg.norm(truth)


APPLY = {1: "ai,i->a", 2: "ai,bj,ij->ab", 3: "ai,bj,ck,ijk->abc"}
GRAM = {
    1: ["i,a->ia"],
    2: ["ij,aj->ia", "ij,ib->jb"],
    3: ["ijk,ajk->ia", "ijk,ibk->jb", "ijk,ijc->kc"],
}


def power(C: np.ndarray, exponent: float) -> np.ndarray:
    left, values, right = np.linalg.svd(C)
    return (left * values**exponent) @ right


def twin(
    theta, grads, *, lr, eps, beta, root_every, warm_steps, norm_cap, weight_decay
):
    """Follow the algorithm in numpy, slowly; no dimension may have size 1."""
    order = theta.ndim
    statistics = [np.zeros((n, n)) for n in theta.shape]
    path = []
    for t, G in enumerate(grads, start=1):
        for d, gram in enumerate(GRAM[order]):
            fresh = np.einsum(gram, G, G)
            if beta is None:
                statistics[d] = statistics[d] + fresh
            else:
                statistics[d] = beta * statistics[d] + (1 - beta) * fresh
        if t <= warm_steps or t in range(1, len(grads) + 1, root_every):
            correction = 1 if beta is None else 1 - beta**t
            roots = [
                power(C / correction + eps * np.eye(len(C)), -1 / (2 * order))
                for C in statistics
            ]
        step = np.einsum(APPLY[order], *roots, G)
        bound = {1: 1.0, 2: math.sqrt(min(theta.shape))}.get(order, math.inf)
        norm = math.sqrt((step**2).sum())
        if norm_cap and norm > bound:
            step = step * bound / norm
        theta = theta - lr * weight_decay * theta - lr * step
        path.append(theta)
    return np.stack(path)


PAPER = {
    "eps": 1e-4,
    "beta": None,
    "root_every": 1,
    "warm_steps": 0,
    "norm_cap": False,
    "weight_decay": 0.0,
}


@pytest.mark.parametrize("shape", [(6,), (5, 4), (4, 3, 2)], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"beta": 0.9},
        {"beta": 0.0},
        {"eps": 0.1, "weight_decay": 0.3},
        {"root_every": 4},
        {"root_every": 3, "warm_steps": 2, "norm_cap": True},
        {"beta": 0.8, "root_every": 5, "warm_steps": 3, "norm_cap": True},
    ],
    ids=str,
)
def test_equals_a_float64_twin(shape, change) -> None:
    hyper = {**PAPER, **change}
    start = np.random.default_rng(0).normal(size=shape)
    param = nn.Parameter(torch.from_numpy(start.copy()))
    grads = gradients(shape, 12)
    path = trajectory(Shampoo([param], lr=0.1, **hyper), param, grads)
    expected = twin(start, grads, lr=0.1, **hyper)
    np.testing.assert_allclose(path, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "squeezed"),
    [((5, 1), (5,)), ((4, 1, 3), (4, 3)), ((1, 1), (1,)), ((), (1,))],
)
def test_dimensions_of_size_one_are_skipped(shape, squeezed) -> None:
    grads = gradients(squeezed, 6)
    paths = []
    for form in (shape, squeezed):
        param = nn.Parameter(torch.zeros(form, dtype=torch.float64))
        optimizer = Shampoo([param], lr=0.1)
        paths.append(trajectory(optimizer, param, grads.reshape(6, *form)))
    np.testing.assert_array_equal(paths[0].reshape(paths[1].shape), paths[1])


def test_a_scalar_follows_adagrad() -> None:
    param = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    grads = np.array([0.5, -2.0, 1.0])
    path = trajectory(Shampoo([param], lr=0.1, **EXACT), param, grads)
    steps = grads / np.sqrt(np.cumsum(grads**2) + 1e-4)
    np.testing.assert_allclose(path, 1.0 - 0.1 * np.cumsum(steps), rtol=1e-12)


@pytest.mark.parametrize("beta", [None, 0.99])
def test_first_step_has_unit_singular_values(beta) -> None:
    param = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
    optimizer = Shampoo([param], lr=1.0, eps=1e-16, beta=beta)
    trajectory(optimizer, param, 1e3 * gradients((7, 5), 1))
    values = torch.linalg.svdvals(param.detach())
    torch.testing.assert_close(values, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "bound"), [((8,), 1.0), ((6, 4), 2.0), ((3, 2, 2), None)]
)
def test_norm_cap_holds_where_stale_roots_meet_a_new_direction(shape, bound) -> None:
    grads = np.zeros((2, *shape))
    grads[0].flat[0] = 1.0
    grads[1].flat[-1] = 1.0
    norms = []
    for norm_cap in (True, False):
        param = nn.Parameter(torch.zeros(shape))
        optimizer = Shampoo([param], lr=1.0, warm_steps=0, norm_cap=norm_cap)
        path = trajectory(optimizer, param, grads)
        norms.append(np.linalg.norm(path[1] - path[0]))
    capped, free = norms
    assert free > 50
    assert capped == pytest.approx(free if bound is None else bound, rel=1e-5)


def test_rank_deficient_statistics_in_float32() -> None:
    # 784 inputs of which 500 are always black, and fewer gradients than inputs.
    grads = gradients((10, 784), 3)
    grads[:, :, ::2] = 0
    grads[:, :, 500:] = 0
    ends = []
    for dtype in (torch.float32, torch.float64):
        param = nn.Parameter(torch.zeros(10, 784, dtype=dtype))
        optimizer = Shampoo([param], lr=0.1, warm_steps=0)
        ends.append(torch.from_numpy(trajectory(optimizer, param, grads)[-1]).double())
    single, double = ends
    assert torch.linalg.norm(single - double) < 0.01 * torch.linalg.norm(double)
    assert not single[:, 500:].any()


# -- bad input ---------------------------------------------------------------
def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(model: nn.Module, optimizer, *, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (math.nan, r"NaN or infinity in 1 of 15 entries"),
        (-math.inf, r"NaN or infinity in 1 of 15 entries"),
        (1e30, r"too large to be squared in torch\.float32"),
    ],
)
@pytest.mark.parametrize("n_before", [0, 3])
def test_non_finite_gradient_is_refused_with_nothing_changed(
    value, fault, n_before
) -> None:
    model = network()
    optimizer = Shampoo(model.named_parameters(), lr=0.1)
    train(model, optimizer, first=0, last=n_before)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model[2].weight.grad[1, 2] = value
    name = r"parameter '2\.weight' of shape \(3, 5\) "
    with pytest.raises(NonFiniteError, match=name + ".*" + fault):
        optimizer.step()
    after = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_parameter_without_a_name_is_named_by_its_place() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)]
    optimizer = Shampoo(groups, lr=0.1)
    groups[1]["params"][0].grad = torch.full((2,), math.nan)
    with pytest.raises(NonFiniteError, match=r"parameter 0 of group 1 of shape \(2,\)"):
        optimizer.step()


def test_an_overflowing_step_moves_no_parameter() -> None:
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = Shampoo(params, lr=0.1, eps=1e-320, warm_steps=0)
    for param in params:
        param.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    params[1].grad[1] = 1e153
    with pytest.raises(NonFiniteError, match=r"step of parameter 1 .* overflows"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = Shampoo(embedding.named_parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"'weight' .*sparse_coo; .* sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_other_dtypes_are_refused(dtype) -> None:
    optimizer = Shampoo([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(UsageError, match=r"parameter 0 of group 1 .* is torch\."):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(2, dtype=dtype))]}
        )
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"beta": 1.0}, r"beta must be None or in \[0, 1\)"),
        ({"root_every": 0}, "root_every must be at least 1"),
        ({"warm_steps": -1}, "warm_steps must be at least 0"),
        ({"weight_decay": -1e-3}, "weight_decay must be at least 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(hyper, message) -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(UsageError, match=message):
        Shampoo(params, **{"lr": 0.1, **hyper})
    with pytest.raises(UsageError, match=message):
        Shampoo([{"params": params, **hyper}], lr=0.1)


# -- manners of a torch optimizer --------------------------------------------
@pytest.mark.parametrize("beta", [None, 0.95])
def test_resuming_from_a_checkpoint_is_not_stopping(beta) -> None:
    # Roots are stale at the checkpoint, so they must be part of it.
    hyper = {"lr": 0.1, "beta": beta, "root_every": 4, "warm_steps": 0}
    model = network()
    optimizer = Shampoo(model.parameters(), **hyper)
    train(model, optimizer, first=0, last=3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, first=3, last=12)

    resumed = network()
    again = Shampoo(resumed.parameters(), lr=9.0)
    file.seek(0)
    weights, state = torch.load(file)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(resumed, again, first=3, last=12)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_a_deep_copy_trains_alike() -> None:
    model = network()
    optimizer = Shampoo(model.named_parameters(), lr=0.1)
    train(model, optimizer, first=0, last=3)
    twin_model, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, first=3, last=8)
    train(twin_model, twin_optimizer, first=3, last=8)
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))


def test_batched_roots_equal_one_optimizer_per_parameter() -> None:
    together, apart = network(), network()
    joint = Shampoo(together.parameters(), lr=0.1)
    single = [Shampoo([param], lr=0.1) for param in apart.parameters()]
    for _ in range(4):
        for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape)
            theirs.grad = ours.grad.clone()
        joint.step()
        for optimizer in single:
            optimizer.step()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_groups_keep_their_own_hyper_parameters() -> None:
    still, moving = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [still], "lr": 0.0}, {"params": [moving]}]
    optimizer = Shampoo(groups, lr=0.1)
    for param in (still, moving):
        param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3))
    assert (moving < 1).all()


def test_parameters_without_gradient_or_entries_stay() -> None:
    frozen, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 2))
    empty.grad = torch.ones(0, 2)
    optimizer = Shampoo([frozen, empty], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3))
    assert not optimizer.state_dict()["state"]


def test_gradients_are_left_as_they_were() -> None:
    param = nn.Parameter(torch.zeros(4, 3))
    param.grad = torch.randn(4, 3)
    before = param.grad.clone()
    Shampoo([param], lr=0.1).step()
    assert torch.equal(param.grad, before)


def test_closure_is_evaluated_with_gradients_and_returned() -> None:
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Shampoo([param], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 25.0
    assert param.square().sum() < 25.0
