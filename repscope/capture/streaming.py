"""Moments of layers whose rows are not kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from repscope.linalg.moments import Moments

# One product over many rows is far cheaper than many products over few.
_GATHERED = 2048


class Streaming:
    """Gathers rows of any number of layers into their `Moments`.

    Its memory does not grow with the number of rows.
    """

    def __init__(self) -> None:
        self._moments: dict[str, Moments] = {}
        self._gathered: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Take in rows.

        Args:
            rows: Layer -> ``(n_rows, n_features)``; they may be reused afterwards.
        """
        for name, block in rows.items():
            for part in torch.split(block, _GATHERED):
                self._add(name, part)

    def _add(self, name: str, rows: Tensor) -> None:
        buffer = self._gathered.get(name)
        if buffer is None or (buffer.dtype, buffer.shape[1]) != (
            rows.dtype,
            rows.shape[1],
        ):
            self._fold(name)
            buffer = self._gathered[name] = rows.new_empty(_GATHERED, rows.shape[1])
        if self._filled[name] + len(rows) > _GATHERED:
            self._fold(name)
        start = self._filled[name]
        buffer[start : start + len(rows)] = rows
        self._filled[name] = start + len(rows)

    def _fold(self, name: str) -> None:
        if filled := self._filled.get(name, 0):
            moments = self._moments.setdefault(name, Moments(finite=False))
            moments.update(self._gathered[name][:filled])
        self._filled[name] = 0

    def drain(self) -> dict[str, Moments]:
        """Return the moments of what came since the last drain, and keep nothing."""
        for name in self._gathered:
            self._fold(name)
        moments, self._moments = self._moments, {}
        return moments
