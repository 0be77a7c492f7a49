"""Moments of layers whose rows are not kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from repscope.linalg.moments import Gathering, Moments


class Streaming:
    """Adds up the rows of any number of layers, in memory that does not grow."""

    def __init__(self) -> None:
        self._layers: dict[str, Gathering] = defaultdict(Gathering)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Take in rows.

        Args:
            rows: Layer -> ``(n_rows, n_features)``; they may be reused afterwards.
        """
        for name, block in rows.items():
            self._layers[name].update(block)

    def drain(self) -> dict[str, Moments]:
        """Return the moments of what came since the last drain, and keep nothing."""
        found = {name: each.finish() for name, each in self._layers.items()}
        return {name: moments for name, moments in found.items() if moments.count}
