"""Which layers: names as the user knows them, and the ways to choose among them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from repscope.errors import UnknownLayer, UnsupportedModule, UsageError, suggest

LayerSpec = (
    str
    | type[nn.Module]
    | Callable[[str, nn.Module], bool]
    | Iterable[str | type[nn.Module]]
)


@dataclass(frozen=True)
class Selected:
    """A module chosen for recording.

    Attributes:
        name: Dotted name, wrapper prefixes removed.
        module: The module.
        exact: Whether the user wrote this very name (then a layer that never runs is
            an error, not a warning).
    """

    name: str
    module: nn.Module
    exact: bool


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` below ``model`` under the names the user knows.

    The prefixes that ``torch.compile`` (``_orig_mod.``) and data-parallel wrappers
    (``module.``) add are removed, so a store of a wrapped run matches a plain one.

    Args:
        model: Any module.

    Yields:
        Every module but the root itself, containers too.
    """
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    for name, module in model.named_modules():
        clean = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if wrapped:
            clean = clean.removeprefix("module").removeprefix(".")
        if clean:
            yield clean, module


def _is_leaf(module: nn.Module) -> bool:
    # Attention calls its out_proj by weight, never as a module: it counts as one.
    if isinstance(module, nn.MultiheadAttention):
        return True
    # A parametrization computes a weight; it is no layer of its own.
    return all(name == "parametrizations" for name, _ in module.named_children())


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    inside: tuple[str, ...] = ()
    found = {}
    for name, module in named_modules(model):
        if name.startswith(inside):
            continue
        if _is_leaf(module):
            found[name] = module
            if next(module.children(), None) is not None:
                inside = (*inside, f"{name}.")
    return found


def layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that a glob can select.

    Args:
        model: Any module.

    Returns:
        Dotted names of the leaf modules, in order of definition. A container can be
        recorded too, by its exact name.

    Example:
        >>> layers(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
        ['0', '1']
    """
    return list(_leaves(model))


def time_first(model: nn.Module) -> Collection[str]:
    """Return the layers that work in a part of the model with time before examples.

    Recurrent layers, attention and transformer layers say so (``batch_first``), and it
    holds for all that is inside of them.

    Args:
        model: Any module.
    """
    found: list[str] = []
    parts: tuple[str, ...] = ()
    for name, module in named_modules(model):
        attention = getattr(module, "self_attn", None)
        says = [getattr(each, "batch_first", None) for each in (module, attention)]
        if False in says:
            parts = (*parts, f"{name}.")
        if name.startswith(parts) and says[0] is None:
            found.append(name)
    return frozenset(found)


def _unknown(pattern: str, model: nn.Module) -> UnknownLayer:
    names = [name for name, _ in named_modules(model)]
    if not names:
        return UnknownLayer(
            f"no layer matches {pattern!r}: a {type(model).__name__} has no layers "
            "inside; put it into nn.Sequential(...), where it has a name"
        )
    return UnknownLayer(
        f"no layer matches {pattern!r}{suggest(pattern, names)} "
        f"(repscope.layers(model) lists all {len(layers(model))}; nothing was attached)"
    )


def _by_string(pattern: str, model: nn.Module) -> list[Selected]:
    every = dict(named_modules(model))
    if pattern in every:
        return [Selected(pattern, every[pattern], exact=True)]
    return [
        Selected(name, module, exact=False)
        for name, module in _leaves(model).items()
        if fnmatch.fnmatchcase(name, pattern)
    ]


def _by_one(spec: object, model: nn.Module) -> list[Selected]:
    if isinstance(spec, str):
        found = _by_string(spec, model)
    elif isinstance(spec, type) and issubclass(spec, nn.Module):
        found = [
            Selected(name, module, exact=False)
            for name, module in named_modules(model)
            if isinstance(module, spec)
        ]
    elif callable(spec):
        found = [
            Selected(name, module, exact=False)
            for name, module in named_modules(model)
            if spec(name, module)
        ]
    else:
        raise UsageError(
            f"layers= takes globs, names, module types or a predicate, got {spec!r}"
        )
    if not found:
        raise _unknown(spec if isinstance(spec, str) else repr(spec), model)
    return found


def _check_hookable(what: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModule(
            f"{what} is a ScriptModule, whose layers run without hooks: record the "
            "module it was made from"
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise UnsupportedModule(
            f"{what} is a DataParallel over {len(module.device_ids)} devices, which "
            "runs copies of every layer at once: use DistributedDataParallel, one "
            "process a device"
        )


def select(model: nn.Module, spec: LayerSpec) -> list[Selected]:
    """Return the layers that ``spec`` chooses, in order of definition.

    Args:
        model: Any module.
        spec: A glob over leaf modules (``"encoder.*"``), an exact name (containers
            too), a module type, a predicate ``(name, module) -> bool``, or a list of
            globs, names and types.

    Returns:
        Each chosen module once.

    Raises:
        UnknownLayer: If ``spec``, or one entry of a list, matches nothing.
        UnsupportedModule: If hooks do not work on the model or on a chosen layer.
        UsageError: If ``spec`` is of another kind.

    Example:
        >>> [s.name for s in select(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.ReLU)]
        ['1']
    """  # noqa: DOC502 - both come from the helper that looks one entry up
    _check_hookable("the model", model)
    single = isinstance(spec, str) or callable(spec)
    entries = [spec] if single else list(spec) if isinstance(spec, Iterable) else [spec]
    chosen: dict[str, Selected] = {}
    for entry in entries:
        for item in _by_one(entry, model):
            if item.exact or item.name not in chosen:
                chosen[item.name] = item
    for item in chosen.values():
        _check_hookable(f"layer {item.name!r}", item.module)
    if not chosen:
        raise UnknownLayer("layers= is an empty list: it selects nothing")
    order = [name for name, _ in named_modules(model)]
    return sorted(chosen.values(), key=lambda item: order.index(item.name))
