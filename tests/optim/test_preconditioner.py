"""P is what stands between a gradient and the step the optimizer takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repscope.errors import UsageError
from repscope.optim import (
    PowerPreconditioned,
    Shampoo,
    inverse_sqrt_preconditioner,
)

SHAPES = [(4, 3), (5,), (6, 1, 2), (3, 2, 2)]


def parameters():
    return [nn.Parameter(torch.randn(shape).double()) for shape in SHAPES]


def step(optimizer, params, grads):
    """Return what the optimizer added to each parameter."""
    before = [p.detach().clone() for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.step()
    return [p.detach() - old for p, old in zip(params, before, strict=True)]


def gradients(params):
    return [torch.randn_like(p) for p in params]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        # Roots of the first step stay in use for the second.
        lambda params: Shampoo(
            params, lr=0.1, root_every=9, warm_steps=1, norm_cap=False
        ),
    ],
    ids=["sgd", "shampoo"],
)
def test_twice_the_root_is_the_next_step(make):
    params = parameters()
    optimizer = make(params)
    step(optimizer, params, gradients(params))
    half = inverse_sqrt_preconditioner(optimizer)
    grads = gradients(params)
    twice = [half(p, half(p, g)) for p, g in zip(params, grads, strict=True)]
    for found, moved in zip(twice, step(optimizer, params, grads), strict=True):
        torch.testing.assert_close(found * -0.1, moved)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("beta", [None, 0.0, 1.5])
def test_twice_the_root_is_adams_last_step_without_momentum(beta, amsgrad):
    params = parameters()
    optimizer = inner = torch.optim.Adam(
        params, lr=0.1, betas=(0.0, 0.99), amsgrad=amsgrad
    )
    if beta is not None:
        optimizer = PowerPreconditioned(inner, beta=beta, floor=0.01)
    step(optimizer, params, [10 * g for g in gradients(params)])
    grads = gradients(params)
    theta = [p.detach().clone() for p in params]
    moved = step(optimizer, params, grads)
    with torch.no_grad():
        for p, old in zip(params, theta, strict=True):
            p.copy_(old)  # the power is that of the place it stepped from
    half = inverse_sqrt_preconditioner(optimizer)
    for p, grad, change in zip(params, grads, moved, strict=True):
        torch.testing.assert_close(half(p, half(p, grad)) * -0.1, change)


def test_optimizers_without_a_known_preconditioner_are_named():
    params = parameters()
    with pytest.raises(UsageError, match=r"of RMSprop is not known, only those of SGD"):
        inverse_sqrt_preconditioner(torch.optim.RMSprop(params))
    power = PowerPreconditioned(Shampoo(params, lr=0.1), beta=1.0)
    with pytest.raises(
        UsageError, match="PowerPreconditioned Shampoo has no symmetric"
    ):
        inverse_sqrt_preconditioner(power)


def test_parameters_without_a_preconditioner_are_named():
    params = parameters()
    for optimizer in (torch.optim.Adam(params), Shampoo(params, lr=0.1)):
        half = inverse_sqrt_preconditioner(optimizer)
        with pytest.raises(UsageError, match=r"of shape \(4, 3\) yet"):
            half(params[0], params[0])
        with pytest.raises(
            UsageError, match=r"shape \(2,\) is none of the optimizer's"
        ):
            half(nn.Parameter(torch.ones(2)), torch.ones(2))
