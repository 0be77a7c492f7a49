"""What was seen at one step: the value that walks from the hooks to the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

StreamKey = tuple[str, str]
"""``(target, layer)``, for example ``("outputs", "hidden1")``."""


def _empty() -> Mapping[str, Tensor | float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What was seen at one step.

    Args:
        step: Optimizer updates done when the values were taken.
        streams: Maps ``(target, layer)`` to a tensor. Activations have shape
            ``(n_samples, n_features)``; a weight keeps the shape of its parameter.
        labels: Integer labels of the samples, shape ``(n_samples,)``, or ``None``.
        scalars: Named numbers of this step. A tensor stays on its device until the
            store needs its value.
        tags: Names for this moment, such as ``("task-2",)``.

    Example:
        >>> Snapshot(3, {}, scalars={"loss": 0.5}).scalars["loss"]
        0.5
    """

    step: int
    streams: Mapping[StreamKey, Tensor]
    labels: Tensor | None = None
    scalars: Mapping[str, Tensor | float] = field(default_factory=_empty)
    tags: tuple[str, ...] = ()
