"""Random damage to the bytes of a store: true numbers, or an error; never others.

Two kinds. *Damage* is what disks and copies do: bytes flipped, zeroed, cut, swapped,
appended. *Forgery* changes the text of a frame and gives it a fitting checksum: such a
store may say anything, but must not crash the reader or make it hang.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import shutil
import struct
import warnings
import zlib
from functools import partial
from pathlib import Path

import pandas as pd  # noqa: F401 - imported before the forks, for scalars()
import pytest
import torch
from faults.workload import (
    KEYS,
    age,
    forked,
    frames_behind,
    same,
    sizes,
    small_segments,
    snapshot,
)
from torch import Tensor

from repscope import store
from repscope.errors import RepScopeError, StoreError

STEPS = 24
BATCH = 100  # stores a child
SECONDS = 120.0  # for a child to read them all; one takes some 10 ms
TAIL = "tail missing"
MEMORY = 4 * 2**30


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A closed store of eight commits, some of several segments and chunks."""
    small_segments(random.Random(0))
    path = tmp_path_factory.mktemp("sound") / "run"
    writer = store.create(path, meta={"seed": 0})
    for step in range(STEPS):
        writer.append(snapshot(step))
        if step % 3 == 2:
            writer.commit()
    writer.close()
    return path


# -- damage ------------------------------------------------------------------
def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([1, 64, 512, 4096]))
    data[start:stop] = bytes(stop - start)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def swap(data: bytearray, rng: random.Random) -> None:
    size = rng.choice([1, 64, 512])
    a, b = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    first, second = data[a : a + size], data[b : b + size]
    data[a : a + len(second)], data[b : b + len(first)] = second, first


def extend(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice([1, 20, 4096]))


DAMAGE = (flip, zero, cut, swap, extend)


def forge(data: bytearray, rng: random.Random) -> None:
    """Change the text of one frame and make its checksum fit."""
    starts, at = [], 0
    while at < len(data):
        starts.append(at)
        at += 20 + struct.unpack_from("<I", data, at + 12)[0]
    start = rng.choice(starts)
    end = start + 16 + struct.unpack_from("<I", data, start + 12)[0]
    for _ in range(rng.choice([1, 1, 3])):
        spot = rng.randrange(start + 16, end)
        data[spot] = rng.choice([*b'0123456789,:[]{}"-e', rng.randrange(256)])
    struct.pack_into("<I", data, end, zlib.crc32(data[start:end]))


def damaged(sound: Path, path: Path, rng: random.Random, kind: str) -> str:
    """Make a copy of a store with one damaged file; return the name of the file."""
    shutil.copytree(sound, path)
    files = sorted((path / "segments").iterdir())
    manifest, named = path / "MANIFEST", path / "FORMAT"
    share = rng.random()
    file = rng.choice(files) if share < 0.65 else manifest if share < 0.97 else named
    if kind == "forge":
        file = manifest
    data = bytearray(file.read_bytes())
    {each.__name__: each for each in (*DAMAGE, forge)}[kind](data, rng)
    file.write_bytes(data)
    for each in path.rglob("*"):
        age(each)
    return "segment" if file in files else file.name


# -- reading -----------------------------------------------------------------
def read_all(path: Path) -> str:
    """Read everything; return the worst that was found."""
    try:
        run = store.open(path)
        steps = run.steps
    except StoreError:
        return "refused"
    if not set(steps) <= set(range(STEPS)):
        return "wrong"
    verdicts = {held(read, want) for read, want in reads(run, steps)}
    for worst in ("wrong", "refused"):
        if worst in verdicts:
            return worst
    if steps == list(range(STEPS)):
        return "equal"
    return "unnoticed" if frames_behind(path / "MANIFEST") else TAIL


def reads(run: store.Run, steps: list[int]):
    """Yield every read of a run, and what it should return."""
    for step in steps:
        want = snapshot(step)
        for key in KEYS:
            yield partial(run.read, key[1], step, target=key[0]), want.streams[key]
        yield partial(run.labels, step), want.labels
    if steps:
        loss = [snapshot(step).scalars["loss"] for step in steps]
        yield (
            lambda: torch.tensor(run.scalars()["loss"].to_numpy()),
            torch.tensor(loss, dtype=torch.float64),
        )


def held(read, want: Tensor) -> str:
    try:
        return "equal" if same(read(), want) else "wrong"
    except RepScopeError:
        return "refused"


def read_batch(sound: Path, folder: Path, numbers: range, kind: str, out: Path) -> None:
    """Damage and read stores; write one line for each, as soon as it is done."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    with out.open("a", buffering=1) as lines:
        for number in numbers:
            rng = random.Random(f"{kind} {number}")
            how = rng.choice(DAMAGE).__name__ if kind == "damage" else kind
            path = folder / str(number)
            where = damaged(sound, path, rng, how)
            try:
                verdict = read_all(path)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                verdict = f"unnamed {type(error).__name__}"
            lines.write(json.dumps([number, how, where, verdict]) + "\n")
            shutil.rmtree(path)
    os._exit(0)


def read_all_of(sound: Path, folder: Path, n: int, kind: str) -> list[tuple[str, ...]]:
    """Return damage, file and verdict of ``n`` stores; children do the reading."""
    out, done = folder / "verdicts", []
    while len(done) < n:
        numbers = range(len(done), min(n, len(done) + BATCH))
        out.unlink(missing_ok=True)
        out.touch()
        with forked(read_batch, sound, folder, numbers, kind, out) as child:
            child.join(SECONDS)
            fate = "hang" if child.is_alive() else f"died {child.exitcode}"
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        done += [tuple(line[1:]) for line in lines]
        if len(lines) < len(numbers):  # the next store took the child with it
            done.append((kind, "?", fate))
    return done


def count(verdicts: list[tuple[str, ...]]) -> collections.Counter[str]:
    return collections.Counter(verdict for *_, verdict in verdicts)


@sizes(short=60, long=4000)
def test_damage_is_never_read_as_data(n, sound, tmp_path, figures):
    verdicts = read_all_of(sound, tmp_path, n, "damage")
    for where in ("segment", "MANIFEST", "FORMAT"):
        found = count([each for each in verdicts if each[1] == where])
        figures(f"damage to a {where}", stores=found.total(), wrong=found["wrong"],
                **dict(found.most_common()))  # fmt: skip
    found = count(verdicts)
    assert found.total() == n
    assert set(found) <= {"equal", "refused", TAIL}
    assert found["refused"] > n / 4
    assert {where for _, where, v in verdicts if v == TAIL} <= {"MANIFEST"}


@sizes(short=40, long=2000)
def test_a_forged_manifest_neither_crashes_nor_hangs(n, sound, tmp_path, figures):
    found = count(read_all_of(sound, tmp_path, n, "forge"))
    figures("forged frames", stores=n, **dict(found.most_common()))
    assert found.total() == n
    fatal = [verdict for verdict in found if verdict.startswith(("died", "hang"))]
    assert not fatal
