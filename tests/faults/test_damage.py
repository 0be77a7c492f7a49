"""Random damage to the bytes of a store: true numbers, or an error; never others.

Two kinds. *Damage* is what disks and copies do: bytes flipped, zeroed, cut, swapped,
appended. *Forgery* changes a frame, or a structure of an HDF5 file, and gives it a
fitting checksum: such a store may say anything, but must not crash the reader or make
it hang, and what it raises has a name.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import random
import resource
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd  # noqa: F401 - imported before the forks, for scalars()
import pytest
import torch
from faults import hdf5
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
from repscope.store import compact, packing, segment
from repscope.store import writer as writing

STEPS = 24
BATCH = 100  # stores a child
SECONDS = 60.0  # for one store, which takes some 10 ms
TAIL = "tail missing"
MEMORY = 4 * 2**30


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A closed store of eight commits, some of several segments and chunks."""
    small_segments(random.Random(0))
    compact.FAN = 16
    path = tmp_path_factory.mktemp("sound") / "run"
    writer = store.create(path, meta={"seed": 0})
    for step in range(STEPS):
        writer.append(snapshot(step))
        if step % 3 == 2:
            writer.commit()
    writer.close()
    return path


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A closed store whose batches were merged, and half of them once more."""
    compact.FAN, writing.SEGMENT_BYTES, segment.CHUNK_BYTES = 3, 2**20, 2**12
    path = tmp_path_factory.mktemp("merged") / "run"
    writer = store.create(path, meta={"seed": 1})
    for step in range(STEPS):
        writer.append(snapshot(step))
        writer.annotate(noted=step)
        writer.commit()
    writer.close()
    return path


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A store whose writer died: its last steps are in a log only."""
    compact.FAN, writing.SEGMENT_BYTES = 16, 2**20
    path = tmp_path_factory.mktemp("logged") / "run"
    writer = store.create(path, meta={"seed": 2}, durability="append")
    for step in range(STEPS):
        writer.append(snapshot(step))
        if step in {5, 9, 17}:
            writer.commit()
    writer.abort()
    return path


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
    """A closed store in which some steps are hidden, and others recorded again."""
    compact.FAN, writing.SEGMENT_BYTES = 16, 2**20
    path = tmp_path_factory.mktemp("rewound") / "run"
    writer = store.create(path, meta={"seed": 3})
    for step in range(STEPS + 6):
        writer.append(snapshot(step))
        if step % 4 == 3:
            writer.commit()
    writer.close()
    writer = store.reopen(path, at=15)
    for step in range(16, STEPS):
        writer.append(snapshot(step))
        if step % 3 == 2:
            writer.commit()
    writer.close()
    return path


class Packed(NamedTuple):
    """A packed store, and what there is to be changed in it."""

    name: str
    data: bytes
    frames: tuple[int, int]
    marks: list[int]
    sealed: list[tuple[int, int]]


@pytest.fixture(scope="module")
def packs(sound, tmp_path_factory):
    """The same run in one file: of every compression and layout, in many chunks."""
    packing.CHUNK_BYTES = 2**12
    kinds = ["none", "gzip"]
    if importlib.util.find_spec("hdf5plugin"):
        kinds.append("zstd")
    made = []
    for compression in kinds:
        for layout in packing.LAYOUTS:
            out = tmp_path_factory.mktemp("packed") / "run.h5"
            store.pack(sound, out, compression=compression, layout=layout)
            data = out.read_bytes()
            at = data.index(b"RSF1")
            places = at, at + sum(map(len, frames(data[at:])))
            made.append(
                Packed(f"{compression} {layout}", data, places, hdf5.marks(data),
                       hdf5.sealed(data))
            )  # fmt: skip
    return made


# -- damage ------------------------------------------------------------------
# Each changes bytes in place; at() chooses where.
def flip(data: bytearray, rng: random.Random, at: Callable[[], int]) -> None:
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[at()] ^= 1 << rng.randrange(8)


