"""Copies of models that can be changed and scored without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize


def effective(model: nn.Module) -> nn.Module:
    """Return a deep copy whose parametrized weights are plain parameters.

    Args:
        model: Any module.

    Returns:
        The copy, in the same mode.
    """
    clone = copy.deepcopy(model)
    for module in list(clone.modules()):
        if parametrize.is_parametrized(module):
            _fold(module)
    return clone


def score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Return what ``evaluate`` says, at the cost of no random number of the caller.

    Args:
        evaluate: Takes a model, returns a number.
        model: One that may be changed.

    Returns:
        A Python float.
    """
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        return float(torch.as_tensor(evaluate(model)).detach())


# -- helpers -----------------------------------------------------------------
def _fold(module: nn.Module) -> None:
    held = cast("nn.ModuleDict", module.parametrizations)
    values = {name: getattr(module, name).detach().clone() for name in held}
    del module.parametrizations
    # A deep copy shares its generated class with the user's model, which
    # parametrize.remove_parametrizations would edit and so break.
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))
