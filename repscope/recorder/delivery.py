"""From snapshots to the store, in order and in a thread of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from repscope import store
from repscope.capture import Pool, Streaming
from repscope.errors import RepScopeWarning
from repscope.recorder.held import Number
from repscope.recorder.ranks import Ranks
from repscope.recorder.worker import Worker
from repscope.snapshot import Snapshot, StreamKey

_LATE_CALLS = 64
_LATE_SECONDS = 1.0
_NO_ROWS: Mapping[str, Tensor] = MappingProxyType({})


class Sink(Protocol):
    """Anything that wants to see what is recorded."""

    def __call__(self, snapshot: Snapshot) -> None:
        """Look at a snapshot; its tensors are on the CPU and must not be changed."""


class Delivery:
    """Hands what was captured to the store and to whoever else wants it.

    Args:
        writer: Of the store; None where another rank records.
        worker: The thread that does it.
        pool: Where the memory of rows goes back to.
        sinks: Called with every snapshot.
        ranks: The processes of a distributed job, if moments are reduced over them.

    Attributes:
        worker: As given.
        progress: Optimizer updates done.
    """

    def __init__(
        self,
        writer: store.Writer | None,
        worker: Worker,
        *,
        pool: Pool,
        sinks: Sequence[Sink],
        ranks: Ranks | None,
    ) -> None:
        self._writer, self.worker = writer, worker
        self._pool, self._sinks, self._ranks = pool, [*sinks], ranks
        self._streaming = Streaming()
        self._dropped: list[int] = []
        # Scalars of steps that are not captured: handed over many at a time.
        self._late: deque[tuple[int, Mapping[str, Number]]] = deque()
        self._sent = time.monotonic()
        self._known: frozenset[StreamKey] = frozenset()
        self.progress = self._first = 0
        if writer is not None:
            self.progress = self._first = writer.progress or 0
            self._known = writer.recorded
            writer.release = pool.renew

    @property
    def closed(self) -> bool:
        """Whether the store was closed."""
        return self._writer is not None and self._writer.closed

    def has(self, target: str) -> bool:
        """Return whether a resumed store has a target at the step it starts from."""
        return any(target == known for known, _ in self._known)

    def scalars(self, step: int, scalars: Mapping[str, Number]) -> None:
        """Have the scalars of a step recorded that is not captured."""
        late = self._late
        late.append((step, scalars))
        waited = time.monotonic() - self._sent > _LATE_SECONDS
        if len(late) >= _LATE_CALLS or waited or self.worker.waits_always:
            self.send(None)

    def send(
        self,
        snapshot: Snapshot | None,
        *,
        rows: Mapping[str, Tensor] = _NO_ROWS,
        moments: bool = False,
    ) -> None:
        """Have a snapshot recorded.

        Args:
            snapshot: Its tensors now belong to the recorder.
            rows: Layer -> rows of which only moments are kept.
            moments: Record those kept so far with the snapshot.
        """
        snapshots = self._take_late()
        step = self.progress
        if snapshot is not None:
            snapshots.append(snapshot)
            step = snapshot.step
        tensors = [*rows.values(), *(t for s in snapshots for t in s.streams.values())]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        job = partial(self._deliver, snapshots, self.progress, rows, moments)
        if moments and self._ranks is not None:
            self.worker.check()
            self.worker.call(job)  # all ranks at the same place of the program
        elif not self.worker.put(job, nbytes=nbytes):
            # Scalars take no room: they wait for the next time.
            kept = [(s.step, s.scalars) for s in snapshots if s.scalars]
            self._late.extendleft(reversed(kept))
            self._dropped.append(step)
            self.note(dropped_steps=[*self._dropped])

    def _take_late(self) -> list[Snapshot]:
        self._sent = time.monotonic()
        taken: dict[int, dict[str, Number]] = {}
        # One by one: a signal handler may take some of them in between.
        while self._late:
            with contextlib.suppress(IndexError):
                step, scalars = self._late.popleft()
                taken.setdefault(step, {}).update(scalars)
        return [Snapshot(step, {}, scalars=each) for step, each in taken.items()]

    def note(self, **facts: object) -> None:
        """Note facts in the store; the next commit writes them."""
        if self._writer is not None and self.worker.error is None:
            self.worker.put(partial(self._writer.annotate, **facts), nbytes=0)

    def commit(self, *, moments: bool, together: bool = True) -> None:
        """Make everything durable that was sent.

        Args:
            moments: Also the moments kept so far.
            together: All ranks do so.
        """
        self.worker.call(self._commit_job(moments, together))

    def close(
        self,
        *,
        moments: bool,
        together: bool = True,
        timeout: float = math.inf,
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Commit and end the store; after an error the call may be repeated.

        Args:
            moments: Record the moments kept so far.
            together: All ranks do so.
            timeout: Seconds it may take.
            facts: What the store should say at last.
        """
        commit = self._commit_job(moments, together)
        job = partial(self._close, commit, facts)
        self.worker.call(job, timeout=timeout)
        self.worker.stop()

    def undo(self, *, new: bool) -> None:
        """Leave nothing half-written behind a recorder that could not be built."""
        if self._writer is not None:
            self.worker.call(self._writer.discard if new else self._writer.abort)
        self.worker.stop()

    def _commit_job(self, moments: bool, together: bool) -> Callable[[], None]:
        return partial(
            self._commit, self._take_late(), self.progress, moments, together
        )

    # -- in the thread --------------------------------------------------------
    def _deliver(
        self,
        snapshots: Sequence[Snapshot],
        progress: int,
        rows: Mapping[str, Tensor],
        moments: bool,
    ) -> None:
        self._pool.settle()
        if rows:
            self._streaming.add(rows)
            self._pool.take_back(rows.values())
        if moments and snapshots:
            snapshots = [*snapshots[:-1], self._with_moments(snapshots[-1])]
        if self._writer is None:
            for snapshot in snapshots:
                self._pool.take_back(snapshot.streams.values())
            return
        self._writer.progress = progress
        first: Exception | None = None
        for snapshot in snapshots:
            try:
                if (new := self._new_of(snapshot)) is not None:
                    self._writer.append(new)
            except Exception as error:  # noqa: BLE001 - those after it are kept too
                first = first or error
            for sink in [*self._sinks]:
                self._tell(sink, partial(sink, snapshot))
        if first is not None:
            raise first

    def _tell(self, sink: Sink, call: Callable[[], object]) -> None:
        """Call a sink; one that fails is told no more, and recording goes on."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a foreign sink raises
            self._sinks.remove(sink)
            warnings.warn(
                f"a sink of the recorder failed and gets nothing more: "
                f"{type(error).__name__}: {error}. Recording goes on",
                RepScopeWarning,
                stacklevel=2,
            )

    def _new_of(self, snapshot: Snapshot) -> Snapshot | None:
        """Return a snapshot without what a resumed store has of this step."""
        if snapshot.step != self._first or not self._known:
            return snapshot
        streams = {k: v for k, v in snapshot.streams.items() if k not in self._known}
        scalars = {k: v for k, v in snapshot.scalars.items()
                   if ("scalars", k) not in self._known}  # fmt: skip
        if not streams and not scalars and not snapshot.tags:
            return None
        labels = snapshot.labels if streams else None
        return Snapshot(snapshot.step, streams, labels, scalars, snapshot.tags)

    def _with_moments(self, snapshot: Snapshot, *, together: bool = True) -> Snapshot:
        found = self._streaming.drain()
        if self._ranks is not None and together:
            self._ranks.meet("capture_now(), commit() or close()")
            found = self._ranks.reduce(found)
        new = {("moments", name): each.to_tensor() for name, each in found.items()}
        return dataclasses.replace(snapshot, streams={**snapshot.streams, **new})

    def _commit(
        self, snapshots: list[Snapshot], step: int, moments: bool, together: bool
    ) -> None:
        if moments and together and self._ranks is not None:
            # First what needs no other rank.
            self._commit(snapshots, step, moments=False, together=False)
            snapshots = []
        if moments:
            kept = self._with_moments(Snapshot(step, {}), together=together)
            snapshots += [kept] if kept.streams else []
        if self._writer is not None:
            try:
                self._deliver(snapshots, step, _NO_ROWS, moments=False)
            finally:  # what an earlier error left in memory comes first
                self._writer.commit()

    def _close(self, commit: Callable[[], None], facts: Mapping[str, Any]) -> None:
        if self.closed:
            return
        if facts and self._writer is not None:
            self._writer.annotate(**facts)
        commit()
        if self._writer is not None:
            self._writer.close()
        for sink in [*self._sinks]:
            if callable(close := getattr(sink, "close", None)):
                self._tell(sink, close)
