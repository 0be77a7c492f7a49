"""What can be captured: from a forward, from the state of a run, from an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repscope.capture.selection import named_modules
from repscope.errors import MissingOptimizer, ShardedParameter, UnknownName, suggest

Reader = Callable[[nn.Module, Optimizer | None], dict[str, Tensor]]


@dataclass(frozen=True)
class Target:
    """One kind of thing that can be captured.

    Attributes:
        moment: ``"forward"``: the hooks of a forward deliver it; ``"state"``: it can be
            read between two steps; ``"update"``: it is there while the optimizer steps.
        read: How to read it from the model and its optimizer.
        needs_optimizer: Whether it cannot be had without ``optimizer=``.
    """

    moment: Literal["forward", "state", "update"]
    read: Reader | None = None
    needs_optimizer: bool = False


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under the name the user knows, each once.

    Args:
        model: Any module.

    Returns:
        Dotted parameter name -> parameter, in order of definition.
    """
    owners = [("", model), *named_modules(model)]
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in owners:
        for name, value in module.named_parameters(prefix=prefix, recurse=False):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def weights(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Return a copy of every parameter.

    Args:
        model: Any module.
        optimizer: Not needed.

    Returns:
        Dotted parameter name -> tensor on the CPU, in order of definition.

    Example:
        >>> sorted(weights(nn.Linear(2, 3)))
        ['bias', 'weight']
    """
    return {name: _copy(value) for name, value in parameters(model).items()}


def gradients(
    model: nn.Module, optimizer: Optimizer | None = None
) -> dict[str, Tensor]:
    """Return a copy of the gradient of every parameter that has one.

    Args:
        model: Any module.
        optimizer: Not needed.

    Returns:
        Dotted parameter name -> tensor on the CPU.
    """
    grads = {name: value.grad for name, value in parameters(model).items()}
    return {name: _copy(grad) for name, grad in grads.items() if grad is not None}


def optimizer_state(
    model: nn.Module, optimizer: Optimizer | None = None
) -> dict[str, Tensor]:
    """Return a copy of every tensor that an optimizer keeps for a parameter.

    Counters (tensors without dimensions) are left out.

    Args:
        model: Names the parameters.
        optimizer: Any optimizer; its state is empty before its first step.

    Returns:
        ``<parameter>:<entry>`` -> tensor on the CPU, for example ``fc.weight:exp_avg``
        or, of lists such as Shampoo's factors, ``fc.weight:statistics[0]``.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 2)).sum().backward(); optimizer.step()
        >>> optimizer_state(model, optimizer)
        {'weight:momentum_buffer': tensor([[1., 1.]])}
    """
    if optimizer is None:
        return {}
    names = {id(value): name for name, value in parameters(model).items()}
    found = {}
    for number, (parameter, state) in enumerate(optimizer.state.items()):
        name = names.get(id(parameter), f"parameter {number}")
        for path, tensor in _tensors(state):
            found[f"{name}:{path}"] = _copy(tensor)
    return found


def _tensors(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with dimensions in nested dicts and lists."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}[{index}]")


def _copy(value: Tensor) -> Tensor:
    return whole(value.detach()).clone().cpu()


def is_sharded(value: object) -> bool:
    """Return whether a tensor is a DTensor, of which each rank has a part."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Return a tensor with all its values: of a DTensor on all ranks together.

    Args:
        value: Any tensor.

    Returns:
        A plain tensor.

    Raises:
        ShardedParameter: If the other ranks cannot be asked.
    """
    if not is_sharded(value):
        return value
    if not torch.distributed.is_initialized():
        raise ShardedParameter(
            f"each rank has a part of this {tuple(value.shape)} parameter, and "
            "torch.distributed has ended: close() the recorder on every rank before "
            "destroy_process_group()"
        )
    full: Tensor = value.full_tensor()  # type: ignore[attr-defined]
    return full


def check_targets(
    capture: str | Sequence[str], *, optimizer: Optimizer | None
) -> tuple[str, ...]:
    """Return the capture targets as a tuple of known names.

    Args:
        capture: One name or several.
        optimizer: The optimizer of the run, if the recorder has it.

    Returns:
        The names, each once.

    Raises:
        UnknownName: If a target is not a row of ``TARGETS``.
        MissingOptimizer: If a target cannot be had without the optimizer.
    """
    names = (capture,) if isinstance(capture, str) else tuple(dict.fromkeys(capture))
    for name in names:
        if name not in TARGETS:
            raise UnknownName(
                f"unknown capture target {name!r}{suggest(name, TARGETS)} "
                f"(known: {', '.join(TARGETS)})"
            )
        if TARGETS[name].needs_optimizer and optimizer is None:
            raise MissingOptimizer(
                f"capture target {name!r} is there while the optimizer steps: give the "
                "recorder optimizer="
            )
    return names


TARGETS: Mapping[str, Target] = {
    "outputs": Target("forward"),
    "inputs": Target("forward"),
    "output_gradients": Target("forward"),
    "moments": Target("forward"),
    "weights": Target("state", weights),
    "optimizer_state": Target("state", optimizer_state, needs_optimizer=True),
    "weight_gradients": Target("update", gradients, needs_optimizer=True),
    "updates": Target("update", needs_optimizer=True),
}
"""Target -> when it is there and how it is read."""
