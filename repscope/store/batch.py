"""One frame of a manifest as places of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from repscope.snapshot import StreamKey
from repscope.store.chunks import StoredPart
from repscope.store.index import RESERVED, Ints, Part, Spans, from_spans


class Batch:
    """What one commit added.

    Args:
        locate: Where segments and logs are, by number.
        first: Number, within the run, of the first record.
        frame: Its manifest frame.
        seq: The number of that frame.

    Attributes:
        first: As given.
        frames: First and last number of the frames that this batch stands for.
        level: How often its rows have been merged with others.
        nbytes: Bytes of its segments.
        numbers: Those of its segments.
        steps: Step of every record.
        visible: Whether each record counts, rather than being hidden by a rewind.
        tags: Pairs of a record, numbered within the run, and its tag.
        parts: Where the rows of each stream are.
    """

    def __init__(
        self,
        locate: Callable[[int, bool], Path],
        first: int,
        frame: Mapping[str, Any],
        seq: int,
    ) -> None:
        self.first = first
        self.frames: tuple[int, int] = tuple(frame.get("replaces", (seq, seq)))
        self.level: int = frame.get("level", 0)
        self.numbers: list[int] = []
        self.nbytes = sum(segment["bytes"] for segment in frame["segments"])
        self.steps = from_spans(frame["steps"])
        self.visible = np.ones(len(self.steps), bool)
        self._highest = int(self.steps.max(initial=-1))
        self.visible[from_spans(frame.get("hidden", []))] = False
        self.tags = [(first + record, tag) for record, tag in frame["tags"]]
        self.parts: dict[StreamKey, list[StoredPart]] = {}
        for segment in frame["segments"]:
            number, log = segment["number"], segment.get("log", False)
            if not log:
                self.numbers.append(number)
            file = locate(number, log)
            for data in segment["parts"]:
                part = Part.from_json(data)
                stored = StoredPart(part, file, segment["bytes"], self.steps, log)
                self.parts.setdefault(part.key, []).append(stored)

    @property
    def n_segments(self) -> int:
        """How many segments hold its rows."""
        return len(self.numbers)

    @cached_property
    def tags_by_record(self) -> dict[int, list[str]]:
        """Tags of each record, numbered within the run."""
        found: dict[int, list[str]] = {}
        for record, tag in self.tags:
            found.setdefault(record, []).append(tag)
        return found

    def rewind(self, step: int) -> None:
        """Hide every record after ``step``."""
        if step < self._highest:
            self.visible &= self.steps <= step
            self._highest = step

    def find(self, key: StreamKey, record: int) -> list[tuple[StoredPart, int, int]]:
        """Return where the rows of a record are: part, start, rows; empty if absent."""
        found = []
        for stored in self.parts.get(key, ()):
            place = stored.part.find(record - self.first)
            if place is not None:
                found.append((stored, *place))
        return found

    def records(self) -> list[int]:
        """Return the numbers of visible records that have a stream, ascending."""
        # Streams recorded together share their spans: decode each kind once.
        kinds: dict[str, Spans] = {
            str(stored.part.records): stored.part.records
            for key, parts in self.parts.items()
            if key[0] not in RESERVED
            for stored in parts
        }
        every = [from_spans(spans) for spans in kinds.values()]
        unique = np.unique(np.concatenate(every)) if every else np.zeros(0, np.int64)
        return [self.first + int(record) for record in unique[self.visible[unique]]]

    def recorded(self, key: StreamKey) -> tuple[Ints, Ints]:
        """Return step and number of every visible record of a stream, in order."""
        parts = [stored.part.where[0] for stored in self.parts.get(key, ())]
        records = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))
        records = records[self.visible[records]]
        return self.steps[records], records + self.first

    def runs(
        self, key: StreamKey, wanted: Ints, rows: int
    ) -> Iterator[tuple[StoredPart, int, int, int]]:
        """Yield records whose rows follow each other, as many at once as there are.

        Args:
            key: The stream.
            wanted: Numbers of records.
            rows: Only records that have so many rows in one part.

        Yields:
            The part, its first row, how many records, and where in ``wanted`` they
            start. Left out: what is cut, or stored flat.
        """
        parts = [s for s in self.parts.get(key, ()) if not s.part.flat]
        order = np.argsort(wanted, kind="stable")
        for stored in parts:
            records, starts, counts = stored.part.where
            near = np.searchsorted(wanted[order], records + self.first)
            at = order[np.minimum(near, len(order) - 1)]
            good = (wanted[at] == records + self.first) & (counts == rows)
            at, starts = at[good], starts[good]
            apart = (np.diff(at) != 1) | (np.diff(starts) != rows)
            ends = [0, *(np.flatnonzero(apart) + 1).tolist(), len(at)]
            for low, high in itertools.pairwise(ends):
                if low < high:
                    yield stored, int(starts[low]), high - low, int(at[low])

    def last(self, parts: list[StoredPart]) -> int | None:
        """Return the number of the last visible record of a stream."""
        for stored in reversed(parts):
            records = stored.part.where[0]
            records = records[self.visible[records]]
            if len(records):
                return self.first + int(records[-1])
        return None
