"""Forward hooks that copy what a layer returned, and do nothing else."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repscope.capture.rows import concatenate, has_channels_first, leaves, to_rows
from repscope.capture.selection import Selected, named_modules
from repscope.errors import AlreadyAttached, LayerNeverFired
from repscope.snapshot import StreamKey

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Taken:
    """What the hooks copied since they were last asked.

    Attributes:
        rows: ``(target, name)`` -> rows ``(n_rows, n_features)`` on the CPU.
        n_examples: Examples that went through the model.
        unlabelled: Streams of outputs whose rows do not follow the order of the
            examples.
    """

    rows: Mapping[StreamKey, Tensor]
    n_examples: int
    unlabelled: frozenset[str]


@dataclass
class _Forward:
    """One forward of the whole model (or calls of its parts, when ``n`` is unknown)."""

    n: int | None
    taps: Taps
    by_root: bool = False
    rows: dict[StreamKey, list[Tensor | None]] = field(
        default_factory=lambda: defaultdict(list)
    )
    calls: dict[StreamKey, int] = field(default_factory=lambda: defaultdict(int))
    seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    maps: set[torch.Size] = field(default_factory=set)
    unlabelled: set[str] = field(default_factory=set)

    @property
    def n_examples(self) -> int:
        return next(iter(self.seen.values()), 0) if self.n is None else self.n

    def take(
        self,
        target: str,
        layer: str,
        module: nn.Module,
        value: object,
        *,
        keep: bool,
        gradients: bool,
    ) -> None:
        """Look at what a layer was given or returned.

        Args:
            target: ``"inputs"`` or ``"outputs"``.
            layer: Name of the layer.
            module: The layer.
            value: What it was given or returned.
            keep: Copy it.
            gradients: Copy its gradient once there is one.
        """
        call = self.calls[target, layer]
        self.calls[target, layer] += 1
        stream = f"{layer}@{call}" if call else layer
        for path, leaf in leaves(value, layer=layer):
            name = f"{stream}:{path}" if path else stream
            rows, n_examples, ordered = self._rows(module, leaf.detach())
            if keep:
                self.rows[target, name].append(self._own(rows, leaf))
            if target == "outputs":
                self.seen[name] += n_examples
                if not ordered:
                    self.unlabelled.add(name)
            if gradients and leaf.requires_grad:
                self._ask(name, module, leaf)

    def _rows(self, module: nn.Module, leaf: Tensor) -> tuple[Tensor, int, bool]:
        """Return rows, how many examples they are of, and whether in their order."""
        value, ordered = _examples_first(leaf, module, self.n)
        first = has_channels_first(value, module, maps=self.maps)
        rows = to_rows(value, channels_first=first, how=self.taps.reduce)
        return rows, len(value) if value.ndim else 1, ordered

    def _own(self, rows: Tensor, leaf: Tensor) -> Tensor:
        """Return ``rows`` in memory of their own: an in-place layer may follow."""
        if self.taps.dtype is not None and rows.dtype != self.taps.dtype:
            return rows.to(self.taps.dtype)
        shared = rows.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
        return rows.clone() if shared else rows

    def _ask(self, name: str, module: nn.Module, leaf: Tensor) -> None:
        """Let the backward pass fill a place that is in the order of the forwards.

        A hook on the tensor, before anything works on it in place, gives the gradient
        of the value that was returned. Several backward passes add up, as they do in
        the gradients of the parameters.
        """
        places = self.rows["output_gradients", name]
        index = len(places)
        places.append(None)

        def fill(gradient: Tensor) -> None:
            rows, *_ = self._rows(module, gradient.detach())
            own, before = self._own(rows, gradient), places[index]
            places[index] = own if before is None else before + own

        leaf.register_hook(fill)


def _examples_first(
    leaf: Tensor, module: nn.Module, n: int | None
) -> tuple[Tensor, bool]:
    """Return the value with examples along its first dimension, and whether they are.

    Sequence modules put time first unless told otherwise (``batch_first``), and the
    final states of recurrent ones put their layers first.
    """
    if n is None or leaf.ndim == 0:
        return leaf, True
    time_first = getattr(module, "batch_first", None) is False
    second = leaf.ndim == 3 and leaf.shape[1] == n
    if second and (time_first or leaf.shape[0] != n):
        return leaf.transpose(0, 1), True
    return leaf, leaf.shape[0] == n


def _inert(*_: object) -> None:
    """Stand in for a hook on a copied or unpickled model: it records nothing."""


def _stand_in() -> object:
    return _inert


class _Hook:
    """A forward hook on one layer: returns at once unless capture is on."""

    def __init__(self, taps: Taps, layer: str = "") -> None:
        self.taps = taps
        self.layer = layer

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

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        if self.taps.on:
            self.taps._take("inputs", self.layer, module, _one(args, kwargs))


class _Witness(_Hook):
    """Notes that a container ran; removed after the first captured step."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.taps.on:
            self.taps._ran.add(self.layer)


