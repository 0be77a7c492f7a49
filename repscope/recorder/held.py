"""What `Recorder.step` was told since the last update of the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repscope.errors import RepScopeWarning

_IDLE_CALLS = 1000

Number = Tensor | float


class Told(NamedTuple):
    """What the calls of one step said.

    Attributes:
        loss: The mean of theirs.
        labels: All of theirs.
        mask: All of theirs.
        scalars: The latest of each name.
    """

    loss: Number | None
    labels: Any
    mask: Any
    scalars: dict[str, Number]


class Held:
    """Holds what several calls belonging to one step said."""

    def __init__(self) -> None:
        self._calls: list[Told] = []
        self._idle = 0

    def add(self, told: Told) -> None:
        """Keep what a call said that followed no update."""
        self._calls.append(told)
        self._idle += 1
        if self._idle == _IDLE_CALLS:
            warnings.warn(
                f"step() was called {_IDLE_CALLS} times and the optimizer given to the "
                "recorder made no update in between, so that the step number stands "
                "still. If training made a new optimizer, set recorder.optimizer to it",
                RepScopeWarning,
                stacklevel=4,
            )

    def drain(self, told: Told) -> Told:
        """Return what all calls of this step said, and keep nothing.

        Args:
            told: By the last of them.
        """
        self._idle = 0
        if not self._calls:
            return told
        calls, self._calls = [*self._calls, told], []
        losses = [call.loss for call in calls if call.loss is not None]
        loss = losses[0] if losses else None
        if len(losses) > 1:
            # On the device they are on.
            loss = sum(losses[1:], losses[0]) / len(losses)
        scalars = {
            name: value for call in calls for name, value in call.scalars.items()
        }
        labels = _all(call.labels for call in calls)
        return Told(loss, labels, _all(call.mask for call in calls), scalars)


def _all(values: Iterable[Any]) -> Any:
    given = [value for value in values if value is not None]
    if len(given) > 1:
        return torch.cat([torch.as_tensor(value) for value in given])
    return given[0] if given else None


def copied(value: Any) -> Any:
    """Return labels or a mask in memory that the caller cannot reach.

    Args:
        value: A tensor, an array, a list or anything that does not change.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if hasattr(value, "copy") else value


def own_number(value: Number) -> Number:
    """Return a scalar in memory that the caller cannot reach, on the device it is on.

    Args:
        value: A number or a tensor with one.
    """
    # On the CPU nothing has to be waited for.
    if type(value) is Tensor and value.is_cpu and value.numel() == 1:
        return float(value.item())
    return value.detach().clone() if isinstance(value, Tensor) else float(value)
