"""Watch an optimizer: count its updates, and see what each of them did."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from repscope.capture.hooks import Taps
from repscope.capture.targets import TARGETS, parameters, whole
from repscope.snapshot import StreamKey


class Updates:
    """Counts the updates of an optimizer, and copies what the first of them did.

    A step that gradient scaling skips is none; one call of ``step(closure)`` is one.

    Args:
        model: The model that is trained.
        optimizer: Its optimizer; only weakly referenced.
        targets: What to copy, of the targets whose moment is ``"update"``.
        taps: The hooks of the forwards; those after the first update are of a later
            step.
        meet: Called before anything is copied; None where no other rank is needed.

    Attributes:
        due: Whether the next update is to be copied.
        error: The first error met inside a hook, which must not break the training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        targets: Collection[str],
        *,
        taps: Taps,
        meet: Callable[[], None] | None = None,
    ) -> None:
        self.due = False
        self.error: Exception | None = None
        self._taps, self._meet = taps, meet
        self._model = weakref.ref(model)
        self._targets = [name for name in targets if TARGETS[name].moment == "update"]
        self._count = 0
        self._frame: FrameType | None = None  # of the outermost step that runs
        self._skipped = False
        self._scale: Tensor | None = None
        self._before: dict[str, Tensor] = {}
        self._streams: dict[StreamKey, Tensor] = {}
        me = weakref.ref(self)

        # Most updates are only counted: these two cost little then.
        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            watcher = me()
            if watcher is None or watcher._is_nested(sys._getframe(1)):
                return None
            watcher._skipped = _is_skipped(optimizer)
            if not (watcher.due or taps.on) or watcher._skipped:
                return None
            return watcher._begin(optimizer, args, kwargs)

        def after(*_: Any) -> None:
            watcher = me()
            if watcher is None or watcher._frame is not sys._getframe(1):
                return
            watcher._frame = None
            if not watcher._skipped:
                watcher._count += 1
                if watcher.due or taps.on:
                    watcher._end()

        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def drain(self) -> tuple[int, dict[StreamKey, Tensor]]:
        """Return how many updates there were since the last drain, and what was copied.

        Raises:
            Exception: The first error a hook met.
        """  # noqa: DOC502 - re-raised as it was
        count, streams = self._count, self._streams
        self._count, self._streams, self._before = 0, {}, {}
        error, self.error = self.error, None
        if error is not None:
            raise error
        return count, streams

    def take_one(self) -> bool:
        """Return whether there was one update since the last drain, and forget it."""
        if self._count != 1 or self._streams or self.error is not None:
            return False
        self._count = 0
        return True

    def detach(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()

    # -- called by the hooks -------------------------------------------------
    def _is_nested(self, frame: FrameType) -> bool:
        """Return whether a ``step`` runs inside another of the same optimizer.

        One that calls that of its parent class is hooked twice.
        """
        caller: FrameType | None = frame.f_back
        while self._frame is not None and caller is not None:
            if caller is self._frame:
                return True
            caller = caller.f_back
        self._frame = frame
        return False

    def _begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Copy what is there before an update.

        Returns:
            New arguments of ``step`` if a closure has to be watched: its gradients
            are there only once it has run.
        """
        model = self._model()
        if self._count or model is None:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None and not (self.due and self._targets):
            return None
        try:
            self._scale = getattr(optimizer, "grad_scale", None)
            if self._meet is not None and self.due and self._targets:
                self._meet()
            if "updates" in self._targets:
                now = parameters(model).items()
                self._before = {name: value.detach().clone() for name, value in now}
            if closure is None:
                self._read(model)
                return None
            return self._watched(closure, model, args, kwargs)
        except Exception as error:  # noqa: BLE001 - a hook must never break a step
            self.error = self.error or error
            return None

    def _watched(
        self, closure: Callable[[], Any], model: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Return arguments whose closure lets us look after its first run."""
        runs = [0]

        def watched() -> Any:
            result = closure()
            runs[0] += 1
            if runs[0] == 1:
                # The later runs are at trial points, not at the weights of this step.
                self._taps.pause()
                try:
                    if self.due:
                        self._read(model)
                except Exception as error:  # noqa: BLE001 - as above
                    self.error = self.error or error
            return result

        if len(args) > 1:  # the first is the optimizer
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    def _read(self, model: nn.Module) -> None:
        for target in self._targets:
            if (read := TARGETS[target].read) is not None:
                found = read(model, None)
                if self._scale is not None:  # a fused optimizer unscales by itself
                    scale = float(self._scale)
                    found = {name: value / scale for name, value in found.items()}
                self._streams |= {
                    (target, name): value for name, value in found.items()
                }

    def _end(self) -> None:
        self._taps.pause()
        model = self._model()
        if self._count > 1 or model is None:
            return
        try:
            with torch.no_grad():
                now = parameters(model) if self._before else {}
                for name, value in now.items():
                    step = whole(value - self._before[name])
                    self._streams["updates", name] = step.cpu()
        except Exception as error:  # noqa: BLE001 - a hook must never break a step
            self.error = self.error or error
        self._before = {}


def _is_skipped(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer was told that its gradients overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
