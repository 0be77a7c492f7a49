"""Copies of models that can be changed and scored without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from repscope.errors import UsageError


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


@contextmanager
def forked(model: nn.Module) -> Iterator[None]:
    """Give torch's random state back afterwards, on the devices of a model too.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


def score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Return what ``evaluate`` says, at the cost of no random number of the caller.

    Args:
        evaluate: Takes a model, returns a number.
        model: One that may be changed.

    Returns:
        A Python float.
    """
    with forked(model):
        return float(torch.as_tensor(evaluate(model)).detach())


def check_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Refuse two models that differ in a name or a shape.

    Args:
        a: State of ``model_a``.
        b: State of ``model_b``.

    Raises:
        UsageError: If they do; the first place is named.
    """
    shapes_a, shapes_b = (
        {name: tuple(value.shape) for name, value in state.items()} for state in (a, b)
    )
    for name in [*shapes_a, *shapes_b]:
        if shapes_a.get(name) != shapes_b.get(name):
            raise UsageError(
                f"model_a and model_b must have one architecture: {name!r} has shape "
                f"{shapes_a.get(name, 'none')} in model_a and "
                f"{shapes_b.get(name, 'none')} in model_b"
            )


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