class _Begin(_Hook):
    """Runs before each forward of the whole model."""

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        if self.taps.on:
            self.taps._root_begins(args, kwargs)


class _End(_Hook):
    """Runs after each forward of the whole model that did not raise."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.taps.on:
            self.taps._root_ends()


class Taps:
    """The hooks of one recorder on one model, and what they copied.

    Args:
        model: The model to attach to.
        chosen: Layers to copy from.
        targets: What to copy, of the targets whose moment is ``"forward"``.
        reduce: How values become rows, one of `REDUCTIONS`.
        dtype: What rows are recorded in; None keeps what the layer returned.

    Raises:
        AlreadyAttached: If another recorder is attached to ``model``.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Sequence[Selected],
        *,
        targets: Collection[str] = ("outputs",),
        reduce: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        if model in _attached:
            raise AlreadyAttached(
                "this model already has a recorder; close() it first, or record "
                "all layers with one"
            )
        self.on = False
        self.training_only = False
        self.error: Exception | None = None
        self._model = weakref.ref(model)
        self._chosen = {item.name: item for item in chosen}
        self._targets = frozenset(targets)
        self.reduce, self.dtype = reduce, dtype
        self._done: list[_Forward] = []
        self._open: _Forward | None = None
        self._inside: int | None = None  # forwards since the optimizer began to step
        self._ran: set[str] = set()
        self._handles = self._attach(model)
        self._witnesses = self._watch_parents(model)
        _attached.add(model)

    def _attach(self, model: nn.Module) -> list[RemovableHandle]:
        before = self._chosen if "inputs" in self._targets else {}
        return [
            model.register_forward_pre_hook(_Begin(self), with_kwargs=True),
            *(
                item.module.register_forward_pre_hook(
                    _Before(self, name), with_kwargs=True
                )
                for name, item in before.items()
            ),
            *(
                item.module.register_forward_hook(_Hook(self, name))
                for name, item in self._chosen.items()
            ),
            model.register_forward_hook(_End(self)),
        ]

    def _watch_parents(self, model: nn.Module) -> list[RemovableHandle]:
        parents = {
            name.rsplit(".", depth)[0]
            for name in self._chosen
            for depth in range(1, name.count(".") + 1)
        }
        return [
            module.register_forward_hook(_Witness(self, name))
            for name, module in named_modules(model)
            if name in parents
        ]

    # -- called by the hooks --------------------------------------------------
    def _take(self, target: str, layer: str, module: nn.Module, value: object) -> None:
        if self.training_only and not self._is_training():
            return
        self._ran.add(layer)
        if self._open is None:
            self._open = _Forward(n=None, taps=self)
        try:
            self._open.take(
                target,
                layer,
                module,
                value,
                keep=target in self._targets,
                gradients=target == "outputs" and "output_gradients" in self._targets,
            )
        except Exception as error:  # noqa: BLE001 - a hook must never break a forward
            self.error = self.error or error
            self.on = False

    def _is_training(self) -> bool:
        # The user's own evaluation passes are not training batches.
        model = self._model()
        return model is not None and model.training and torch.is_grad_enabled()

    def _root_begins(self, args: object, kwargs: object) -> None:
        if self.training_only and self._is_training():
            if self._inside is not None:
                self._inside += 1
                if self._inside > 1:
                    self.pause()
                    return
            self._settle()
            self._open = _Forward(n=_n_examples(args, kwargs), taps=self, by_root=True)

    def _root_ends(self) -> None:
        if self.training_only and not self._is_training():
            return
        if self._open is not None and self._open.by_root:
            self._done.append(self._open)
            self._open = None

    def _settle(self) -> None:
        """End the open forward; one of the whole model that never ended had raised."""
        if self._open is not None and not self._open.by_root:
            self._done.append(self._open)
        self._open = None

    # -- called by the recorder -----------------------------------------------
    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Copy every forward inside the block, whatever mode the model is in."""
        before = self.on, self.training_only
        self.forget()
        self.on, self.training_only = True, False
        try:
            yield
        except BaseException:
            self.forget()
            raise
        finally:
            self.on, self.training_only = before

    def begin(self, n: int) -> None:
        """Say that a forward of ``n`` examples comes next, whichever part it calls."""
        self._settle()
        self._open = _Forward(n=n, taps=self)

    def follow_training(self, due: bool) -> None:
        """Copy (or stop copying) the training forwards that come next."""
        self.on, self.training_only = due and self.error is None, True

    def pause(self) -> None:
        """Copy no more forwards until `follow_training` says so; keep what there is."""
        self.on = False
        self._inside = None

    def enter_update(self) -> None:
        """Say that the optimizer steps: of the forwards of a closure the first counts.

        It runs at the parameters of this step, the later ones at trial points.
        """
        self._inside = 0

    def forget(self) -> None:
        """Drop what was copied."""
        self._done, self._open = [], None

    def drain(self) -> Taken:
        """Return what was copied since the last drain, and keep nothing.

        Raises:
            Exception: The first error a hook met.
        """  # noqa: DOC502 - re-raised as it was
        self._settle()
        done = self._done
        self.forget()
        if self.error is not None:
            raise self.error
        parts: dict[StreamKey, list[Tensor]] = defaultdict(list)
        for forward in done:
            for key, rows in forward.rows.items():
                parts[key] += [each for each in rows if each is not None]
        return Taken(
            {key: concatenate(rows) for key, rows in parts.items() if rows},
            sum(forward.n_examples for forward in done),
            frozenset().union(*(forward.unlabelled for forward in done)),
        )

    def check_fired(self) -> list[str]:
        """Return the glob-selected layers that have not run; refuse exact ones.

        Called once, after the first captured step; the watch on parents ends here.

        Returns:
            Names of the layers that a glob selected and that never ran.

        Raises:
            LayerNeverFired: If a layer that was named exactly never ran.
        """
        for handle in self._witnesses:
            handle.remove()
        silent = [name for name in self._chosen if name not in self._ran]
        for name in silent:
            if self._chosen[name].exact:
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
        if not self.training_only:
            return ""
        return (
            "; without probe= only forwards in training mode with gradients enabled "
            "are recorded"
        )

    def detach(self) -> None:
        """Remove every hook and drop what was copied; safe to call twice."""
        self.on = False
        self.forget()
        for handle in [*self._handles, *self._witnesses]:
            handle.remove()
        model = self._model()
        if model is not None:
            _attached.discard(model)


def _one(args: object, kwargs: object) -> object:
    """Return what a module was called with, as the one value it usually is."""
    given = args if isinstance(args, tuple) else ()
    if not kwargs:
        return given[0] if len(given) == 1 else given
    positional = {str(i): value for i, value in enumerate(given)}
    return {**positional, **(kwargs if isinstance(kwargs, dict) else {})}


def _n_examples(args: object, kwargs: object) -> int | None:
    """Return the length of the first tensor a model was called with."""
    given = [*args] if isinstance(args, tuple) else []
    given += kwargs.values() if isinstance(kwargs, dict) else []
    tensors = (v for v in given if isinstance(v, Tensor) and v.ndim)
    first = next(tensors, None)
    return None if first is None else len(first)
