"""The preconditioner inside an optimizer, as something to multiply with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repscope.errors import UsageError
from repscope.optim.power import PowerPreconditioned
from repscope.optim.shampoo import Shampoo

Half = Callable[[nn.Parameter, Tensor], Tensor]


def inverse_sqrt_preconditioner(optimizer: Optimizer) -> Half:
    r"""Return what multiplies a tensor by the inverse square root of P.

    P is what stands between gradient and step, :math:`\Delta\theta = -\eta P^{-1} g`,
    as the state of the optimizer has it now: the identity for SGD (with momentum, too);
    :math:`\mathrm{diag}(\sqrt{\hat v} + \epsilon)` for Adam and AdamW, with the
    bias-corrected second moment; for `Shampoo` the roots in use, so :math:`P^{-1/2}` is
    :math:`(L + \epsilon)^{-1/8} \otimes (R + \epsilon)^{-1/8}` for a matrix. A
    `PowerPreconditioned` SGD or Adam has a diagonal more. Momentum, weight decay and
    Shampoo's norm cap are not part of it.

    Args:
        optimizer: SGD, Adam, AdamW, `Shampoo` or `PowerPreconditioned`, after a step.

    Returns:
        ``(parameter, tensor of its shape) -> tensor``, as
        ``rs.hessian_top_eigenvalue(preconditioner=)`` takes it. It raises `UsageError`
        for a parameter that the optimizer has not stepped yet.

    Raises:
        UsageError: If the optimizer is another one, or a `PowerPreconditioned` Shampoo,
            whose P is not symmetric.

    References:
        Cohen et al. (2022), Adaptive gradient methods at the edge of stability, arXiv
        2207.14484.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.Adam([weight], eps=0.0)
        >>> weight.grad = torch.tensor([4.0, 0.25])
        >>> optimizer.step()
        >>> half = inverse_sqrt_preconditioner(optimizer)
        >>> half(weight, torch.ones(2)).round(decimals=4)
        tensor([0.5000, 2.0000])
    """
    inner = optimizer
    if isinstance(optimizer, PowerPreconditioned):
        inner = optimizer.optimizer
        if optimizer.beta and isinstance(inner, Shampoo):
            raise UsageError(
                "PowerPreconditioned Shampoo has no symmetric P: its diagonal and "
                "Shampoo's factors do not commute"
            )
    root_of = _kind(inner)
    roots = {
        id(parameter): root_of(inner.state.get(parameter, {}), group)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    powers = _powers(optimizer)

    @torch.no_grad()
    def half(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        shape = tuple(parameter.shape)
        if id(parameter) not in roots:
            raise UsageError(
                f"a parameter of shape {shape} is none of the optimizer's; give it "
                "those of this model"
            )
        root = roots[id(parameter)]
        if root is None:
            raise UsageError(
                f"the optimizer has not stepped its parameter of shape {shape} yet: it "
                "has no preconditioner before that"
            )
        return root(tensor) * powers.get(id(parameter), 1.0)

    return half


@torch.no_grad()
def _powers(optimizer: Optimizer) -> dict[int, Tensor]:
    if not isinstance(optimizer, PowerPreconditioned):
        return {}
    return {
        id(parameter): parameter.abs().clamp(min=optimizer.floor)
        ** (optimizer.beta / 2)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.ndim >= optimizer.min_ndim
    }


# -- one kind each -----------------------------------------------------------
_Root = Callable[[Tensor], Tensor]
# State and group of a parameter -> P^-1/2, or None before its first step.
_RootOf = Callable[[dict[str, Any], dict[str, Any]], _Root | None]


def _kind(optimizer: Optimizer) -> _RootOf:
    for kind, root_of in _KINDS.items():
        if isinstance(optimizer, kind):
            return root_of
    raise UsageError(
        f"the preconditioner of {type(optimizer).__name__} is not known, only those of "
        f"{', '.join(kind.__name__ for kind in _KINDS)}; pass a function "
        "(parameter, tensor) -> tensor of your own"
    )


def _sgd(state: dict[str, Any], group: dict[str, Any]) -> _Root | None:
    return lambda tensor: tensor


def _adam(state: dict[str, Any], group: dict[str, Any]) -> _Root | None:
    if not state:
        return None
    moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    unbiased = moment / (1 - float(group["betas"][1]) ** float(state["step"]))
    root = (unbiased.sqrt() + group["eps"]).sqrt()
    return lambda tensor: tensor / root


def _shampoo(state: dict[str, Any], group: dict[str, Any]) -> _Root | None:
    if not state:
        return None
    halves = [_square_root(root) for root in state["roots"]]

    def root(tensor: Tensor) -> Tensor:
        # Seen without its dimensions of size 1, which have no factor.
        found = tensor.reshape([len(half) for half in halves])
        for half in halves:
            found = torch.tensordot(found, half, dims=([0], [0]))
        return found.view_as(tensor)

    return root


def _square_root(root: Tensor) -> Tensor:
    values, V = torch.linalg.eigh(root.to(torch.float64))
    half: Tensor = (V * values.clamp(min=0).sqrt()) @ V.mT
    return half.to(root.dtype)


_KINDS: dict[type[Optimizer], _RootOf] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    Shampoo: _shampoo,
}
