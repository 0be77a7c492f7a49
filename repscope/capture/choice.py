"""Which rows are kept when there are more than wanted: a fixed, seeded choice."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SEED = 0


class Choice:
    """Chooses at most ``most`` of the rows of a record, the same at every step.

    Every row number has a fixed random key, and the rows with the smallest keys are
    kept. So the choice depends on how many rows there are and not on how they were cut
    into batches, and what was kept of the first half is decided without the second.

    Args:
        most: How many rows to keep.

    Example:
        >>> Choice(3).among(0, 8)
        tensor([1, 2, 3])
        >>> Choice(3).among(0, 2) is None
        True
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._random = np.random.default_rng(_SEED)
        self._keys = np.zeros(0)
        self.among = lru_cache(maxsize=64)(self._among)

    def _among(self, first: int, n: int) -> Tensor | None:
        """Return which of the next rows are among the chosen of all rows so far.

        Args:
            first: Rows before these.
            n: How many rows come next.

        Returns:
            Ascending positions from 0 to ``n - 1``; None if all of them are.
        """
        total = first + n
        if total <= self.most:
            return None
        return torch.from_numpy(np.flatnonzero(self._kept(total)[first:]))

    def _kept(self, total: int) -> npt.NDArray[np.bool_]:
        if total > len(self._keys):
            more = self._random.random(
                max(total, 2 * len(self._keys)) - len(self._keys)
            )
            self._keys = np.concatenate([self._keys, more])
        keys = self._keys[:total]
        return _smallest(keys, self.most)

    def of(self, numbers: Tensor) -> Tensor | None:
        """Return which of these rows to keep.

        Args:
            numbers: Ascending row numbers within the record.

        Returns:
            Ascending positions in ``numbers``; None if all of them are kept.
        """
        if len(numbers) <= self.most:
            return None
        self._kept(int(numbers[-1]) + 1)
        keys = self._keys[numbers.numpy()]
        return torch.from_numpy(np.flatnonzero(_smallest(keys, self.most)))


def _smallest(keys: npt.NDArray[np.float64], most: int) -> npt.NDArray[np.bool_]:
    chosen: npt.NDArray[np.bool_] = keys <= np.partition(keys, most - 1)[most - 1]
    return chosen
