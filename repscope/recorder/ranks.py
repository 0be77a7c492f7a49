"""The processes of a distributed job: which one this is, and how they stay together.

Whatever all ranks do together begins with `Ranks.meet`, and a recorder that stops says
so by `Ranks.leave`, which waits for nobody: so no rank waits for one that has stopped.
The two use the key-value store that the job was started with. A collective in their
place would have to be waited for, at the latest when the process ends.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from repscope.capture import Probe, is_sharded
from repscope.errors import CaptureError, ShardedParameter, UsageError
from repscope.linalg import Moments

Mode = Literal["reduce", "shards"]

MODES = ("reduce", "shards")
_TIMEOUT = timedelta(minutes=30)  # that of gloo
_POLL_SECONDS = 0.0002, 0.02  # at first, and at most
_ALL, _LEFT = "all", "left"

_numbers = itertools.count()  # recorders are built in the same order on every rank


class Ranks:
    """The recorders of all ranks of a job.

    Args:
        store: Key-value store of these recorders alone.
        group: Of all ranks, over the CPU.
        sharded: Whether ranks have parts of a parameter.

    Attributes:
        rank: Number of this process.
        world: How many there are.
        sharded: As given.
    """

    def __init__(self, store: Any, group: Any, *, sharded: bool) -> None:
        self._store, self._group = store, group
        self.rank, self.world = rank_and_world()
        self.sharded = sharded
        self._pid = os.getpid()
        self._arrived: Counter[str] = Counter()
        self._passed = 0
        self._over = False

    def meet(self, place: str) -> None:
        """Wait until all ranks are at this place; go on together, or not at all.

        Args:
            place: What comes next: the method that the user called.

        Raises:
            CaptureError: If the recorder of a rank stopped, if the ranks are at
                different places, or if one does not come.
        """
        if self._over or self._arrived.total() > self._passed:
            raise CaptureError(
                f"{place} interrupts what the ranks do together, or comes after its end"
            )
        try:
            self._arrived[place] += 1
            self._store.add(place, 1)
            self._store.add(_ALL, 1)
            self._wait(place)
            self.check(self._passed)
            together = self._count(place) >= self._arrived[place] * self.world
        except CaptureError:
            self._over = True
            raise
        except RuntimeError as error:
            self._over = True
            raise CaptureError(
                f"rank {self.rank} lost the recorders of the other ranks in {place}: "
                f"{error}"
            ) from error
        if not together:
            self._over = True
            raise CaptureError(
                f"rank {self.rank} is in {place}, and another one elsewhere: call the "
                "methods of a recorder on all ranks alike"
            )
        self._passed += 1

    def look(self, place: str) -> None:
        """Meet where the parameters are in parts; elsewhere no rank need wait.

        Args:
            place: As for `meet`.
        """
        if self.sharded:
            self.meet(place)
        else:
            self.check()

    def check(self, before: int | None = None) -> None:
        """Stop if another rank has.

        Args:
            before: Count only those that missed the meeting of this number.

        Raises:
            CaptureError: If one did.
        """
        if not self._store.check([_LEFT]):
            return
        rank, missed = map(int, self._store.get(_LEFT).split())
        if before is None or missed <= before:
            raise CaptureError(
                f"the recorder of rank {rank} stopped, so that this one (rank "
                f"{self.rank}) stops too; its own error says why"
            )

    def leave(self) -> None:
        """Take part in nothing more, and let no rank wait for this one."""
        if self._over or os.getpid() != self._pid:
            return
        self._over = True
        with suppress(RuntimeError):  # the job has ended: nobody waits
            self._store.compare_set(_LEFT, "", f"{self.rank} {self._passed}")
            if self._arrived.total() == self._passed:
                self._store.add(_ALL, 1)

    def gather(self, value: object) -> list[Any]:
        """Return what every rank has given, in the order of ranks.

        Args:
            value: Anything that can be pickled.
        """
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

    def _count(self, key: str) -> int:
        return int(self._store.add(key, 0))

    def _wait(self, place: str) -> None:
        """Wait without holding the store, which other threads of the job may need.

        Raises:
            CaptureError: If a rank does not come, or this one has left meanwhile.
        """
        pause, longest = _POLL_SECONDS
        end = time.monotonic() + _TIMEOUT.total_seconds()
        while self._count(_ALL) < (self._passed + 1) * self.world:
            if self._over:
                raise CaptureError(f"rank {self.rank} left {place} before the others")
            if time.monotonic() > end:
                self.leave()
                raise CaptureError(
                    f"rank {self.rank} waited {_TIMEOUT} in {place} for the others: "
                    "call the methods of a recorder on all ranks alike"
                )
            time.sleep(pause)
            pause = min(2 * pause, longest)


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and how many there are: 0 and 1 if alone."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def connect(mode: Mode, model: nn.Module, capture: str | Sequence[str]) -> Ranks | None:
    """Return the way to the other ranks, where something needs all of them together.

    Without such a need a recorder may be built on one rank alone.

    Args:
        mode: ``"reduce"`` or ``"shards"``.
        model: The model.
        capture: Target or targets.

    Returns:
        None if there is one process, or no need.
    """
    if rank_and_world()[1] == 1:
        return None
    sharded = _has_parts(model)
    if not (mode == "shards" or "moments" in capture or sharded):
        return None
    dist = torch.distributed
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    common = dist.distributed_c10d._get_default_store()
    prefix = f"repscope/{next(_numbers)}"
    store = dist.PrefixStore(prefix, common)  # type: ignore[attr-defined]
    return Ranks(store, group, sharded=sharded)


def _has_parts(model: nn.Module) -> bool:
    return any(is_sharded(value) for value in model.parameters())


def refuse_parts(model: nn.Module) -> None:
    """Refuse to wait for ranks that will not come.

    Args:
        model: One that had whole parameters when the recorder was built.

    Raises:
        ShardedParameter: If they are in parts now.
    """
    if rank_and_world()[1] > 1 and _has_parts(model):
        raise ShardedParameter(
            "the parameters were sharded after the recorder was built, so that the "
            "ranks do not know of each other: call fully_shard first"
        )


def compare_probes(ranks: Ranks, mode: Mode, probe: Probe | None) -> bool:
    """Compare the probes of all ranks.

    Args:
        ranks: All processes.
        mode: ``"reduce"`` or ``"shards"``.
        probe: That of this one.

    Returns:
        Whether no rank before this one has the same: rows count once.

    Raises:
        UsageError: If every rank would record the same rows, or if they have to run a
            model together and would not run it equally often.
    """
    own = (None, 0) if probe is None else (probe.sha256, probe.n_forwards)
    hashes, forwards = zip(*ranks.gather(own), strict=True)
    if ranks.sharded and len(set(forwards)) > 1:
        raise UsageError(
            "a model whose parameters are sharded runs on all ranks together, and "
            f"their probes take {[*forwards]} forwards: give each rank a probe of as "
            "many samples, with the same batch_size"
        )
    if probe is None:
        return True
    if mode == "shards" and len(set(hashes)) == 1:
        raise UsageError(
            "ranks='shards' records the rows of every rank, and every rank has the "
            "same probe: give each its own part, or use ranks='reduce', which records "
            "it once"
        )
    return hashes.index(probe.sha256) == ranks.rank