def zero(data: bytearray, rng: random.Random, at: Callable[[], int]) -> None:
    start = at()
    stop = min(len(data), start + rng.choice([1, 64, 512, 4096]))
    data[start:stop] = bytes(stop - start)


def cut(data: bytearray, rng: random.Random, at: Callable[[], int]) -> None:
    del data[at() :]


def swap(data: bytearray, rng: random.Random, at: Callable[[], int]) -> None:
    size = rng.choice([1, 64, 512])
    a, b = (min(at(), max(0, len(data) - size)) for _ in range(2))
    first, second = data[a : a + size], data[b : b + size]
    data[a : a + len(second)], data[b : b + len(first)] = second, first


def extend(data: bytearray, rng: random.Random, at: Callable[[], int]) -> None:
    data += rng.randbytes(rng.choice([1, 20, 4096]))


DAMAGE = (flip, zero, cut, swap, extend)


def anywhere(data: bytearray, rng: random.Random) -> Callable[[], int]:
    return lambda: rng.randrange(len(data))


def at_structure(
    data: bytearray, rng: random.Random, pack: Packed
) -> Callable[[], int]:
    """Return a chooser of places, half of them where HDF5 has no data but structure."""

    def at() -> int:
        where = rng.random()
        if where < 0.5:
            return rng.randrange(len(data))
        if where < 0.6:
            return rng.randrange(4096)
        if where < 0.75:
            return len(pack.data) - 1 - rng.randrange(8192)
        return min(rng.choice(pack.marks) + rng.randrange(64), len(pack.data) - 1)

    return at


# -- forgery -----------------------------------------------------------------
HOSTILE = (
    -1, 0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62 - 1, 2**62, 2**63,
    2**64, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "a", "../x",
    "float64", "bfloat16", None, True, False, [], {}, [0], [[0, 1, 0]], [[0, 2**40, 0]],
)  # fmt: skip


def frames(data: bytes) -> list[bytes]:
    """Return the frames that a manifest begins with."""
    found, at = [], 0
    while data[at : at + 4] == b"RSF1":
        end = at + 20 + struct.unpack_from("<I", data, at + 12)[0]
        found.append(data[at:end])
        at = end
    return found


def forge(data: bytes, rng: random.Random, *, longer: bool) -> bytes:
    """Change one frame of a manifest and make its checksum fit.

    Args:
        data: The manifest.
        rng: Chooses what is changed.
        longer: The result may have another length.
    """
    every = frames(data)
    i = rng.randrange(len(every))
    text = every[i][16:-4]
    while True:
        new = retyped(text, rng) if rng.random() < 0.5 else replaced(text, rng)
        if longer or len(new) <= len(text):
            break
    if not longer:
        new = new.ljust(len(text))
    head = every[i][:12] + struct.pack("<I", len(new)) + new
    every[i] = head + struct.pack("<I", zlib.crc32(head))
    return b"".join(every)


def retyped(text: bytes, rng: random.Random) -> bytes:
    """Change characters."""
    new = bytearray(text)
    for _ in range(rng.choice([1, 1, 3])):
        new[rng.randrange(len(new))] = rng.choice(
            [*b'0123456789,:[]{}"-e', rng.randrange(256)]
        )
    return bytes(new)


def replaced(text: bytes, rng: random.Random) -> bytes:
    """Put another value in the place of one, or leave it out."""
    body = json.loads(text)
    owner, key = rng.choice(list(places(body)))
    if rng.random() < 0.15:
        del owner[key]
    else:
        owner[key] = rng.choice(HOSTILE)
    return json.dumps(body, separators=(",", ":")).encode()


