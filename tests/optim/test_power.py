"""The power preconditioner: its formula, its limit, its manners as an optimizer."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from repscope.errors import UsageError
from repscope.optim import PowerPreconditioned, Shampoo, power_beta, powerprop

F = nn.functional


def network(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def fill_gradients(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    torch.manual_seed(step)
    x, y = torch.randn(8, 6, dtype=dtype), torch.randint(3, (8,))
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer, *, first: int, last: int) -> None:
    for step in range(first, last):
        fill_gradients(model, step)
        optimizer.step()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


# -- the formula -------------------------------------------------------------
INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "shampoo": lambda p: Shampoo(p, lr=0.1),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_scales_the_finished_step_of_matrices_alone(inner, floor) -> None:
    model = network()
    optimizer = INNER[inner](model.parameters())
    optimizer = PowerPreconditioned(optimizer, beta=0.7, floor=floor)
    for step in range(4):
        # The inner optimizer's own step, from the same place with the same state.
        plain_model, plain = copy.deepcopy((model, optimizer.optimizer))
        before = [param.detach().clone() for param in model.parameters()]
        train(plain_model, plain, first=step, last=step + 1)
        train(model, optimizer, first=step, last=step + 1)
        for theta, free, ours in zip(
            before, plain_model.parameters(), model.parameters(), strict=True
        ):
            gain = theta.abs().clamp(min=floor) ** 0.7 if theta.ndim > 1 else 1.0
            torch.testing.assert_close(ours, theta + gain * (free - theta))


def test_min_ndim_one_scales_biases_too() -> None:
    bias = nn.Parameter(torch.tensor([2.0, -0.5]))
    optimizer = torch.optim.SGD([bias], lr=1.0)
    optimizer = PowerPreconditioned(optimizer, beta=1.0, min_ndim=1)
    bias.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(bias.data, torch.tensor([0.0, -1.0]))


def test_beta_zero_is_the_inner_optimizer() -> None:
    scaled, plain = network(), network()
    inner = torch.optim.Adam(scaled.parameters(), lr=0.1)
    train(scaled, PowerPreconditioned(inner, beta=0.0), first=0, last=5)
    train(plain, torch.optim.Adam(plain.parameters(), lr=0.1), first=0, last=5)
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


DECOUPLED = {
    "adamw": lambda p, decay: torch.optim.AdamW(p, lr=0.1, weight_decay=decay),
    "nadamw": lambda p, decay: torch.optim.NAdam(
        p, lr=0.1, weight_decay=decay, decoupled_weight_decay=True
    ),
    "shampoo": lambda p, decay: Shampoo(p, lr=0.1, weight_decay=decay),
}
if hasattr(torch.optim, "Muon"):
    DECOUPLED["muon"] = lambda p, decay: torch.optim.Muon(p, lr=0.1, weight_decay=decay)


@pytest.mark.parametrize("inner", DECOUPLED)
def test_decoupled_decay_stays_outside(inner) -> None:
    start = torch.tensor([[2.0, -0.5], [0.1, 1.0]], dtype=torch.float64)
    ends = {}
    for decay in (0.0, 0.3):
        param = nn.Parameter(start.clone())
        optimizer = DECOUPLED[inner]([param], decay)
        optimizer = PowerPreconditioned(optimizer, beta=1.0)
        param.grad = torch.tensor([[0.3, 1.0], [-2.0, 0.7]], dtype=torch.float64)
        optimizer.step()
        ends[decay] = param.detach()
    assert (ends[0.0] - start).abs().min() > 1e-4
    torch.testing.assert_close(ends[0.3], ends[0.0] - 0.1 * 0.3 * start)


def test_a_parameter_without_gradient_neither_moves_nor_decays() -> None:
    used, frozen = (nn.Parameter(torch.full((2, 2), 3.0)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, frozen], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(2, 2)
    PowerPreconditioned(optimizer, beta=1.0).step()
    assert torch.equal(frozen, torch.full((2, 2), 3.0))


def test_a_step_made_of_many_evaluations_is_scaled_as_a_whole() -> None:
    ends = {}
    for beta in (None, 1.0):
        param = nn.Parameter(torch.tensor([[3.0, 0.5]]))
        optimizer = torch.optim.LBFGS([param], lr=0.1, max_iter=4)
        if beta:
            optimizer = PowerPreconditioned(optimizer, beta=beta)

        def closure(param=param, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == pytest.approx(9.25)
        ends[beta] = param.detach()
    start = torch.tensor([[3.0, 0.5]])
    torch.testing.assert_close(ends[1.0], start + start * (ends[None] - start))


# -- the limit: Power-propagation --------------------------------------------
def tiny_problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    layers = nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)
    x = torch.randn(40, 6, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()
    return nn.Sequential(*layers).double(), x, y


def flow(model, optimizer, x, y, *, n_steps) -> torch.Tensor:
    for _ in range(n_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()


def gap(alpha: float, *, beta: float, speed: float, n_steps: int) -> float:
    """Relative distance after time 2 between the two forms."""
    lr = 2.0 / n_steps
    model, x, y = tiny_problem()
    start = flow(model, None, x, y, n_steps=0)
    twin = powerprop(copy.deepcopy(model), alpha=alpha)
    reference = torch.optim.SGD(twin.parameters(), lr=lr)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr * speed)
    optimizer = PowerPreconditioned(optimizer, beta=beta)
    end = flow(model, optimizer, x, y, n_steps=n_steps)
    expected = flow(twin, reference, x, y, n_steps=n_steps)
    return float((end - expected).norm() / (end - start).norm())


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_gap_to_power_propagation_halves_with_the_step(alpha) -> None:
    hyper = {"beta": power_beta(alpha), "speed": alpha**2}
    coarse, fine = (gap(alpha, **hyper, n_steps=n) for n in (160, 320))
    assert fine < 0.01
    assert 1.9 < coarse / fine < 2.1


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_one_jacobian_factor_is_not_power_propagation(alpha) -> None:
    hyper = {"beta": 1 - 1 / alpha, "speed": alpha}
    coarse, fine = (gap(alpha, **hyper, n_steps=n) for n in (160, 320))
    assert fine > 0.1
    assert coarse / fine < 1.1


def test_powerprop_keeps_weights_and_function() -> None:
    model, x, _ = tiny_problem()
    before = [param.detach().clone() for param in model.parameters()]
    outputs = model(x)
    assert powerprop(model, alpha=2.5) is model
    torch.testing.assert_close(model(x), outputs)
    torch.testing.assert_close([model[0].weight, model[2].weight], before)


def test_powerprop_leaves_biases_alone() -> None:
    names = dict(powerprop(nn.Linear(3, 2), alpha=2.0).named_parameters())
    assert sorted(names) == ["bias", "parametrizations.weight.original"]


@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0])
def test_powerprop_gradient_is_finite_at_zero(alpha) -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.25]]))
    powerprop(layer, alpha=alpha)(torch.ones(1, 2)).sum().backward()
    (phi,) = layer.parameters()
    expected = torch.tensor([[0.0 ** (alpha - 1), 0.25 ** (1 - 1 / alpha)]]) * alpha
    torch.testing.assert_close(phi.grad, expected)


def test_powerprop_refuses_shared_weights_with_nothing_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    with pytest.raises(UsageError, match=r"1\.weight is shared by two modules"):
        powerprop(model, alpha=2.0)
    assert "0.weight" in dict(model.named_parameters())


def test_powerprop_refuses_to_be_applied_twice() -> None:
    model = powerprop(nn.Sequential(nn.Linear(3, 3)), alpha=2.0)
    with pytest.raises(UsageError, match="already reparameterised"):
        powerprop(model, alpha=2.0)


@pytest.mark.parametrize("alpha", [0.5, math.inf, math.nan])
def test_alpha_out_of_range_is_refused(alpha) -> None:
    with pytest.raises(UsageError, match="alpha must be finite and at least 1"):
        power_beta(alpha)
    with pytest.raises(UsageError, match="alpha must be finite and at least 1"):
        powerprop(nn.Linear(2, 2), alpha=alpha)


# -- exact zeros -------------------------------------------------------------
def layer_with_zeros() -> nn.Sequential:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = 0.0
        model[0].bias.zero_()
    return model


def wrapped(model: nn.Module, **hyper: float) -> PowerPreconditioned:
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    return PowerPreconditioned(inner, **{"beta": 1.0, **hyper})


def test_exact_zeros_are_named_once_and_stay() -> None:
    model = layer_with_zeros()
    optimizer = wrapped(model)
    fill_gradients(model, 0)
    expected = r"^exact zeros in parameter '2\.weight' of shape \(3, 5\): "
    with pytest.warns(UserWarning, match=expected) as caught:
        optimizer.step()
    (warning,) = caught
    assert warning.filename == __file__
    train(model, optimizer, first=1, last=4)  # a second warning would be an error
    assert model[2].weight[0, 0] == 0
    assert model[0].bias.all()


def test_zeros_that_join_later_are_named_too() -> None:
    model = network()
    optimizer = wrapped(model)
    train(model, optimizer, first=0, last=2)
    late = nn.Parameter(torch.zeros(2, 2))
    optimizer.add_param_group({"params": [("late", late)]})
    with pytest.warns(UserWarning, match=r"exact zeros in parameter 'late'"):
        optimizer.step()


@pytest.mark.parametrize("hyper", [{"floor": 1e-3}, {"beta": 0.0}])
def test_zeros_that_can_move_are_not_warned_of(hyper) -> None:
    model = layer_with_zeros()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, wrapped(model, **hyper), first=0, last=1)
    assert model[2].weight[0, 0] != 0


# -- manners of a torch optimizer --------------------------------------------
def test_groups_and_state_are_those_of_the_inner_optimizer() -> None:
    model = network()
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = PowerPreconditioned(inner, beta=1.0)
    train(model, optimizer, first=0, last=2)
    inner.load_state_dict(inner.state_dict())  # gives the inner one new lists
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    for name in ("param_groups", "state", "defaults"):
        value = copy.copy(getattr(inner, name))
        setattr(optimizer, name, value)
        assert getattr(inner, name) is value


def test_scheduler_and_zero_grad_work() -> None:
    model = network()
    optimizer = wrapped(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    train(model, optimizer, first=0, last=1)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.0
    before = copy.deepcopy(model)
    train(model, optimizer, first=1, last=2)
    assert same_weights(model, before)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def adam(model: nn.Module, **hyper: float) -> PowerPreconditioned:
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    return PowerPreconditioned(inner, **{"beta": 1.0, **hyper})


def test_resuming_from_a_checkpoint_is_not_stopping() -> None:
    model = network()
    optimizer = adam(model, beta=0.5, floor=0.01)
    train(model, optimizer, first=0, last=3)
    resumed = copy.deepcopy(model)
    again = adam(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, first=3, last=8)
    train(resumed, again, first=3, last=8)
    assert same_weights(model, resumed)


def test_state_is_exchanged_with_the_bare_inner_optimizer() -> None:
    model = network()
    inner = torch.optim.Adam(model.parameters(), lr=0.2)
    train(model, inner, first=0, last=2)
    optimizer = adam(model, beta=0.5)
    optimizer.load_state_dict(inner.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.state_dict()["power"]["beta"] == 0.5
    inner.load_state_dict(optimizer.state_dict())


def test_state_hooks_registered_on_the_wrapper_run() -> None:
    optimizer = adam(network())
    calls = []
    optimizer.register_state_dict_post_hook(lambda *args: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *args: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "loaded"]


def test_step_hooks_run_once_a_step() -> None:
    model = network()
    optimizer = adam(model)
    steps = []
    optimizer.register_step_post_hook(lambda *args: steps.append(args[0]))
    train(model, optimizer, first=0, last=3)
    assert steps == [optimizer] * 3


def pickled(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_a_copy_trains_alike(clone) -> None:
    model = network()
    optimizer = adam(model, beta=0.5)
    train(model, optimizer, first=0, last=2)
    twin_model, twin = clone((model, optimizer))
    train(model, optimizer, first=2, last=5)
    train(twin_model, twin, first=2, last=5)
    assert same_weights(model, twin_model)


def test_repr_shows_both() -> None:
    text = repr(adam(network(), beta=0.5))
    assert text.startswith("PowerPreconditioned(beta=0.5, min_ndim=2, floor=0.0")
    assert "optimizer=Adam (" in text


def test_bad_arguments_are_refused() -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"wraps a torch\.optim\.Optimizer, got list"):
        PowerPreconditioned(list(model.parameters()), beta=1.0)
    with pytest.raises(UsageError, match="beta must be finite and at least 0, got -1"):
        PowerPreconditioned(inner, beta=-1.0)
    with pytest.raises(
        UsageError, match="floor must be finite and at least 0, got nan"
    ):
        PowerPreconditioned(inner, beta=1.0, floor=math.nan)
    with pytest.raises(UsageError, match="min_ndim must be finite and at least 0"):
        PowerPreconditioned(inner, beta=1.0, min_ndim=-1)
