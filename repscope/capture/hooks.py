"""Forward hooks that copy what a layer returned, and do nothing else."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repscope.capture.rows import concatenate, leaves, to_rows
from repscope.capture.selection import Selected, named_modules
from repscope.errors import AlreadyAttached, LayerNeverFired

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _inert(*_: object) -> None:
    """Stand in for a hook on a copied or unpickled model: it records nothing."""


def _stand_in() -> object:
    return _inert


class _Hook:
    """A forward hook on one layer: returns at once unless capture is on."""

    def __init__(self, taps: Taps, layer: str) -> None:
        self.taps = taps
        self.layer = layer

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.taps.on:
            self.taps._take(self.layer, module, output)

    # A deep copy (a moving average of the weights, say) or a pickle of the model
    # must neither fail nor record into our buffers.
    def __deepcopy__(self, memo: object) -> object:
        return _inert

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return _stand_in, ()


class Taps:
    """The hooks of one recorder on one model, and what they copied.

    Args:
        model: The model to attach to.
        chosen: Layers to copy from.

    Raises:
        AlreadyAttached: If another recorder is attached to ``model``.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[Selected]) -> None:
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
        self._taken: dict[str, list[Tensor]] = defaultdict(list)
        self._calls: dict[str, int] = defaultdict(int)
        self._ran: set[str] = set()
        self._handles = self._attach(model)
        self._witnesses = self._watch_parents(model)
        _attached.add(model)

    def _attach(self, model: nn.Module) -> list[RemovableHandle]:
        # Call indices start again with every forward of the whole model, so that a
        # second micro-batch is more rows and a second call is another stream.
        handles = [model.register_forward_pre_hook(_Restart(self))]
        for name, item in self._chosen.items():
            handles.append(item.module.register_forward_hook(_Hook(self, name)))
        return handles

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

    def _take(self, layer: str, module: nn.Module, output: object) -> None:
        if self.training_only and not self._is_training():
            return
        self._ran.add(layer)
        call = self._calls[layer]
        self._calls[layer] += 1
        stream = f"{layer}@{call}" if call else layer
        try:
            for path, leaf in leaves(output, layer=layer):
                name = f"{stream}:{path}" if path else stream
                self._taken[name].append(_copy(to_rows(leaf.detach(), module), leaf))
        except Exception as error:  # noqa: BLE001 - a hook must never break a forward
            self.error = self.error or error
            self.on = False

    def _is_training(self) -> bool:
        # The user's own evaluation passes are not training batches.
        model = self._model()
        return model is not None and model.training and torch.is_grad_enabled()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Copy every forward inside the block, whatever mode the model is in."""
        before = self.on, self.training_only
        self._calls.clear()
        self.on, self.training_only = True, False
        try:
            yield
        finally:
            self.on, self.training_only = before

    def follow_training(self, due: bool) -> None:
        """Copy (or stop copying) the training forwards that come next."""
        self._calls.clear()
        self.on, self.training_only = due and self.error is None, True

    def drain(self) -> dict[str, Tensor]:
        """Return the rows copied since the last drain, one tensor a stream.

        Raises:
            Exception: The first error a hook met.
        """  # noqa: DOC502 - re-raised as it was
        taken, self._taken = self._taken, defaultdict(list)
        self._calls.clear()
        if self.error is not None:
            raise self.error
        return {name: concatenate(parts) for name, parts in taken.items()}

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
        """Remove every hook; safe to call twice."""
        self.on = False
        for handle in [*self._handles, *self._witnesses]:
            handle.remove()
        model = self._model()
        if model is not None:
            _attached.discard(model)


def _copy(rows: Tensor, leaf: Tensor) -> Tensor:
    """Return ``rows`` in memory of their own: an in-place layer may follow."""
    shared = rows.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
    return rows.clone() if shared else rows


class _Witness(_Hook):
    """Notes that a container ran; removed after the first captured step."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.taps.on:
            self.taps._ran.add(self.layer)


class _Restart(_Hook):
    """Starts the call indices of a forward of the whole model at zero."""

    def __init__(self, taps: Taps) -> None:
        super().__init__(taps, "")

    def __call__(self, module: nn.Module, args: object, output: object = None) -> None:
        if self.taps.on:
            self.taps._calls.clear()