def places(value: object) -> Iterator[tuple[object, object]]:
    """Yield every place of a value inside others, with what it is in."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def reseal(data: bytearray, rng: random.Random, pack: Packed) -> None:
    """Change structures of an HDF5 file and make their checksums fit."""
    for start, end in rng.choices(pack.sealed, k=rng.choice([1, 1, 2])):
        for _ in range(rng.choice([1, 1, 2, 4])):
            size = rng.choice([1, 1, 1, 2, 4, 8])
            spot = rng.randrange(start + 4, max(start + 5, end - size))
            worst = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)])
            some = worst.to_bytes(8, "little")[:size] if size > 1 else rng.randbytes(1)
            data[spot : spot + size] = some
        hdf5.seal(data, start, end)


# -- stores to read ----------------------------------------------------------
# Each makes a store at a path and returns what was done, and to what.
Made = tuple[str, str]


def damaged(sound: Path, path: Path, rng: random.Random, *, forging: bool) -> Made:
    """Make a copy of a store with one damaged file."""
    shutil.copytree(sound, path)
    files = sorted((path / "segments").iterdir())
    manifest, named = path / "MANIFEST", path / "FORMAT"
    share = rng.random()
    file = rng.choice(files) if share < 0.65 else manifest if share < 0.97 else named
    if forging:
        manifest.write_bytes(forge(manifest.read_bytes(), rng, longer=True))
        how, file = "forge", manifest
    else:
        how = damage(file, rng)
    for each in path.rglob("*"):
        age(each)
    return how, "segment" if file in files else file.name


def damage(file: Path, rng: random.Random) -> str:
    data, how = bytearray(file.read_bytes()), rng.choice(DAMAGE)
    how(data, rng, anywhere(data, rng))
    file.write_bytes(data)
    return how.__name__


def damaged_pack(packs: list[Packed], path: Path, rng: random.Random) -> Made:
    """Make a packed file with damage in its structures and its data."""
    pack = rng.choice(packs)
    data, how = bytearray(pack.data), rng.choice(DAMAGE)
    how(data, rng, at_structure(data, rng, pack))
    path.write_bytes(data)
    age(path)
    return how.__name__, pack.name


def forged_pack(packs: list[Packed], path: Path, rng: random.Random) -> Made:
    """Make a packed file that is damaged or forged."""
    how = rng.choice(["damage", "reseal", "reseal", "forge"])
    if how == "damage":
        return damaged_pack(packs, path, rng)
    pack = rng.choice(packs)
    data = bytearray(pack.data)
    if how == "reseal":
        reseal(data, rng, pack)
    else:
        start, stop = pack.frames
        data[start:stop] = forge(bytes(data[start:stop]), rng, longer=False)
    path.write_bytes(data)
    age(path)
    return how, pack.name


def damaged_files(stores: list[Path], path: Path, rng: random.Random) -> Made:
    """Make a copy of a store in which MANIFEST, or any files, are damaged or gone."""
    shutil.copytree(rng.choice(stores), path)
    manifest = path / "MANIFEST"
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "LOCK" and file.stat().st_size
    ]
    many = [manifest] * rng.choice([1, 1, 2])
    if rng.random() < 0.5:
        many = rng.choices([*files, manifest], k=rng.choice([1, 1, 2, 3]))
    done = []
    for file in many:
        if not file.exists() or not file.stat().st_size:
            continue
        if rng.random() < 0.1:
            file.unlink()
            done.append("unlink")
        else:
            done.append(damage(file, rng))
    for each in path.rglob("*"):
        age(each)
    names = {f.name if f.parent == path else f.parent.name for f in many}
    return " ".join(done), " ".join(sorted(names))


# -- reading -----------------------------------------------------------------
def read_all(path: Path, *, trust: str = "default", only: int = STEPS) -> str:
    """Read everything, or some steps; return the worst that was found."""
    try:
        run = store.open(path, trust=trust)
        steps = run.steps
    except RepScopeError:
        return "refused"
    if not set(steps) <= set(range(STEPS)):
        return "wrong"
    read = steps if only >= len(steps) else [steps[i * 7] for i in range(only)]
    verdicts = {held(read, want) for read, want in reads(run, read)}
    for worst in ("wrong", "refused"):
        if worst in verdicts:
            return worst
    if steps == list(range(STEPS)):
        return "equal"
    if not path.is_dir():
        return "steps missing"
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
        yield partial(losses, run, steps), torch.tensor(loss, dtype=torch.float64)


def losses(run: store.Run, steps: list[int]) -> Tensor:
    table = run.scalars()
    found = table["loss"].reindex(steps).to_numpy() if "loss" in table else []
    return torch.tensor(found, dtype=torch.float64)


def held(read, want: Tensor) -> str:
    try:
        return "equal" if same(read(), want) else "wrong"
    except RepScopeError:
        return "refused"


def repair_and_read(path: Path) -> str:
    try:
        store.repair(path)
    except StoreError:
        return "not repaired"
    try:
        store.open(path)
    except StoreError:
        return "repaired, but does not open"
    for each in path.rglob("*"):
        age(each)
    return read_all(path)


class Trial(NamedTuple):
    """One store: its number, what was done to what, and what reading it showed."""

    number: int
    how: str
    where: str
    verdict: str


def read_batch(make, judge, folder: Path, numbers: range, out: Path) -> None:
    """Make and read stores; write one line for each, as soon as it is done."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    with out.open("a", buffering=1) as lines:
        for number in numbers:
            path = folder / str(number) / "run"
            path.parent.mkdir()
            how, where = make(path, random.Random(number))
            try:
                verdict = judge(path)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                verdict = f"unnamed {type(error).__name__}"
            lines.write(json.dumps([number, how, where, verdict]) + "\n")
            shutil.rmtree(path.parent)
    os._exit(0)


