"""Optimizers by name, and what to write down about one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from repscope.errors import UnknownName, UsageError, suggest
from repscope.optim.power import PowerPreconditioned
from repscope.optim.shampoo import Shampoo


def make(name: str, params: ParamsT, **hyper: Any) -> Optimizer:
    """Build an optimizer from its name.

    Args:
        name: A key of `OPTIMIZERS`, or ``"package.module:Class"`` for any other
            callable that takes parameters and returns an optimizer.
        params: Parameters, named parameters or groups of either.
        **hyper: Passed on.

    Returns:
        The optimizer.

    Raises:
        UsageError: If the callable returned something else.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> make("sgd", [weight], lr=0.1).param_groups[0]["lr"]
        0.1
    """
    factory = _import(name) if ":" in name else _look_up(name)
    optimizer = factory(params, **hyper)
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"{name!r} returned a {type(optimizer).__name__}, which is no "
            "torch.optim.Optimizer"
        )
    return optimizer


def describe(optimizer: Optimizer) -> dict[str, Any]:
    """Return what a reader needs to know about an optimizer, ready for JSON.

    Args:
        optimizer: Any optimizer.

    Returns:
        ``{"class", "module", "groups"}`` with the hyper-parameters of each group; a
        `PowerPreconditioned` has its own numbers and ``"optimizer"``, the inner one.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> about = describe(Shampoo([weight], lr=0.1))
        >>> about["class"], about["groups"][0]["lr"], about["groups"][0]["beta"]
        ('Shampoo', 0.1, None)
    """
    kind = type(optimizer)
    about = {"class": kind.__name__, "module": kind.__module__}
    if isinstance(optimizer, PowerPreconditioned):
        power = optimizer.state_dict()["power"]
        return {**about, **power, "optimizer": describe(optimizer.optimizer)}
    groups = [
        {key: _plain(value) for key, value in group.items() if key not in _TENSORS}
        for group in optimizer.param_groups
    ]
    return {**about, "groups": groups}


_TENSORS = ("params", "param_names")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def _look_up(name: str) -> Callable[..., Any]:
    if name not in OPTIMIZERS:
        raise UnknownName(
            f"no optimizer is called {name!r}{suggest(name, OPTIMIZERS)} Known: "
            f"{', '.join(OPTIMIZERS)}, or 'package.module:Class'"
        )
    return OPTIMIZERS[name]


def _import(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UnknownName(
            f"optimizer {path!r}: cannot import {module_name!r} ({error})"
        ) from error
    factory: Callable[..., Any] | None = getattr(module, attribute, None)
    if factory is None:
        raise UnknownName(
            f"optimizer {path!r}: {module_name!r} has no {attribute!r}"
            f"{suggest(attribute, vars(module))}"
        )
    return factory


def _power(inner: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    def build(
        params: ParamsT,
        *,
        beta: float = 1.0,
        min_ndim: int = 2,
        floor: float = 0.0,
        **hyper: Any,
    ) -> Optimizer:
        optimizer = inner(params, **hyper)
        return PowerPreconditioned(optimizer, beta=beta, min_ndim=min_ndim, floor=floor)

    return build


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "shampoo": Shampoo,
    "p-sgd": _power(torch.optim.SGD),
    "p-adam": _power(torch.optim.Adam),
}
