"""The stores of the ranks of one job, ``<path>/rank-<i>``, read as one run."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repscope.errors import ShardMismatch
from repscope.linalg.moments import Moments
from repscope.snapshot import EXAMPLES, Snapshot, StreamKey
from repscope.store import onefile
from repscope.store.catalog import Catalog
from repscope.store.contents import Trust
from repscope.store.index import LABELS, RESERVED, SCALARS, Ints, is_rows

_NAME = re.compile(r"rank-(\d+)(?:\.h5)?")


def catalog(path: Path, *, trust: Trust = "default") -> Catalog | Shards:
    """Return what a store holds, or what the stores of all ranks below a folder do.

    Args:
        path: A store, or a folder of ``rank-<i>`` or ``rank-<i>.h5``.
        trust: As for `open`.
    """
    if path.is_dir() and not (path / "FORMAT").exists():
        names = {child.name.removesuffix(".rscope") for child in path.iterdir()}
        if found := sorted(filter(_NAME.fullmatch, names)):
            return Shards(path, found, trust=trust)
    return Catalog(onefile.located(path), trust=trust)


class _Stream(NamedTuple):
    """Where a stream is: the ranks that share it, and the records all of them have."""

    ranks: Sequence[Catalog]
    places: Mapping[int, tuple[int, ...]]  # by record of the first, steps ascending
    latest: Mapping[int, int]  # step -> record
    recorded: tuple[Ints, Ints]  # the same


class Shards:
    """The catalogs of all ranks as one, whose records are numbered as those of rank 0.

    Rows and labels are those of all ranks, in order; moments are merged; a scalar is
    the mean over the ranks that ever record it; all else is that of rank 0. What one
    rank lacks at a step, because it was killed before, is not there at that step.

    Args:
        path: The folder.
        names: Of the stores in it.
        trust: As for `open`.
    """

    def __init__(self, path: Path, names: Sequence[str], *, trust: Trust) -> None:
        stores = (onefile.located(path / name) for name in names)
        catalogs = [Catalog(store, trust=trust) for store in stores]
        self._ranks = _in_order(path, dict(zip(names, catalogs, strict=True)))
        self._known: dict[StreamKey, _Stream] = {}
        self._uneven: set[str] = set()
        self._check_layouts(path)

    def _check_layouts(self, path: Path) -> None:
        """Refuse rows that do not fit together.

        Raises:
            ShardMismatch: If ranks differ in the width or dtype of a stream.
        """
        layouts = self._ranks[0].layouts
        for number, rank in enumerate(self._ranks):
            for key, now in rank.layouts.items():
                if _is_shared(key[0]) and layouts.get(key, now) != now:
                    raise ShardMismatch(
                        f"{path}: rank {number} recorded {key[0]} of layer {key[1]!r} "
                        f"as {now}, rank 0 as {layouts[key]}: they make no common "
                        "rows; open the stores of the ranks one by one"
                    )

    # -- about the run -------------------------------------------------------
    @property
    def meta(self) -> dict[str, Any]:
        """What was noted on rank 0; layers that any rank calls unlabelled are.

        So are those found to have other numbers of rows per label on other ranks, where
        not every rank has noted the example of each row.
        """
        first = self._ranks[0].meta
        noted = (rank.meta.get("unlabelled", ()) for rank in self._ranks)
        names = self._uneven.union(*noted)
        return first | ({"unlabelled": sorted(names)} if names else {})

    @property
    def closed(self) -> bool:
        """Whether all ranks have closed their stores."""
        return all(rank.closed for rank in self._ranks)

    @property
    def done(self) -> int:
        """Optimizer updates that the last commit of every rank knew of."""
        return min(rank.done for rank in self._ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of the segments of all ranks."""
        return sum(rank.nbytes for rank in self._ranks)

    @cached_property
    def last(self) -> dict[StreamKey, int]:
        """The last record of every stream, in order of first appearance."""
        places = {key: self._stream(key).places for key in self._ranks[0].last}
        return {key: max(found) for key, found in places.items() if found}

    @cached_property
    def by_step(self) -> dict[int, list[int]]:
        """The records of each step that have a stream."""
        found: dict[int, list[int]] = {}
        for record in self.records:
            found.setdefault(self.step(record), []).append(record)
        return found

    @cached_property
    def records(self) -> list[int]:
        """The records that have a stream, in order."""
        return sorted({r for key in self.streams() for r in self._stream(key).places})

    @property
    def steps(self) -> list[int]:
        """Ascending steps."""
        return sorted(self.by_step)

    @cached_property
    def tags(self) -> dict[str, int]:
        """The record of every tag of rank 0, if all ranks have all of it."""
        first = self._ranks[0]
        return {
            tag: record
            for tag, record in first.tags.items()
            if all(self.has(k, record) for k in self.last if first.has(k, record))
        }

    def streams(self) -> list[StreamKey]:
        """Return the streams in order of first appearance."""
        return [key for key in self.last if key[0] not in RESERVED]

    # -- records -------------------------------------------------------------
    def _stream(self, key: StreamKey) -> _Stream:
        if key not in self._known:
            ranks = self._ranks if _is_shared(key[0]) else self._ranks[:1]
            if key[0] == SCALARS:
                ranks = [rank for rank in self._ranks if key in rank.last]
            each = [rank.occurrences(key) for rank in ranks]
            common = [at for at in each[0] if all(at in other for other in each)]
            places = {each[0][at]: tuple(own[at] for own in each) for at in common}
            latest = {step: each[0][step, time] for step, time in common}
            steps, records = np.array([*latest.items()], np.int64).reshape(-1, 2).T
            self._known[key] = _Stream(ranks, places, latest, (steps, records))
        return self._known[key]

    def has(self, key: StreamKey, record: int) -> bool:
        """Return whether all ranks that should have a stream have it in a record."""
        return record in self._stream(key).places

    def step(self, record: int) -> int:
        """Return the step of a record."""
        return self._ranks[0].step(record)

    def recorded(self, key: StreamKey) -> tuple[Ints, Ints]:
        """Return the ascending steps of a stream, and the latest record of each."""
        return self._stream(key).recorded

    def latest(self, key: StreamKey, step: int) -> int | None:
        """Return the latest record of a step that has the stream, or None."""
        return self._stream(key).latest.get(step)

    # -- tensors -------------------------------------------------------------
    def shape(self, key: StreamKey, record: int) -> tuple[int, ...]:
        """Return the shape of the tensor that `load` returns."""
        ranks, places, *_ = self._stream(key)
        pairs = zip(ranks, places[record], strict=True)
        first, *others = [rank.shape(key, own) for rank, own in pairs]
        if not is_rows(key[0]):
            return first
        return first[0] + sum(other[0] for other in others), *first[1:]

    def load(self, key: StreamKey, record: int) -> Tensor:
        """Return a copy of what a record holds of a stream."""
        return _joined(key[0], self._parts(key, record))

    def _parts(self, key: StreamKey, record: int) -> list[Tensor]:
        ranks, places, *_ = self._stream(key)
        pairs = zip(ranks, places[record], strict=True)
        parts = [rank.load(key, own) for rank, own in pairs]
        if key[0] == EXAMPLES:
            firsts = self._first_examples(record)
            return [part + first for part, first in zip(parts, firsts, strict=True)]
        return parts

    def _first_examples(self, record: int) -> list[int]:
        """Return what number the first example of each rank has among those of all."""
        if not self.has(LABELS, record):
            return [0] * len(self._ranks)  # nothing to number them by
        ranks, places, *_ = self._stream(LABELS)
        pairs = zip(ranks, places[record], strict=True)
        counts = [rank.shape(LABELS, own)[0] for rank, own in pairs]
        return list(itertools.accumulate(counts[:-1], initial=0))

    def series(
        self, key: StreamKey, records: Sequence[int], units: slice | Ints
    ) -> Tensor:
        """Return units of a stream of several records, as `Catalog.series` does."""
        ranks, places, *_ = self._stream(key)
        if not is_rows(key[0]) and len(ranks) > 1:
            return torch.stack([self.load(key, r)[..., units] for r in records])
        each = zip(*(places[record] for record in records), strict=True)
        pairs = zip(ranks, each, strict=True)
        parts = [rank.series(key, own, units) for rank, own in pairs]
        if key[0] == EXAMPLES:
            firsts = torch.tensor([self._first_examples(r) for r in records])
            parts = [part + firsts[:, i, None] for i, part in enumerate(parts)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def snapshot(self, record: int, keys: list[StreamKey]) -> Snapshot:
        """Return a record with those of the streams ``keys`` that it has."""
        labels = self._parts(LABELS, record) if self.has(LABELS, record) else []
        streams = {}
        for key in keys:
            if key[0] not in RESERVED and self.has(key, record):
                parts = self._parts(key, record)
                streams[key] = _joined(key[0], parts)
                if key[0] == "outputs" and not self._is_even(
                    key, record, parts, labels
                ):
                    self._uneven.add(key[1])
        return Snapshot(
            step=self.step(record),
            streams=streams,
            labels=_joined(LABELS[0], labels) if labels else None,
            scalars={
                key[1]: self.load(key, record).item()
                for key in self.last
                if key[0] == SCALARS and self.has(key, record)
            },
            tags=self._ranks[0].tags_of(record),
        )

    def _is_even(
        self,
        key: StreamKey,
        record: int,
        rows: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> bool:
        """Return whether labels belong to rows as in a store of one rank."""
        examples = EXAMPLES, ":".join(key)
        ranks, places, *_ = self._stream(key)
        pairs = zip(ranks, places[record], strict=True)
        noted = [rank.has(examples, own) for rank, own in pairs]
        if any(noted) or not labels:
            return all(noted) or not labels
        sizes = zip(rows, labels, strict=True)
        return all(len(x) * len(labels[0]) == len(rows[0]) * len(y) for x, y in sizes)

    def columns(self, target: str) -> list[tuple[str, list[int], Tensor]]:
        """Return layer, steps and means over ranks of one-value streams."""
        found: dict[str, list[dict[int, float]]] = {}
        for rank in self._ranks:
            latest: dict[str, dict[int, float]] = {}
            for name, steps, values in rank.columns(target):
                column = zip(steps, values.tolist(), strict=True)
                latest.setdefault(name, {}).update(column)
            for name, values_by_step in latest.items():
                found.setdefault(name, []).append(values_by_step)
        means = []
        for name, columns in found.items():
            steps = sorted(set.intersection(*map(set, columns)))
            rows = [[column[step] for step in steps] for column in columns]
            mean = torch.tensor(rows, dtype=torch.float64).mean(0)
            means.append((name, steps, mean))
        return means


# -- several tensors as one ---------------------------------------------------
def _is_shared(target: str) -> bool:
    """Return whether every rank has its own part of a target."""
    return is_rows(target) or target == "moments"


def _joined(target: str, parts: Sequence[Tensor]) -> Tensor:
    """Return as one what the ranks have recorded of a target."""
    if len(parts) == 1:
        return parts[0]
    if is_rows(target):
        return torch.cat(list(parts))
    if target == SCALARS:
        return torch.stack(list(parts)).mean(0)
    total = torch.stack(list(parts)).sum(0)
    if not bool(total.isfinite().all()):
        return total  # of a run that diverged: as little a number as its parts
    return functools.reduce(Moments.merge, map(Moments.from_tensor, parts)).to_tensor()


# -- which rank is which ------------------------------------------------------
def _in_order(path: Path, found: Mapping[str, Catalog]) -> list[Catalog]:
    """Return the catalogs of all ranks, in order.

    Raises:
        ShardMismatch: If one is missing, or they do not belong together.
    """
    ranks: dict[int, str] = {}
    worlds: dict[int, str] = {}
    for name, catalog in found.items():
        rank, world = _rank_and_world(path / name, catalog.meta)
        worlds.setdefault(world, name)
        if (other := ranks.setdefault(rank, name)) != name:
            raise ShardMismatch(
                f"{path} has rank {rank} twice, as {other} and as {name}; move one away"
            )
    if len(worlds) > 1:
        (one, first), (two, second), *_ = worlds.items()
        raise ShardMismatch(
            f"{path}/{first} is of a job of {one} ranks, {second} of one of {two}; "
            "keep the stores of different jobs in different folders"
        )
    (world,) = worlds
    if len(ranks) < world:
        gone = next(rank for rank in range(world) if rank not in ranks)
        more = f" (and {world - len(ranks) - 1} more)" * (world - len(ranks) > 1)
        raise ShardMismatch(
            f"{path} has no store of rank {gone} of {world}{more}: put rank-{gone} "
            "back, or wait until that rank has begun to record; the stores of the "
            "other ranks can be opened one by one"
        )
    return [found[ranks[rank]] for rank in range(world)]


def _rank_and_world(store: Path, meta: Mapping[str, Any]) -> tuple[int, int]:
    """Return which rank of how many a store says it is.

    Raises:
        ShardMismatch: If it says nothing, or something else than its name.
    """
    match meta:
        case {"recorder": {"ranks": {"rank": int(rank), "world": int(world)}}}:
            pass
        case _:
            rank = world = -1
    if not 0 <= rank < world:
        raise ShardMismatch(
            f"{store} does not say which rank of how many it is, so that it was not "
            "recorded with ranks='shards'; open it on its own, or move it away"
        )
    if store.name.removesuffix(".h5") != f"rank-{rank}":
        raise ShardMismatch(
            f"{store} was recorded by rank {rank}; give it the name rank-{rank} back"
        )
    return rank, world