def read_all_of(make, judge, folder: Path, n: int) -> list[Trial]:
    """Return what became of ``n`` stores; children make and read them."""
    out, done = folder / "verdicts", []
    while len(done) < n:
        numbers = range(len(done), min(n, len(done) + BATCH))
        out.unlink(missing_ok=True)
        out.touch()
        with forked(read_batch, make, judge, folder, numbers, out) as child:
            wait_for(child, out)
            fate = "hang" if child.is_alive() else f"died {child.exitcode}"
        lines = [Trial(*json.loads(line)) for line in out.read_text().splitlines()]
        done += lines
        if len(lines) < len(numbers):  # the next store took the child with it
            done.append(Trial(len(done), "?", "?", fate))
    return done


def wait_for(child, out: Path) -> None:
    """Wait until a child ends, or has not written for too long."""
    size, since = 0, time.monotonic()
    while child.is_alive() and time.monotonic() - since < SECONDS:
        child.join(0.5)
        if (now := out.stat().st_size) != size:
            size, since = now, time.monotonic()


def count(trials: list[Trial]) -> collections.Counter[str]:
    return collections.Counter(trial.verdict for trial in trials)


def fatal(trials: list[Trial]) -> list[Trial]:
    """Return what must not be: crashes, hangs, and errors that are none of ours."""
    bad = ("died", "hang", "unnamed", "repaired, but")
    return [trial for trial in trials if trial.verdict.startswith(bad)]


@sizes(short=30, long=4000)
def test_damage_is_never_read_as_data(n, sound, tmp_path, figures):
    trials = read_all_of(partial(damaged, sound, forging=False), read_all, tmp_path, n)
    for where in ("segment", "MANIFEST", "FORMAT"):
        found = count([each for each in trials if each.where == where])
        figures(f"damage to a {where}", stores=found.total(), wrong=found["wrong"],
                **dict(found.most_common()))  # fmt: skip
    found = count(trials)
    assert found.total() == n
    assert not fatal(trials)
    assert set(found) <= {"equal", "refused", TAIL}
    assert found["refused"] > n / 4
    assert {each.where for each in trials if each.verdict == TAIL} <= {"MANIFEST"}


@sizes(short=20, long=2000)
def test_damage_to_a_packed_store_is_never_read_as_data(n, packs, tmp_path, figures):
    trials = read_all_of(partial(damaged_pack, packs), read_all, tmp_path, n)
    for name in (pack.name for pack in packs):
        found = count([each for each in trials if each.where == name])
        figures(f"damage to a packed store, {name}", stores=found.total(),
                wrong=found["wrong"], **dict(found.most_common()))  # fmt: skip
    found = count(trials)
    assert found.total() == n
    assert not fatal(trials)
    assert set(found) <= {"equal", "refused"}
    assert found["refused"] > n / 4


