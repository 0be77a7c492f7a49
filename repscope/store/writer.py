"""Record a run: what `Writer.commit` returned from survives kill and power loss."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from repscope.errors import (
    ClosedStore,
    ForkedRecorder,
    StoreFull,
)
from repscope.snapshot import Snapshot, StreamKey
from repscope.store import compact, files, manifest, onefile, segment, wal
from repscope.store.batch import Batch
from repscope.store.catalog import Catalog
from repscope.store.columns import Column, plan
from repscope.store.facts import as_json
from repscope.store.index import DTYPES, SCALARS, to_spans
from repscope.store.lock import Lock
from repscope.store.pending import Layout, Pending, settle_scalars

SEGMENT_BYTES = 2**26
COMMIT_SECONDS = 10.0
_FRAME_BYTES = 4096

T = TypeVar("T")
Durability = Literal["batch", "append"]


class Writer:
    """The one writer of a store; made by `create` or `reopen`.

    Args:
        path: The store.
        lock: Held; released at the end.
        frames: The writer's end of the manifest.
        catalog: What the store holds, if it is not new.

    Attributes:
        path: The directory of the store.
        one_file: The file that `close` packs it into, or None.
        progress: Optimizer updates done, if the caller counts them; written with the
            next commit, so that `reopen` knows where to go on.
        max_store_bytes: As given to `create`.
        recovered: What `reopen` found and put right.
        recorded: What the store has of the step that `reopen` goes on from.
    """

    def __init__(
        self,
        path: Path,
        lock: Lock,
        frames: manifest.Manifest,
        catalog: Catalog | None = None,
    ) -> None:
        # Loaded now and not at the first commit, which may come at the program's exit:
        # the library ends itself there, after whoever registered later than its import.
        importlib.import_module("h5py")
        self.path = path
        self.one_file: Path | None = None
        self.progress: int | None = None
        self.max_store_bytes: int | None = None
        self.recovered: dict[str, Any] = {}
        self.recorded: frozenset[StreamKey] = frozenset()
        self.release: Callable[[Iterable[Tensor]], None] | None = None
        self._pid = os.getpid()
        self._notes: dict[str, Any] = {}
        self._noted: int | None = None
        self._log: wal.Log | None = None
        self._logged = 0  # pending records that the log has
        self._settled = 0  # bytes of the batches that None stands for
        self._batches: list[Batch | None] = []
        self._next_segment = 0
        self._closed = False
        self._lock = lock
        self._manifest = frames
        self._pending = Pending()
        self._acked: Counter[StreamKey] = Counter()
        self._about = manifest.follow({}, {}, 0) if catalog is None else catalog.about
        if catalog is not None:
            self._pending = Pending(
                {
                    key: Layout(DTYPES[dtype], tuple(shape))
                    for key, (dtype, shape) in catalog.layouts.items()
                    if key[0] != SCALARS
                }
            )
            self._acked = catalog.rows()
            used = {*catalog.files, *catalog.replaced}
            self._next_segment = max(used, default=-1) + 1
        self._committed = time.monotonic()

    def fold(self, snapshots: list[Snapshot], progress: int) -> None:
        """Move what a dead writer left in its log into a segment."""
        for snapshot in snapshots:
            self._pending.add(snapshot)
        self._logged = len(snapshots)  # counted by the catalog
        self.progress = progress
        self.commit()

    def start_from(
        self, step: int, catalog: Catalog, *, recovered: dict[str, Any]
    ) -> None:
        """Go on after ``step`` with a store that holds ``catalog``."""
        self.progress = self._noted = step
        self.recorded = catalog.keys_at(step)
        self._batches = [*catalog.batches]
        self.recovered = recovered

    def keep_log(self, durability: Durability) -> None:
        """From now on make every append durable, or do not."""
        if durability == "append":
            self._log = wal.Log(self.path, self._manifest.seq)

    def append(self, snapshot: Snapshot) -> None:
        """Take a snapshot for the next commit, and commit when it is time.

        A commit follows when the next snapshot like this would not fit into a segment,
        or `COMMIT_SECONDS` after the last one. If that commit fails its error is
        raised, and the snapshot is kept for the next attempt.

        Args:
            snapshot: Its tensors now belong to the store and must not change: streams
                and labels on the CPU; scalars may stay on their device.
        """
        self._check()
        self._check_room(snapshot)
        size = self._pending.add(snapshot)
        full = self._pending.nbytes + size > _data_bytes()
        if full or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()
        elif self._log is not None:
            with self._disk_errors():
                self._write_log(self._log)

    def _check_room(self, snapshot: Snapshot) -> None:
        """Refuse a snapshot with which the next commit would pass the limit.

        Raises:
            StoreFull: If it would.
        """
        if self.max_store_bytes is None:
            return
        tensors = [*snapshot.streams.values()]
        if snapshot.labels is not None:
            tensors.append(snapshot.labels)
        waiting = self._pending.nbytes + sum(t.nbytes for t in tensors)
        n_streams = len(tensors) + len(snapshot.scalars)
        # Structures of HDF5 and the frame, generously; and for the log, once more.
        needed = waiting + waiting // 32 + _FRAME_BYTES * (n_streams + 4)
        needed += waiting if self._log is not None else 0
        if self._used() + needed > self.max_store_bytes:
            raise StoreFull(
                errno.EDQUOT,
                f"{self.path} would pass max_store_bytes={self.max_store_bytes}; "
                "nothing of this snapshot was taken, those before it can be committed",
            )

    def _used(self) -> int:
        sizes = sum(0 if batch is None else batch.nbytes for batch in self._batches)
        return self._settled + sizes + self._manifest.size

    def _write_log(self, log: wal.Log) -> None:
        """Make what the log does not have yet durable."""
        if not log.sound:
            self.commit()
            return
        records = self._pending.records[self._logged :]
        settle_scalars(records)
        log.append(records, self.progress)
        self._acked += self._pending.rows(first=self._logged)
        self._logged += len(records)

    def annotate(self, **meta: object) -> None:
        """Note facts that were not known at the start; the next commit writes them.

        Args:
            **meta: JSON-able; they override earlier facts of the same name.
        """
        self._check()
        self._notes |= as_json(meta)

    def commit(self) -> None:
        """Make everything appended so far durable, or raise and keep it in memory.

        Either all streams of the batch are in the store afterwards or none is. After
        an error the same call may be tried again.
        """
        self._check()
        news = self._pending.records or self._notes or self.progress != self._noted
        if news:
            with self._disk_errors():
                self._commit()
            self._compact()
        self._committed = time.monotonic()

    def close(self) -> None:
        """Commit, mark the store as complete and let others write; then do nothing.

        If the commit or the packing fails the writer stays open, so that it can be
        tried again; what was committed stays where it is.
        """
        if self._closed:
            return
        self.commit()
        with self._disk_errors():
            self.write_frame({"closed": True})
            if self.one_file is not None:
                onefile.finish(self.one_file)
        self._let_go()

    def abort(self) -> None:
        """Drop what is pending and let others write; what was committed stays."""
        if self._closed:
            return
        self._check()
        self._let_go()

    def discard(self) -> None:
        """Remove the whole store: its run failed before it began."""
        self.abort()
        shutil.rmtree(self.path)

    @property
    def closed(self) -> bool:
        """Whether `close` or `abort` has let the store go."""
        return self._closed

    def acked_rows(self, target: str, layer: str) -> int:
        """Return how many rows (tensors, for weights) of a stream are durable."""
        return self._acked[target, layer]

    def write_frame(self, frame: Mapping[str, Any]) -> None:
        """Write a frame without records, and make it durable."""
        seq = self._manifest.seq
        self._manifest.write(dict(frame))
        if self._log is not None:
            self._log.sound = False  # it follows a frame that is no longer the last
        self._manifest.sync()
        self._about = manifest.follow(self._about, frame, seq)
        if self._log is not None and not self._pending.records:
            self._log.restart(self._manifest.seq)

    @property
    def pending_bytes(self) -> int:
        """Bytes appended and not yet durable."""
        return self._pending.nbytes

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedRecorder(
                f"{self.path} belongs to process {self._pid}; this is its forked child "
                f"{os.getpid()}: record in the parent, or into a store of its own"
            )
        if self._closed:
            raise ClosedStore(f"{self.path} is closed; record into a new store")

    def _disk_errors(self) -> AbstractContextManager[None]:
        return files.disk_errors(
            f"writing the store {self.path}",
            advice="what was acknowledged is safe and the rest waits in memory: remove "
            "the cause, then commit() again",
        )

    def _let_go(self) -> None:
        self._closed = True
        self._pending.clear()
        if self._log is not None:
            self._log.close()
        self._manifest.close()
        self._lock.release()

    # -- the commit protocol -------------------------------------------------
    def _commit(self) -> None:
        frame: dict[str, Any] = {"time": time.time(), "meta": self._notes}
        if self.progress is not None:
            frame["progress"] = self.progress
        written: list[Path] = []
        with self._framing(written) as seq:
            if records := self._pending.records:
                settle_scalars(records)
                frame["steps"] = to_spans(record.step for record in records)
                frame["tags"] = [[i, t] for i, r in enumerate(records) for t in r.tags]
                columns = plan(records, limit=_data_bytes())
                frame["segments"] = self._write_segments(columns, written, frame)
            self._manifest.write(frame)
            # All that takes time comes before the frame is durable: an interrupt after
            # that must not find the records still waiting.
            about = manifest.follow(self._about, frame, seq)
            rows = self._pending.rows(first=self._logged)
            # Also of records that have only a tag, and no segment.
            new = [Batch(self._locate, 0, frame, seq)] if "steps" in frame else []
        if self.release is not None:
            records = self._pending.records
            self.release(t for record in records for t in record.tensors.values())
        self._pending.clear()
        self._logged, self._notes, self._about = 0, {}, about
        self._noted = frame.get("progress")
        self._batches += new
        self._acked += rows
        if self._log is not None:
            self._log.restart(self._manifest.seq)

    @contextlib.contextmanager
    def _framing(self, written: list[Path]) -> Iterator[int]:
        """Make the frame that is written inside durable, or take everything back.

        Args:
            written: Files that the frame names; after a failure they are removed.

        Yields:
            The number of the frame.
        """
        try:
            yield self._manifest.seq
        except BaseException:
            # Once no frame names them, they are not part of the store.
            self._manifest.undo()
            for path in written:
                files.discard(path)
            raise
        # From here on a frame may survive even if the sync fails: its segments stay,
        # and their numbers are never used again.
        self._next_segment += len(written)
        if self._log is not None:
            self._log.sound = False
        self._manifest.sync()

    def _write_segments(
        self,
        contents: Iterable[list[Column]],
        written: list[Path],
        frame: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Write new segments.

        Args:
            contents: Columns of each.
            written: Gets the path of every file made, for removal after a failure.
            frame: What the frame says, apart from its segments.

        Returns:
            What the frame says about them.
        """
        segments: list[dict[str, Any]] = []
        folder = self.path / "segments"
        run = self._about | {"meta": self._about["meta"] | self._notes}
        for place, (columns, last) in enumerate(_with_last(contents)):
            number = self._next_segment + place
            about = {"run": run, "frame": frame, "place": place, "last": last}
            image = segment.Image(columns, seq=self._manifest.seq, about=about)
            temp = folder / f".tmp-{number}-{os.getpid()}"
            written.append(temp)  # before it is there: an interrupt may come between
            files.discard(temp)
            files.write_new(temp, image.pieces())
            index = {
                "number": number,
                "bytes": image.nbytes,
                "parts": [part.to_json() for part in image.parts],
            }
            segments.append(index)
        for i, info in enumerate(segments):
            written[i] = written[i].rename(self._locate(info["number"]))
        files.sync_directory(folder)
        return segments

    def _locate(self, number: int, log: bool = False) -> Path:
        return manifest.locate(self.path, number, log=log)

    # -- few files -----------------------------------------------------------
    def _compact(self) -> None:
        """Merge small segments while there are many; a failure costs nothing."""
        if self.max_store_bytes and self._used() * 2 > self.max_store_bytes:
            return  # for a moment both would be there
        limit = _data_bytes()
        while batches := compact.choose(self._batches, limit=limit):
            at = self._batches.index(batches[0])
            merged: Batch | None = None
            try:
                merged = self._merge(batches)
            except OSError:
                # Full, or damaged: every row is where it was, and stays there.
                self._settled += sum(batch.nbytes for batch in batches)
                self._batches[at : at + len(batches)] = [None]
                return
            self._batches[at : at + len(batches)] = [merged]

    def _merge(self, batches: list[Batch]) -> Batch:
        """Put one batch in the place of several.

        Args:
            batches: Neighbours; their files are removed once the new one is durable.

        Returns:
            The new batch.
        """
        written: list[Path] = []
        frame = compact.frame(batches)
        with self._framing(written) as seq:
            columns = compact.columns(batches)
            contents = [columns] if columns else []
            frame["segments"] = self._write_segments(contents, written, frame)
            self._manifest.write(frame)
        if self._log is not None:
            self._log.restart(self._manifest.seq)
        for number in (number for batch in batches for number in batch.numbers):
            files.discard(self._locate(number))
        return Batch(self._locate, 0, frame, seq)


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it is the last."""
    before: list[T] = []
    for item in items:
        yield from ((each, False) for each in before)
        before = [item]
    yield from ((each, True) for each in before)


def _data_bytes() -> int:
    """Return how much data a segment takes; HDF5's own structures need the rest."""
    return SEGMENT_BYTES - SEGMENT_BYTES // 32
