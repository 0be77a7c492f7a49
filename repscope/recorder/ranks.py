"""The processes of a distributed job: which one this is, and what all agree on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from repscope.capture import is_sharded
from repscope.errors import CaptureError, UsageError
from repscope.linalg import Moments

Mode = Literal["reduce", "shards"]

MODES = ("reduce", "shards")
_TIMEOUT = timedelta(minutes=10)


class Ranks:
    """Talks to the recorders of the other ranks, over the CPU and a group of their own.

    Args:
        group: Of all ranks.

    Attributes:
        rank: Number of this process.
        world: How many there are.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.world = rank_and_world()
        self._over = False

    def agree(self, error: Exception | None) -> None:
        """Go on together, or stop together: no rank waits for one that has stopped.

        Args:
            error: What went wrong on this rank, if anything did.

        Raises:
            CaptureError: If it did on another one.
        """
        if self._over:
            return
        failed = torch.zeros(self.world, dtype=torch.int32)
        failed[self.rank] = error is not None
        torch.distributed.all_reduce(failed, group=self._group)
        self._over = bool(failed.any())
        if self._over and error is None:
            others = ", ".join(
                str(rank) for rank in failed.nonzero().flatten().tolist()
            )
            raise CaptureError(
                f"the recorder of rank {others} stopped, so that this one (rank "
                f"{self.rank}) stops too; its own error says why"
            )

    def gather(self, value: object) -> list[Any]:
        """Return what every rank has given, in the order of ranks."""
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def reduce(self, moments: Mapping[str, Moments]) -> dict[str, Moments]:
        """Return the moments of the rows of all ranks.

        Args:
            moments: Layer -> moments of the rows of this one.
        """
        names = sorted({name for each in self.gather([*moments]) for name in each})
        own = {name: moments.get(name, Moments(finite=False)) for name in names}
        return {name: each.all_reduce(self._group) for name, each in own.items()}


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and how many there are: 0 and 1 if alone."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def connect(mode: Mode, model: nn.Module, targets: tuple[str, ...]) -> Ranks | None:
    """Return the way to the other ranks, where something needs all of them together.

    Without such a need a recorder may be built on one rank alone.

    Args:
        mode: ``"reduce"`` or ``"shards"``.
        model: The model.
        targets: What is captured.

    Returns:
        None if there is one process, or no need.
    """
    if rank_and_world()[1] == 1:
        return None
    sharded = any(is_sharded(value) for value in model.parameters())
    together = mode == "shards" or "moments" in targets or sharded
    if not together:
        return None
    group = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    return Ranks(group)


def refuse_equal_probes(ranks: Ranks, sha256: str) -> None:
    """Refuse a probe that every rank would record.

    Args:
        ranks: All processes.
        sha256: Of the probe of this one.

    Raises:
        UsageError: If every rank has the same.
    """
    if len(set(ranks.gather(sha256))) == 1:
        raise UsageError(
            "ranks='shards' records the rows of every rank, and every rank has the "
            "same probe: give each its own part, or use ranks='reduce', which records "
            "it once"
        )