# -- neither crashes nor hangs -----------------------------------------------
CAREFULLY = partial(read_all, trust="untrusted", only=3)


@sizes(short=40, long=2000)
def test_a_forged_manifest_neither_crashes_nor_hangs(n, sound, tmp_path, figures):
    trials = read_all_of(partial(damaged, sound, forging=True), read_all, tmp_path, n)
    figures("forged frames", stores=n, **dict(count(trials).most_common()))
    assert len(trials) == n
    assert not fatal(trials)


@sizes(short=20, long=5000)
def test_a_mutated_file_neither_crashes_nor_hangs(n, packs, tmp_path, figures):
    trials = read_all_of(partial(forged_pack, packs), read_all, tmp_path, n)
    for kind in sorted({trial.how for trial in trials}):
        found = count([trial for trial in trials if trial.how == kind])
        figures(f"mutated packed files, {kind}", files=found.total(),
                **dict(found.most_common()))  # fmt: skip
    assert len(trials) == n
    assert not fatal(trials)


@pytest.mark.parametrize("kind", ["packed", "segments", "frames"])
@sizes(short=2, long=200)
def test_nor_does_one_that_is_not_trusted(n, kind, sound, packs, tmp_path, figures):
    make = {
        "packed": partial(forged_pack, packs),
        "segments": partial(damaged, sound, forging=False),
        "frames": partial(damaged, sound, forging=True),
    }[kind]
    trials = read_all_of(make, CAREFULLY, tmp_path, n)
    figures(f"untrusted, {kind}", stores=n, **dict(count(trials).most_common()))
    assert len(trials) == n
    assert not fatal(trials)
    if kind == "segments":
        assert "wrong" not in count(trials)


# -- repair ------------------------------------------------------------------
@sizes(short=16, long=1200)
def test_repair(n, sound, merged, logged, rewound, tmp_path, figures):
    stores = [sound, merged, logged, rewound]
    trials = read_all_of(partial(damaged_files, stores), repair_and_read, tmp_path, n)
    only = [trial for trial in trials if trial.where == "MANIFEST"]
    for what, some in (
        ("MANIFEST alone", only),
        ("any file", [trial for trial in trials if trial not in only]),
    ):
        figures(f"repair of {what}", stores=len(some), wrong=count(some)["wrong"],
                **dict(count(some).most_common()))  # fmt: skip
    assert len(trials) == n
    assert not fatal(trials)
    assert not [trial for trial in trials if trial.verdict == "wrong"]
    assert not [trial for trial in only if trial.verdict != "equal"]


def test_a_log_is_kept_when_the_frame_before_it_is_damaged(tmp_path):
    """The frame names no segment, so nothing else tells that it was there."""
    path = tmp_path / "run"
    writer = store.create(path, meta={}, durability="append")
    writer.append(snapshot(0))
    writer.commit()
    writer.annotate(noted=0)
    writer.commit()
    writer.append(snapshot(1))
    writer.abort()
    manifest = path / "MANIFEST"
    data = bytearray(manifest.read_bytes())
    data[-1] ^= 1
    manifest.write_bytes(data)
    store.repair(path)
    assert store.open(path).steps == [0, 1]


# -- the tests themselves ----------------------------------------------------
def test_the_structures_of_a_packed_file_are_found(packs):
    """Mutations that only miss a checksum would prove little."""
    for pack in packs:
        kinds = {pack.data[start : start + 4] for start, _ in pack.sealed}
        assert {b"\x89HDF", b"OHDR"} <= kinds
        assert len(pack.sealed) > 8
    assert {b"FAHD", b"FADB"} <= {
        pack.data[start : start + 4] for pack in packs for start, _ in pack.sealed
    }
