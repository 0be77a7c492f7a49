"""What was seen at one step: the value that walks from the hooks to the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

StreamKey = tuple[str, str]
"""``(target, layer)``, for example ``("outputs", "hidden1")``."""

EXAMPLES = "examples"
"""Target of the example that each row of a stream belongs to, where examples do not
have equally many rows each, in order. Its layer is the stream, ``<target>:<layer>``."""


def stream_name(target: str, layer: str) -> str:
    """Return a stream as one word: of outputs the layer, else ``<target>:<layer>``."""
    return layer if target == "outputs" else f"{target}:{layer}"


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
        unlabelled: Streams to whose rows the labels do not belong: of outputs the
            layer, of another target ``<target>:<layer>``.

    Example:
        >>> Snapshot(3, {}, scalars={"loss": 0.5}).scalars["loss"]
        0.5
    """

    step: int
    streams: Mapping[StreamKey, Tensor]
    labels: Tensor | None = None
    scalars: Mapping[str, Tensor | float] = field(default_factory=_empty)
    tags: tuple[str, ...] = ()
    unlabelled: frozenset[str] = frozenset()

    def labels_of(self, layer: str, *, target: str = "outputs") -> Tensor | None:
        """Return one label a row: the rows of an example all take its label.

        Args:
            layer: The stream.
            target: ``"outputs"``, ``"inputs"`` or ``"output_gradients"``.

        Returns:
            Labels ``(n_rows,)``, or ``None`` when there are none that belong to the
            rows.

        Example:
            >>> import torch
            >>> tokens = {("outputs", "fc"): torch.ones(4, 3)}
            >>> Snapshot(0, tokens, labels=torch.tensor([7, 8])).labels_of("fc")
            tensor([7, 7, 8, 8])
        """
        y, rows = self.labels, self.streams[target, layer]
        moved = stream_name(target, layer) in self.unlabelled
        if y is None or len(y) == 0 or moved:
            return None
        examples = self.streams.get((EXAMPLES, f"{target}:{layer}"))
        if examples is not None:
            return y[examples]
        if len(rows) % len(y):
            return None
        return y.repeat_interleave(len(rows) // len(y))
