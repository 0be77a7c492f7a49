"""What every fault test records, and how a store is held to what was acknowledged."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from repscope import store
from repscope.errors import StoreError
from repscope.snapshot import Snapshot
from repscope.store import compact, segment, writer

WIDTH = 128  # float32 in each of two layers: 1 KiB a row
KEYS = (("outputs", "hidden1"), ("outputs", "hidden2"), ("weights", "head"))
_ticks = itertools.count(10**18, 10**6)


def sizes(short: int, long: int) -> pytest.MarkDecorator:
    """Parametrize ``n``: a few in ``make test``, many in ``make test-faults``."""
    both = [
        pytest.param(short, id="short"),
        pytest.param(long, id="long", marks=pytest.mark.faults),
    ]
    return pytest.mark.parametrize("n", both)


# -- what is recorded --------------------------------------------------------
def rows(step: int) -> int:
    """Return the rows of a step: they differ, as a last batch does."""
    return 1 + step * 7 % 5


def owed(steps: int) -> int:
    """Return the rows of steps 0 to ``steps - 1``."""
    return sum(map(rows, range(steps)))


def snapshot(step: int) -> Snapshot:
    """Return the snapshot of a step, the same in every process."""
    draw = np.random.Generator(np.random.SFC64(step))
    values = torch.from_numpy(
        draw.integers(0, 2**32, (rows(step), 2 * WIDTH), np.uint32)
    ).view(torch.float32)
    first, second = values[:, :WIDTH].contiguous(), values[:, WIDTH:].contiguous()
    weights = torch.full((4, 8), float(step), dtype=torch.bfloat16)
    return Snapshot(
        step,
        dict(zip(KEYS, (first, second, weights), strict=True)),
        labels=torch.arange(rows(step)) + step,
        scalars={"loss": 1 / (1 + step)},
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors are equal bit for bit."""
    if a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


def small_segments(rng: random.Random) -> None:
    """Let commits differ: some segments or one, many chunks or one, merged or not."""
    writer.SEGMENT_BYTES = rng.choice([2**14, 2**16, 2**20])
    segment.CHUNK_BYTES = rng.choice([2**11, 2**14])
    compact.FAN = rng.choice([3, 16])


class Acks:
    """Tells what is acknowledged, as a number of steps, once it has grown.

    Args:
        recording: The writer of steps 0, 1, 2, ...
        fd: Where to tell it.
    """

    def __init__(self, recording: store.Writer, fd: int) -> None:
        self._writer, self._fd, self._told = recording, fd, -1
        self._total = 0
        self._taken = 0

    def go_on(self, recording: store.Writer) -> None:
        """Take another writer of the same store, which has all that was appended."""
        self._writer = recording

    def append(self) -> None:
        """Append the next step."""
        step, self._taken = self._taken, self._taken + 1
        self._total += rows(step)
        self._writer.append(snapshot(step))

    def tell(self) -> None:
        """Report the steps whose rows the writer calls durable."""
        durable = {self._writer.acked_rows(*key) for key in KEYS[:2]}
        if durable <= {self._total} and self._taken > self._told:
            self._told = self._taken
            os.write(self._fd, struct.pack("<q", self._taken))


# -- what is left of it ------------------------------------------------------
class Seen(NamedTuple):
    """What a store shows, against what it should."""

    opens: bool
    steps: int = 0
    lost: int = 0  # acknowledged rows that cannot be read
    wrong: int = 0  # rows read that differ from what was recorded
    torn: int = 0  # steps of which a stream is missing


def examine(path: Path, acked: int) -> Seen:
    """Read everything in a store as any user would.

    Args:
        path: The store.
        acked: Steps 0 to ``acked - 1`` were acknowledged.

    Returns:
        What is missing or wrong; rows are counted once for each step.
    """
    try:
        run = store.open(path)
    except StoreError:
        return Seen(opens=False, lost=owed(acked))
    good = wrong = torn = 0
    for step in run.steps:
        want = snapshot(step)
        try:
            verdict = [same(run.read(k[1], step, target=k[0]), want.streams[k])
                       for k in KEYS]  # fmt: skip
            verdict.append(same(run.labels(step), want.labels))
        except StoreError:
            continue
        except KeyError:
            torn += 1
            continue
        wrong += 0 if all(verdict) else rows(step)
        good += rows(step) if all(verdict) and step < acked else 0
    if run.steps != list(range(len(run.steps))):
        torn += 1
    return Seen(True, len(run.steps), owed(acked) - good, wrong, torn)


def recovered(path: Path, acked: int) -> list[Seen]:
    """Go on with a store after a crash: recover it, and then record one more step.

    Args:
        path: The store; it is changed.
        acked: Steps 0 to ``acked - 1`` must be there.

    Returns:
        What it shows after either.
    """
    try:
        store.reopen(path).abort()
        rest(path)
        first = examine(path, acked)
        with contextlib.closing(store.reopen(path)) as writer:
            writer.append(snapshot(first.steps))
    except StoreError:
        return [Seen(opens=False, lost=owed(acked))]
    rest(path)
    return [first, examine(path, max(acked, first.steps + 1))]


def frames_behind(manifest: Path) -> bool:
    """Return whether a whole frame follows one that is not: no crash does that."""
    data, whole = manifest.read_bytes(), []
    for at in (found.start() for found in re.finditer(b"RSF1", data)):
        end = at + 16 + int.from_bytes(data[at + 12 : at + 16], "little")
        crc = int.from_bytes(data[end : end + 4], "little")
        if end + 4 <= len(data) and crc == zlib.crc32(data[at:end]):
            whole.append((at, end + 4))
    return any(a[1] != b[0] for a, b in zip([(0, 0), *whole], whole, strict=False))


def tally(many: Iterable[Seen]) -> dict[str, int]:
    """Return what is wrong with all of them, added up; 0 everywhere is the promise."""
    every = list(many)
    return {
        "do_not_open": sum(not seen.opens for seen in every),
        "acked_rows_lost": sum(seen.lost for seen in every),
        "rows_wrong": sum(seen.wrong for seen in every),
        "steps_torn": sum(seen.torn for seen in every),
    }


def age(file: Path) -> None:
    """Give a file a time of its own, as the clock does between faults in life."""
    now = next(_ticks)
    os.utime(file, ns=(now, now))


def rest(path: Path) -> None:
    """Give every file of a run times of their own, wherever it is by now."""
    for each in path.parent.rglob("*"):
        age(each)


# -- processes ---------------------------------------------------------------
@contextlib.contextmanager
def forked(work: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """Run a function in a forked child; what still lives at the end is killed.

    The child has torch imported already, so a thousand of them are cheap.
    """
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    with warnings.catch_warnings():
        # Python >= 3.12 warns about forking with threads; the children use none
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()
