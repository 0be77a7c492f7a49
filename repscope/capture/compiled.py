"""Compiled models: hooks stay out of the graphs, and are never missed in silence."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import nn

from repscope.errors import CompiledFullgraph, RepScopeWarning

F = TypeVar("F", bound=Callable[..., object])

_ADVICE = (
    "RepScope copies activations outside the compiled graph, which fullgraph=True "
    "forbids: compile without it, or give the recorder probe=, which runs uncompiled"
)


def outside_graphs(function: F) -> F:
    """Keep the compiler out of a function and of all that it calls.

    A graph that holds a hook would be compiled anew whenever the recorder's state
    changes. The decorator of torch itself would import the compiler, and costs more
    than a hook that has nothing to do.

    Args:
        function: A plain function or method.

    Returns:
        The same function.
    """
    marked = cast("types.FunctionType", function)
    marked._torchdynamo_disable = True  # type: ignore[attr-defined]
    marked._torchdynamo_disable_msg = _ADVICE  # type: ignore[attr-defined]
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(
            marked.__code__, frames._FrameExecStrategy(skip, skip)
        )
    except AttributeError:  # an older torch
        return cast("F", torch.compiler.disable(marked))
    return function


def uncompiled() -> AbstractContextManager[object]:
    """Run what is called inside as if nothing had been compiled.

    Hooks that are there for one forward only would not be seen by its graphs.

    Returns:
        A context.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context


def original(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of compilation and data parallelism.

    Its forward compiles nothing, and waits for no other rank.

    Args:
        model: Any module.

    Returns:
        The module that the user wrote.
    """
    if _is_wrapper(model):
        return original(model.get_submodule("_orig_mod"))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return original(model.get_submodule("module"))
    return model


def refuse_fullgraph(model: nn.Module, hooked: Iterable[nn.Module]) -> None:
    """Refuse hooks inside a graph that must not break.

    Args:
        model: The model, compiled or not.
        hooked: Modules that get hooks.

    Raises:
        CompiledFullgraph: If one of them is compiled with ``fullgraph=True``.
    """
    names = {module: name for name, module in model.named_modules()}
    wanted = set(hooked)
    for module, name in names.items():
        if _is_fullgraph(module) and not wanted.isdisjoint(module.modules()):
            what = f"layer {name!r}" if name else "the model"
            raise CompiledFullgraph(
                f"{what} is compiled with fullgraph=True: {_ADVICE}"
            )


def start_over(model: nn.Module) -> None:
    """Let graphs be compiled anew: those that exist would not call a new hook."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not len(dynamo.convert_frame.input_codes.seen):
        return
    torch.compiler.reset()
    if any(_is_wrapper(m) or _compiled_call(m) for m in model.modules()):
        warnings.warn(
            "this model ran compiled before the recorder was attached: its graphs are "
            "dropped and compiled anew at the next forward. Attach the recorder before "
            "the first forward to compile once",
            RepScopeWarning,
            stacklevel=5,
        )


def _is_wrapper(module: nn.Module) -> bool:
    # By name: its class lives in the compiler, which must not be imported for this.
    return type(module).__name__ == "OptimizedModule"


def _compiled_call(module: nn.Module) -> object:
    return getattr(module, "_compiled_call_impl", None)


def _is_fullgraph(module: nn.Module) -> bool:
    if _is_wrapper(module):
        return bool(getattr(module.dynamo_ctx, "fullgraph", False))
    cells = getattr(_compiled_call(module), "__closure__", None) or ()
    return any(getattr(cell.cell_contents, "fullgraph", False) for cell in cells)
