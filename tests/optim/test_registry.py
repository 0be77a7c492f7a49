"""Laws that every row of OPTIMIZERS obeys, and the ways to ask for one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from repscope.errors import UnknownName, UsageError
from repscope.optim import OPTIMIZERS, PowerPreconditioned, Shampoo, describe, make

LEARNING_RATES = {"sgd": 0.3, "p-sgd": 1.0, "shampoo": 0.1, "p-adam": 0.05}


def task(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(64, 6)
    return model, x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def train(name, *, seed=0, n_steps=60, resume_at=None) -> tuple[nn.Module, list[float]]:
    """Train by name; with ``resume_at``, in a new optimizer from that step on."""
    model, x, y = task(seed)
    hyper = {"lr": LEARNING_RATES.get(name, 0.02)}
    optimizer = make(name, model.parameters(), **hyper)
    losses = []
    for step in range(n_steps):
        if step == resume_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make(name, model.parameters(), lr=9.0)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name) -> None:
    _, losses = train(name)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_seed_is_bit_identical_and_another_is_not(name) -> None:
    _, first = train(name)
    _, again = train(name)
    _, other = train(name, seed=1)
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_not_stopping(name) -> None:
    straight, _ = train(name, n_steps=20)
    resumed, _ = train(name, n_steps=20, resume_at=7)
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_description_survives_json_and_names_the_learning_rate(name) -> None:
    model, *_ = task(0)
    about = describe(make(name, model.named_parameters(), lr=0.25))
    assert json.loads(json.dumps(about)) == about
    (group,) = about.get("optimizer", about)["groups"]
    assert group["lr"] == 0.25
    assert "params" not in group
    assert "param_names" not in group


def test_description_of_the_preconditioner_shows_what_is_inside() -> None:
    model, *_ = task(0)
    about = describe(make("p-adam", model.parameters(), lr=0.1, beta=0.5, floor=1e-3))
    assert about["class"] == "PowerPreconditioned"
    assert (about["beta"], about["min_ndim"], about["floor"]) == (0.5, 2, 1e-3)
    assert about["optimizer"]["class"] == "Adam"
    assert about["optimizer"]["groups"][0]["betas"] == [0.9, 0.999]


def test_description_of_a_group_with_tensors_and_functions() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.5))
    optimizer.param_groups[0]["rule"] = len
    (group,) = describe(optimizer)["groups"]
    assert group["lr"] == 0.5
    assert group["rule"] == "<built-in function len>"


def test_hyper_parameters_reach_both_layers_of_p_sgd() -> None:
    model, *_ = task(0)
    optimizer = make("p-sgd", model.parameters(), lr=0.1, momentum=0.9, min_ndim=1)
    assert isinstance(optimizer, PowerPreconditioned)
    assert (optimizer.beta, optimizer.min_ndim) == (1.0, 1)
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_a_dotted_path_names_any_optimizer() -> None:
    model, *_ = task(0)
    assert isinstance(make("repscope.optim:Shampoo", model.parameters(), lr=1), Shampoo)
    named = make("torch.optim:RMSprop", model.parameters(), lr=0.1)
    assert type(named) is torch.optim.RMSprop


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shampo", r"no optimizer is called 'shampo'; did you mean 'shampoo'"),
        ("nothing", r"Known: sgd, adam, adamw, shampoo, p-sgd, p-adam, or"),
        ("no.such.room:Adam", r"cannot import 'no\.such\.room'"),
        ("torch.optim:Adem", r"has no 'Adem'; did you mean 'Adam'"),
    ],
)
def test_unknown_names_are_refused_with_what_is_known(name, message) -> None:
    model, *_ = task(0)
    with pytest.raises(UnknownName, match=message):
        make(name, model.parameters(), lr=0.1)


def test_what_is_no_optimizer_is_refused() -> None:
    model, *_ = task(0)
    with pytest.raises(
        UsageError, match=r"'builtins:list' returned a list, which is no"
    ):
        make("builtins:list", model.parameters())
