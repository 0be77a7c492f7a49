"""Forward hooks that copy what a layer returned, and do nothing else."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repscope.capture import compiled
from repscope.capture.forward import Forward, Settings, has_data, readable
from repscope.capture.joined import Piece, join
from repscope.capture.rows import mask_among
from repscope.capture.selection import Selected, named_modules, time_first
from repscope.errors import (
    AlreadyAttached,
    LayerNeverFired,
    UnsupportedOutput,
    UsageError,
)
from repscope.snapshot import EXAMPLES, StreamKey, stream_name

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Taken(NamedTuple):
    """What the hooks copied since they were last asked.

    Attributes:
        rows: ``(target, name)`` -> rows ``(n_rows, n_features)`` on the CPU; and
            ``("examples", "target:name")`` -> example of each row, where examples do
            not have equally many rows each, in order.
        moments: name -> rows of which only moments are to be kept.
        n_examples: Examples that went through the model.
        n_forwards: How often it ran.
        unlabelled: Streams of which it is not known which example a row belongs to.
    """

    rows: Mapping[StreamKey, Tensor]
    moments: Mapping[str, Tensor]
    n_examples: int
    n_forwards: int
    unlabelled: frozenset[str]


def _inert(*_: object) -> None:
    """Stand in for a hook on a copied or unpickled model: it records nothing."""


def _stand_in() -> object:
    return _inert


class _Hook:
    """A forward hook on one layer: returns at once unless capture is on."""

    def __init__(self, taps: Taps, layer: str = "") -> None:
        self.taps = taps
        self.layer = layer
        self.__name__ = "repscope"  # tracers ask hooks for one

    @compiled.outside_graphs
    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.taps.on:
            self.taps._take("outputs", self.layer, module, output)

    # A deep copy (a moving average of the weights, say) or a pickle of the model
    # must neither fail nor record into our buffers.
    def __deepcopy__(self, memo: object) -> object:
        return _inert

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return _stand_in, ()


class _Before(_Hook):
    """Copies what a layer is given, before the layer can work on it in place."""

    @compiled.outside_graphs
    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        if self.taps.on:
            self.taps._take("inputs", self.layer, module, _one(args, kwargs))


class _Witness(_Hook):
    """Notes that a container ran; removed after the first captured step."""

    @compiled.outside_graphs
    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.taps.on:
            self.taps._ran.add(self.layer)


class _Begin(_Hook):
    """Runs before each forward of the whole model."""

    @compiled.outside_graphs
    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        if self.taps.on:
            self.taps._root_begins(args, kwargs)


class _End(_Hook):
    """Runs after each forward of the whole model that did not raise."""

    @compiled.outside_graphs
    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.taps.on:
            self.taps._root_ends()


class Taps:
    """The hooks of one recorder on one model, and what they copied.

    Args:
        model: The model to attach to.
        chosen: Layers to copy from.
        settings: What to copy, and how it becomes rows.
        live: The forwards of training are copied, so that the hooks stay; otherwise
            they are there inside `collecting` only, and training never meets one.

    Attributes:
        on: Whether hooks copy what they see.
        error: The first error met inside a hook, which must not break the training.
        passed_over: What was not copied: reason -> layer -> how often.
        checked: Whether `check_fired` was asked, or has nothing to look at.

    Raises:
        AlreadyAttached: If another recorder is attached to ``model``.
        CompiledFullgraph: If a hook would be inside a graph that must not break.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Sequence[Selected],
        *,
        settings: Settings,
        live: bool,
    ) -> None:
        if model in _attached:
            raise AlreadyAttached(
                "this model already has a recorder; close() it first, or record "
                "all layers with one"
            )
        self.on = False
        self.error: Exception | None = None
        self.passed_over: dict[str, Counter[str]] = defaultdict(Counter)
        self._live = live
        self._model = weakref.ref(model)
        self._exact = {item.name: item.exact for item in chosen}
        self._hooked: list[tuple[list[str], weakref.ref[nn.Module]]] = []
        self._time_first = time_first(model) if chosen else frozenset()
        self._settings = settings
        self._done: list[Forward] = []
        self._open: Forward | None = None
        self._aside: Counter[int] = Counter()  # forwards of no concern, by thread
        self._ran: set[str] = set()
        self.checked = not chosen
        self._handles: list[RemovableHandle] = []
        self._witnesses: list[RemovableHandle] = []
        if live and chosen:
            hooked = [model, *(item.module for item in chosen)]
            compiled.refuse_fullgraph(model, hooked)
            compiled.start_over(model)
            self._attach(model)
        _attached.add(model)

    def _attach(self, model: nn.Module) -> None:
        # By name and each time anew: a head may have been replaced.
        modules = dict(named_modules(model))
        layers = {name: modules[name] for name in self._exact if name in modules}
        if self._live:  # a probe asks for its layers each time
            paths = {each: name.split(".") for name, each in model.named_modules()}
            found = layers.values()
            self._hooked = [(paths[each], weakref.ref(each)) for each in found]
        before = layers if "inputs" in self._settings.targets else {}
        root = [model] if self._live else []
        self._handles = [
            *(
                m.register_forward_pre_hook(_Begin(self), with_kwargs=True)
                for m in root
            ),
            *(
                layer.register_forward_pre_hook(_Before(self, name), with_kwargs=True)
                for name, layer in before.items()
            ),
            *(
                layer.register_forward_hook(_Hook(self, name))
                for name, layer in layers.items()
            ),
            *(module.register_forward_hook(_End(self)) for module in root),
        ]
        self._witnesses = [] if self.checked else self._watch_parents(model)

    def _watch_parents(self, model: nn.Module) -> list[RemovableHandle]:
        parents = {
            name.rsplit(".", depth)[0]
            for name in self._exact
            for depth in range(1, name.count(".") + 1)
        }
        return [
            module.register_forward_hook(_Witness(self, name))
            for name, module in named_modules(model)
            if name in parents
        ]

    def _remove_hooks(self) -> None:
        for handle in [*self._handles, *self._witnesses]:
            handle.remove()
        self._handles, self._witnesses = [], []

    # -- called by the hooks --------------------------------------------------
    def _take(self, target: str, layer: str, module: nn.Module, value: object) -> None:
        try:
            if torch._C._current_graph_task_id() != -1:
                self._recomputed(target, layer, value)
                return
            if self._aside and self._aside[threading.get_ident()]:
                return
            # Checkpointing in its reentrant mode runs a part without gradients inside
            # a forward that has them.
            inside = self._open is not None and self._open.by_root
            if self._live and not inside and not self._is_training():
                return
            self._ran.add(layer)
            if self._open is None:
                self._open = self._forward(None)
            first = layer in self._time_first
            if not self._open.take(target, layer, module, value, time_first=first):
                self.passed_over["without values"][layer] += 1
        except Exception as error:  # noqa: BLE001 - a hook must never break a forward
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.on = False

    def _forward(self, n: int | None) -> Forward:
        totals = dict(self._done[-1].totals) if self._done else {}
        return Forward(n, self._settings, self._fail, totals=totals)

    def _recomputed(self, target: str, layer: str, value: object) -> None:
        """Look at a second forward of a part, which the backward pass makes.

        Its values are those of the first. Its gradients are wanted when the first had
        none: in the reentrant mode of checkpointing.

        Raises:
            UnsupportedOutput: If it cannot be known which call this repeats.
        """
        self.passed_over["recomputed in the backward pass"][layer] += 1
        if target != "outputs":
            return
        forwards = [*self._done, *([self._open] if self._open else [])]
        calls = [
            (f.awaited[layer], fills) for f in forwards for fills in f.awaited[layer]
        ]
        if len(calls) > 1:
            raise UnsupportedOutput(
                f"output_gradients of layer {layer!r}: checkpointing with "
                "use_reentrant=True runs it again for several calls, and which is "
                "which cannot be known; use_reentrant=False records all of them"
            )
        for waiting, fills in calls:
            waiting.remove(fills)
            tensors = readable(value, layer=layer)
            for (_, leaf), fill in zip(tensors, fills, strict=True):
                if leaf.requires_grad:
                    leaf.register_hook(fill)

    def _is_training(self) -> bool:
        # The user's own evaluation passes are not training batches.
        model = self._model()
        return model is not None and model.training and torch.is_grad_enabled()

    def _root_begins(self, args: object, kwargs: object) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        if not self._is_training():
            # An evaluation of the user's, perhaps inside a forward or beside it.
            self._aside[threading.get_ident()] += 1
            return
        self._aside.pop(threading.get_ident(), None)  # one that raised
        self.settle()
        given = _given(args, kwargs)
        if all(has_data(value) for _, value in given):
            self._open = self._forward(len(given[0][1]) if given else None)
            self._open.by_root = True
            self._open.mask = mask_among(dict(given)) if kwargs else None

    def _root_ends(self) -> None:
        thread = threading.get_ident()
        if self._aside and self._aside[thread]:
            self._aside[thread] -= 1
            return
        if self._open is not None and self._open.by_root and self._is_training():
            self._done.append(self._open)
            self._open = None

    # -- called by the recorder -----------------------------------------------
    def settle(self) -> None:
        """End the open forward; one of the whole model that never ended had raised."""
        if self._open is not None and not self._open.by_root:
            self._done.append(self._open)
        self._open = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Copy every forward inside the block, whatever mode the model is in."""
        model = self._model()
        self.forget()
        try:
            if model is not None:
                self._attach(model)
            self.on = True
            with compiled.uncompiled():
                yield
        except BaseException:
            self.forget()
            raise
        finally:
            self.on = False
            self._remove_hooks()

    def begin(self, n: int, mask: Tensor | None = None) -> None:
        """Say that a forward of ``n`` examples comes next, whichever part it calls."""
        self.settle()
        self._open = self._forward(n)
        self._open.mask = mask

    def follow_training(self, due: bool) -> None:
        """Copy (or stop copying) the training forwards that come next."""
        model = self._model()
        if due and self._live and model is not None and self._is_stale(model):
            self._remove_hooks()
            compiled.start_over(model)
            self._attach(model)
        self._aside.clear()
        self.on = due and self.error is None

    def _is_stale(self, model: nn.Module) -> bool:
        """Return whether other modules have the names of the layers now."""
        return any(_at(model, path) is not layer() for path, layer in self._hooked)

    def pause(self) -> None:
        """Copy no more forwards until `follow_training` says so; keep what there is."""
        self.on = False

    def forget(self) -> None:
        """Drop what was copied."""
        self._done, self._open = [], None

    def drain(self, mask: Tensor | None = None) -> Taken:
        """Return what was copied since the last drain, and keep nothing.

        Args:
            mask: Which tokens ``(n_examples, T)`` of the forwards count.

        Raises:
            Exception: The first error a hook met.
            UsageError: If the mask fits nothing.
        """  # noqa: DOC502 - re-raised as it was
        self.settle()
        done = self._done
        self.forget()
        if self.error is not None:
            raise self.error
        parts: dict[StreamKey, list[Piece]] = defaultdict(list)
        n = 0
        whole = any(forward.n is not None for forward in done)
        for forward in done:
            # What runs beside the whole model, such as a loss, is given no new example.
            size = 0 if whole and forward.n is None else forward.n_examples
            own = forward.mask if mask is None else mask[n : n + size]
            for key, pieces in forward.pieces.items():
                parts[key] += [Piece(rows, n, size, own) for rows in pieces]
            n += size
        return self._joined(parts, n, len(done), mask)

    def _joined(
        self,
        parts: Mapping[StreamKey, Sequence[Piece]],
        n: int,
        n_forwards: int,
        mask: Tensor | None,
    ) -> Taken:
        rows: dict[StreamKey, Tensor] = {}
        moments: dict[str, Tensor] = {}
        unlabelled: set[str] = set()
        masked = False
        for (target, name), pieces in parts.items():
            choice = None if target == "moments" else self._settings.choice
            settle = self._settings.pool.settle
            joined = join(pieces, n=n, choice=choice, settle=settle)
            if joined is None:
                continue
            masked |= joined.masked
            if target == "moments":
                moments[name] = joined.values
                continue
            rows[target, name] = joined.values
            if joined.examples is not None:
                rows[EXAMPLES, f"{target}:{name}"] = joined.examples
            if not joined.known:
                unlabelled.add(stream_name(target, name))
        if mask is not None and parts and not (masked and len(mask) == n):
            raise UsageError(
                f"mask= of shape {tuple(mask.shape)} fits no recorded layer: it says "
                f"which tokens (n_examples, T) count, and {n} examples were recorded"
            )
        return Taken(rows, moments, n, n_forwards, frozenset(unlabelled))

    @property
    def watches(self) -> bool:
        """Whether there are layers to copy from."""
        return bool(self._exact)

    @property
    def silent(self) -> list[str]:
        """Layers that have never run while hooks were on."""
        return [name for name in self._exact if name not in self._ran]

    def check_fired(self) -> list[str]:
        """Return the glob-selected layers that have not run; refuse exact ones.

        Called once, after the first captured step; the watch on parents ends here.

        Returns:
            Names of the layers that a glob selected and that never ran.

        Raises:
            LayerNeverFired: If a layer that was named exactly never ran.
        """
        self.checked = True
        for handle in self._witnesses:
            handle.remove()
        silent = self.silent
        for name in silent:
            if self._exact[name]:
                raise LayerNeverFired(
                    f"layer {name!r} never ran in the first captured step"
                    f"{self._who_ran(name)}. Modules used through their weights "
                    f"alone (F.linear, m.forward(x)) run no hooks"
                    f"{self._why_not_training()}"
                )
        return silent

    def _who_ran(self, name: str) -> str:
        while "." in name:
            name = name.rsplit(".", 1)[0]
            if name in self._ran:
                return f"; its parent {name!r} did: record that instead"
        return ""

    def _why_not_training(self) -> str:
        if not self._live:
            return ""
        return (
            "; without probe= only forwards in training mode with gradients enabled "
            "are recorded"
        )

    def detach(self) -> None:
        """Remove every hook and drop what was copied; safe to call twice."""
        self.on = False
        self.forget()
        self._remove_hooks()
        model = self._model()
        if model is not None:
            _attached.discard(model)


def _at(model: nn.Module, path: list[str]) -> nn.Module | None:
    """Return the module at a path: few lines, as every captured step asks for it."""
    module: nn.Module | None = model
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def _one(args: object, kwargs: object) -> object:
    """Return what a module was called with, as the one value it usually is."""
    given = args if isinstance(args, tuple) else ()
    if not kwargs:
        return given[0] if len(given) == 1 else given
    positional = {str(i): value for i, value in enumerate(given)}
    return {**positional, **(kwargs if isinstance(kwargs, dict) else {})}


def _given(args: object, kwargs: object) -> list[tuple[str, Tensor]]:
    """Return the tensors with dimensions that a model was called with, and names."""
    given = [("", value) for value in args] if isinstance(args, tuple) else []
    given += kwargs.items() if isinstance(kwargs, dict) else []
    return [(k, v) for k, v in given if isinstance(v, Tensor) and v.ndim]
