"""Files made to do harm: refused by name, before anything of them is followed."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from h5py import h5a, h5d, h5g, h5p, h5s, h5t, h5z

from repscope import store
from repscope.errors import (
    CorruptSegment,
    NotAStore,
    StoreError,
    UntrustedStore,
    UsageError,
)
from repscope.snapshot import Snapshot
from repscope.store import catalog, contents, guard, manifest, walker

TRUSTS = ("default", "untrusted")
LIBVER = ("v110", "v110")  # as stores have; large attributes need it
ROWS, WIDTH = 4, 6
SECRET = b"my secret key" * 400


@pytest.fixture(scope="module")
def child():
    """One child for most files: it walks many of a directory in one life, too."""
    with guard.Guard() as one:
        yield one


@pytest.fixture
def shared(child, monkeypatch):
    monkeypatch.setattr(contents, "Guard", lambda: contextlib.nullcontext(child))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sound store as a directory and packed in two ways; tests change copies."""
    folder = tmp_path_factory.mktemp("made")
    w = store.create(folder / "run", meta={"seed": 1})
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        streams = {
            ("outputs", name): torch.randn(ROWS, WIDTH, generator=g)
            for name in ("a", "b")
        }
        streams["weights", "w"] = torch.randn(2, 3, generator=g)
        labels = torch.arange(ROWS)
        w.append(Snapshot(step, streams, labels=labels, scalars={"loss": 0.5}))
    w.close()
    store.pack(folder / "run", folder / "none.h5")
    store.pack(folder / "run", folder / "gzip.h5", compression="gzip")
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def packed(made, tmp_path):
    return Path(shutil.copy(made / "none.h5", tmp_path / "none.h5"))


class StuckError(BaseException):
    """No ``except OSError`` takes it for a fault of the file."""


@contextlib.contextmanager
def promptly(seconds):
    """Interrupt what waits for ever."""

    def stop(*_):
        raise StuckError(f"took over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(path, trust, kinds=(UntrustedStore, NotAStore, CorruptSegment)):
    """Return the words with which a store is refused; they cannot drive a terminal."""
    with promptly(10), pytest.raises(StoreError) as caught:
        store.open(path, trust=trust)
    assert isinstance(caught.value, kinds), caught.value
    assert str(caught.value).isprintable()
    return str(caught.value)


def same(a, b):
    assert (a.streams, a.steps, a.meta) == (b.streams, b.steps, b.meta)
    for target, layer in b.streams:
        one, other = (run.series(layer, target=target) for run in (a, b))
        assert one.dtype == other.dtype
        assert one.equal(other)
    assert a.scalars().equals(b.scalars())


# -- HDF5 ----------------------------------------------------------------------
def low(group, name, shape, chunk=None, filters=(), kind=h5t.NATIVE_FLOAT):
    """Make a dataset that h5py's own functions would not make."""
    plan = h5p.create(h5p.DATASET_CREATE)
    if chunk:
        plan.set_chunk(chunk)
    for number in filters:
        plan.set_filter(number, h5z.FLAG_OPTIONAL, ())
    space = h5s.create_simple(shape)
    return h5d.create(group.id, name.encode(), kind, space, plan)


def external(group, name, folder):
    (folder / "secret").write_bytes(SECRET)
    group.create_dataset(
        name, (100,), "u1", external=[(str(folder / "secret"), 0, 100)]
    )


def virtual(group, name, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros(4)
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (4,))
    group.create_virtual_dataset(name, layout)


def link(make):
    def build(group, name, folder):
        group[name] = make(name, folder)

    return build


def loop(group, name, folder):
    group[name] = group["/"]


def twice(group, name, folder):
    group[name] = group.create_dataset(f"{name}2", data=[1.0])


def declares(shape, chunk=None, **more):
    return lambda group, name, folder: low(group, name, shape, chunk, **more)


def plugin(group, name, folder):
    dataset = low(group, name, (100,), (100,), filters=[40000])
    dataset.write_direct_chunk((0,), bytes(50))


def elements(make):
    def build(group, name, folder):
        kind, value = make(group)
        group.create_dataset(name, data=value, dtype=kind)

    return build


def raw_space(space):
    def build(group, name, folder):
        h5d.create(group.id, name.encode(), h5t.NATIVE_FLOAT, h5s.create(space))

    return build


def attribute(value, n=1):
    def build(group, name, folder):
        # On the group: there it is looked at before what is inside.
        for i in range(n):
            group.attrs[f"note{i}"] = value

    return build


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(group, name, folder):
    data = pickle.dumps(Harm(folder / "harm"))
    group.attrs["note"] = np.void(data)


def deep(group, name, folder):
    inside = h5g.create(group.id, name.encode())
    for _ in range(2000):
        inside = h5g.create(inside, b"g")


def many(group, name, folder):
    made = group.create_group(name).id
    for i in range(20_000):
        h5g.create(made, b"%d" % i)


def named(raw):
    return lambda group, name, folder: h5g.create(group.id, raw)


def compressed_names(number):
    def build(group, name, folder):
        """The names of large groups are in a heap, and heaps may have filters."""
        plan = h5p.create(h5p.GROUP_CREATE)
        as_dataset = h5p.PropDCID(plan.id)
        h5py.h5i.inc_ref(plan)
        as_dataset.set_filter(number, h5z.FLAG_MANDATORY, (3,))
        inside = h5g.create(group.id, name.encode(), gcpl=plan)
        for i in range(50):
            h5g.create(inside, b"some longer name %d" % i)

    return build


VLEN = h5py.vlen_dtype("f4")
TWO = np.dtype([("a", "f4"), ("b", "i4")])
INSIDE = "|a group where|a dataset where|should be"  # what a store says first
BUILDERS = {
    "external": (external, "data that is in other files"),
    "virtual": (virtual, "data that is in other files"),
    "external link": (
        link(lambda name, folder: h5py.ExternalLink(str(folder / "other.h5"), "/")),
        "a link to somewhere else",
    ),
    "soft link": (
        link(lambda name, folder: h5py.SoftLink("/b")),
        "a link to somewhere else",
    ),
    "soft loop": (
        link(lambda name, folder: h5py.SoftLink(name)),
        "a link to somewhere else",
    ),
    "hard loop": (loop, "an object with two names" + INSIDE),
    "two names": (twice, "an object with two names|more than"),
    "512 TiB chunked": (declares((2**47,), (2**20,)), r"\d{9} chunks"),
    "512 TiB contiguous": (declares((2**47,)), "562949953421312 bytes declared, 0"),
    "512 TiB in a plane": (declares((2**40, 128), (2**24, 1)), r"\d+ chunks"),
    "1 GiB chunk": (declares((2**28,), (2**28,)), "chunks of 1073741824 bytes"),
    "chunk above the cap": (
        declares((2**24 + 1,), (2**24 + 1,)),
        "chunks of 67108868 bytes",
    ),
    "a million chunks": (declares((10**6 + 1,), (1,)), "1000001 chunks"),
    "plugin filter": (plugin, "needs a plugin"),
    "szip": (declares((100,), (10,), filters=[4]), "needs a plugin"),
    "object reference": (
        elements(lambda group: (h5py.ref_dtype, [group.ref])),
        "no plain numbers",
    ),
    "region reference": (
        elements(lambda group: (h5py.regionref_dtype, np.zeros(0))),
        "no plain numbers",
    ),
    "vlen": (declares((5,), kind=h5t.py_create(VLEN)), "no plain numbers"),
    "vlen text": (elements(lambda _: (h5py.string_dtype(), ["x"])), "no plain numbers"),
    "fixed text": (elements(lambda _: ("S5", [b"x"])), "no plain numbers"),
    "compound": (elements(lambda _: (TWO, np.zeros(3, TWO))), "no plain numbers"),
    "opaque": (elements(lambda _: ("V9", np.zeros(3, "V9"))), "no plain numbers"),
    "arrays": (declares((3,), kind=h5t.py_create(np.dtype("(3,)f4"))), "no plain"),
    "long double": (elements(lambda _: ("g", np.zeros(3, "g"))), "no plain numbers"),
    "bit field": (declares((3,), kind=h5t.STD_B8LE), "no plain numbers"),
    "no space": (raw_space(h5s.NULL), "no simple array"),
    "scalar space": (raw_space(h5s.SCALAR), "no simple array"),
    "named type": (
        link(lambda name, folder: np.dtype("f4")),
        "neither a group nor a dataset",
    ),
    "5 MB attribute": (
        attribute(np.zeros(5_000_000, "u1")),
        "attribute of 5000000 bytes",
    ),
    "3,000 attributes": (attribute(1, 3000), "3000 attributes"),
    "vlen text attribute": (attribute("x"), "an attribute that is no number"),
    "vlen attribute": (
        lambda group, name, folder: h5a.create(
            group.id, b"note", h5t.py_create(VLEN), h5s.create(h5s.SCALAR)
        ),
        "an attribute that is no number",
    ),
    "reference attribute": (
        lambda group, name, folder: group.attrs.create("x", group.ref),
        "an attribute that is no number",
    ),
    "pickled attribute": (pickled, "an attribute that is no number"),
    "2,000 deep": (deep, "too deep" + INSIDE),
    "20,000 groups": (many, "more than" + INSIDE),
    "control byte": (named(b"a\x1b[2J\nb"), "a name that is none|more than|should"),
    "dots": (named(b".."), "a name that is none|more than|should"),
    "compressed names": (compressed_names(1), "names that are compressed" + INSIDE),
}


def test_the_table_itself(tmp_path, shared):
    """What h5py alone would give away, and that nothing wrong is with the rest."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        external(file, "x", tmp_path)
        assert bytes(file["x"][:13]) == SECRET[:13]
    with h5py.File(tmp_path / "plain.h5", "w", libver=LIBVER) as file:
        file["x"] = np.zeros((3, 4), "f4")
        file.create_dataset("g/y", data=np.zeros((3, 4)), chunks=(1, 2))
        file["g"].attrs["a"] = np.bytes_("some text")
        file["g"].attrs["b"] = [1.5, 2]
    for trust in TRUSTS:
        assert "no @manifest" in refusal(tmp_path / "plain.h5", trust, NotAStore)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_file_by_itself(tmp_path, name, shared):
    build, reason = BUILDERS[name]
    with h5py.File(tmp_path / "x.h5", "w", libver=LIBVER) as file:
        file["b"] = [1.0]
        build(file, "a", tmp_path)
    for trust in TRUSTS:
        text = refusal(tmp_path / "x.h5", trust, UntrustedStore)
        assert re.search(reason, text), text
        assert SECRET[:13].decode() not in text
    assert not (tmp_path / "harm").exists()


def put(path, build, folder):
    """Put something in the place of a dataset of a store."""
    with h5py.File(path, "r+", libver=LIBVER) as file:
        del file["outputs/a"]
        build(file["outputs"], "a", folder)


@pytest.mark.parametrize("name", BUILDERS)
def test_in_a_packed_store(packed, tmp_path, name, shared):
    build, reason = BUILDERS[name]
    put(packed, build, tmp_path)
    for trust in TRUSTS:
        text = refusal(packed, trust, UntrustedStore)
        assert re.search(reason, text), text
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", BUILDERS)
def test_in_a_segment(run, made, tmp_path, name, shared):
    """By default no segment meets HDF5; a stranger's is looked at."""
    build, reason = BUILDERS[name]
    segment = run / "segments" / "00000000.h5"
    put(segment, build, tmp_path)
    data = segment.read_bytes()
    retell(run, lambda frames: entry(frames).update(bytes=len(data)))
    text = refusal(run, "untrusted", UntrustedStore)
    assert re.search(reason, text), text
    # Where the old rows are still in their place they are read, or else an error.
    with contextlib.suppress(CorruptSegment):
        same(store.open(run), store.open(made / "run"))
    assert not (tmp_path / "harm").exists()


# -- manifests with a good checksum ----------------------------------------------
def retell(path, change):
    """Let a manifest say something else, in place where it has the same length."""
    file, text = path / "MANIFEST", b""
    if path.is_dir():
        text = file.read_bytes()
    else:
        with h5py.File(path) as opened:
            text = opened["@manifest"][:].tobytes()
    frames = list(manifest.decode(text))
    frames = change(frames) or frames
    told = b"".join(manifest.encode(i, frame) for i, frame in enumerate(frames))
    if path.is_dir():
        file.write_bytes(told)
    elif len(told) == len(text):
        data = path.read_bytes()
        assert data.count(text) == 1
        path.write_bytes(data.replace(text, told))
    else:
        with h5py.File(path, "r+", libver=LIBVER) as opened:
            del opened["@manifest"]
            opened["@manifest"] = np.frombuffer(told, np.uint8)


def entry(frames):
    return next(frame for frame in frames if frame.get("steps"))["segments"][0]


def part(frames, layer="a"):
    return next(each for each in entry(frames)["parts"] if each["layer"] == layer)


def says(**fields):
    return lambda frames: part(frames).update(fields)


def other_filter(frames):
    plain = part(frames)
    plain["chunks"][0].pop()
    del plain["filter"]


def stored(frames):
    part(frames)["chunks"][0][2] += 1


def again(**fields):
    def change(frames):
        entry(frames)["parts"].append({**copy.deepcopy(part(frames)), **fields})

    return change


N = 3 * ROWS
LIES = {
    "shape": ("none", says(shape=[N - 1, WIDTH]), r"shape \[12, 6\], \[11, 6\]"),
    "dtype": ("none", says(dtype="int32"), "elements float32, <i4"),
    "chunk": ("none", says(chunk_rows=N + 1), r"chunk \[12, 6\], \[13, 6\]"),
    "filter": ("gzip", says(filter="zstd"), r"filters \[2, 1\], \[2, 32015\]"),
    "no filter": ("gzip", other_filter, r"filters \[2, 1\], \[\]"),
    "stored bytes": ("gzip", stored, "bytes stored"),
    "another name": ("none", says(name="outputs/c"), "should not be there"),
    "a group's name": ("none", says(name="outputs"), "more than 1 objects"),
    "no name": ("none", says(name=""), "more than|should be there"),
    "one more": ("none", again(layer="c", name="outputs/c"), "3 should be there"),
    "one twice": ("none", again(layer="c"), "one dataset, of which"),
    "one less": (
        "none",
        lambda frames: entry(frames)["parts"].remove(part(frames)),
        "more than 1 objects",
    ),
    "a deep name": ("none", says(name="x/" * 40), "too deep"),
    "a deeper name": ("none", says(name="x/" * 10**6), "too deep"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_lies(made, tmp_path, name, shared):
    kind, change, reason = LIES[name]
    path = Path(shutil.copy(made / f"{kind}.h5", tmp_path))
    retell(path, change)
    for trust in TRUSTS:
        text = refusal(path, trust, UntrustedStore)
        assert re.search(reason, text), text
        assert len(text) < 1500


@pytest.mark.parametrize("name", ["shape", "dtype", "chunk", "one twice"])
def test_a_manifest_that_lies_about_a_segment(run, name, shared):
    _, change, reason = LIES[name]
    retell(run, change)
    text = refusal(run, "untrusted", UntrustedStore)
    assert re.search(reason, text), text


def batch(steps, parts=(), **more):
    segment = {"number": 0, "bytes": 1000, "parts": list(parts)}
    return {"steps": steps, "tags": [], "segments": [segment], **more}


def empty(layer, width, records):
    """Return a part without a row."""
    n = [[0, records, 0]]
    return {
        "target": "outputs", "layer": layer, "name": f"outputs/{layer}",
        "dtype": "float32", "shape": [0, width], "row_shape": [width], "whole": False,
        "chunk_rows": 0, "chunks": [], "records": [[0, records, 1]], "starts": n,
        "rows": n,
    }  # fmt: skip


def then(*frames):
    return lambda before: [*before, *frames]


def head(value):
    return lambda frames: [value, *frames[1:]]


def amplified(frames):
    """A small file whose every chunk is the same bytes."""
    much = part(frames)
    much["shape"] = [1000 * N, WIDTH]
    much["chunks"] = much["chunks"] * 1000


def inflated(frames):
    """A chunk that takes 201 MB when one of its rows is read."""
    much = part(frames)
    much |= {"filter": "gzip", "chunk_rows": 2**23}
    much["chunks"][0] = [*much["chunks"][0][:2], 5]


HUGE = 10**15
NONSENSE = {
    "no object": head([]),
    "a number": head(3),
    "a merge of nothing": then({"replaces": [1, 1]}),
    "segments alone": then({"segments": [{}]}),
    "segments that are none": then({"segments": 3}),
    "segments in the head": head({"packed": 1, "segments": [[]]}),
    "a log that is none": lambda frames: entry(frames).update(log="x"),
    "records without bytes": then(batch([[0, 2**24, 1]])),
    "records in many frames": then(*[batch([[0, 2**20, 1]])] * 8),
    "streams without bytes": then(
        batch([[0, 2**20, 1]], [empty(str(i), 3, 2**20) for i in range(9)])
    ),
    "a width without bytes": then(batch([[0, 1, 0]], [empty("c", 2**40, 1)])),
    "hidden records": then(batch([[0, 2, 1]], hidden=[[0, HUGE, 1]])),
    "rows": says(rows=[[HUGE, 3, 0]]),
    "starts": says(starts=[[0, 3, HUGE]]),
    "whole rows": says(whole=True),
    "scalars": lambda frames: part(frames, "loss").update(
        shape=[2], rows=[[0, 3, 0]], starts=[[0, 3, 0]]
    ),
    "amplified": amplified,
    "inflated": inflated,
}


@pytest.mark.parametrize("kind", ["run", "none.h5"])
@pytest.mark.parametrize("name", NONSENSE)
def test_a_manifest_that_makes_no_sense(run, packed, kind, name, shared):
    """It costs neither time nor memory."""
    path = run if kind == "run" else packed
    retell(path, NONSENSE[name])
    for trust in TRUSTS:
        tracemalloc.start()
        try:
            refusal(path, trust, CorruptSegment)
            assert tracemalloc.get_traced_memory()[1] < 5e6
        finally:
            tracemalloc.stop()


def test_a_segment_that_hides_behind_a_merge(run, shared):
    """The catalog replaces batches that are inside a merge, not those that touch it."""
    segment = run / "segments" / "00000000.h5"
    segment.rename(run / "elsewhere")
    segment.symlink_to(run / "elsewhere")

    def change(frames):
        real = next(frame for frame in frames if frame.get("steps"))
        nothing = {"tags": [], "segments": []}
        return [
            frames[0],
            {"steps": [[9, 1, 0]], **nothing},
            {"steps": [[0, 2, 1]], **nothing},
            {"steps": [[2, 1, 0]], **nothing},
            {**real, "replaces": [2, 3]},
            {"steps": [[9, 1, 0]], "replaces": [1, 2], **nothing},
        ]

    retell(run, change)
    assert store.open(run).read("a", 2).shape == (ROWS, WIDTH)
    assert "not a regular file" in refusal(run, "untrusted", UntrustedStore)


# -- bytes that no library writes ------------------------------------------------
def patched(path, old, new, build):
    """Make a file of the oldest format, which has no checksums, and change bytes."""
    with h5py.File(path, "w", libver="earliest") as file:
        build(file)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_two_datasets_with_the_same_bytes(tmp_path, shared):
    def build(file):
        file["a"] = np.ones(100_000, "u1")
        low(file, "b", (100_000,), kind=h5t.STD_U8LE)

    path = tmp_path / "x.h5"
    size = (100_000).to_bytes(8, "little")
    with h5py.File(path, "w") as file:
        build(file)
        place = file["a"].id.get_offset().to_bytes(8, "little")
    patched(path, b"\xff" * 8 + size, place + size, build)
    for trust in TRUSTS:
        assert "more than one dataset has" in refusal(path, trust, UntrustedStore)


def test_chunks_of_another_rank(tmp_path, shared):
    """HDF5 would divide by zero when it reads them (CVE-2026-19025)."""
    path = tmp_path / "x.h5"
    dims = np.array([77, 78, 77, 78], "<u8").tobytes()
    two, one = (bytes([1, rank, 1, 0, 0, 0, 0, 0]) + dims for rank in (2, 1))

    def build(file):
        plan = h5p.create(h5p.DATASET_CREATE)
        plan.set_chunk((7, 7))
        space = h5s.create_simple((77, 78))
        h5d.create(file.id, b"a", h5t.NATIVE_FLOAT, space, plan)

    patched(path, two, one, build)
    for trust in TRUSTS:
        assert re.search("rank 2 in|HDF5 cannot", refusal(path, trust, UntrustedStore))
    for chunk, shape in (((2,), (4, 4)), ((2, 2), (4,)), ((), (4,))):
        with pytest.raises(walker.Refused, match="in an array of rank"):
            walker._chunks(chunk, shape, 4, "a")


# -- what it costs ---------------------------------------------------------------
def grown(action):
    """Return by how many bytes a call let this process grow, at most."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def status(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory"
)


@needs_proc
@pytest.mark.parametrize("name", ["512 TiB chunked", "512 TiB contiguous"])
def test_half_a_pebibyte_costs_nothing(packed, tmp_path, name):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        BUILDERS[name][0](file, "a", tmp_path)
    put(packed, BUILDERS[name][0], tmp_path)
    for path in (tmp_path / "x.h5", packed):
        for trust, most in (("default", 0.05), ("untrusted", 2)):
            took = []
            for _ in range(3 if trust == "default" else 1):
                start = time.perf_counter()
                refusal(path, trust, UntrustedStore)
                took.append(time.perf_counter() - start)
            assert min(took) < most
        assert grown(lambda path=path: refusal(path, "default")) < 10e6


@needs_proc
def test_a_bomb_is_cut_where_the_chunk_ends(made, tmp_path, shared):
    path = Path(shutil.copy(made / "gzip.h5", tmp_path))
    bomb = zlib.compress(bytes(2**26))
    with h5py.File(path, "r+", libver=LIBVER) as file:
        file["outputs/a"].id.write_direct_chunk((0, 0), bomb)
        place = file["outputs/a"].id.get_chunk_info(0).byte_offset
    told = [place, zlib.crc32(bomb), len(bomb)]
    retell(path, says(chunks=[told]))
    for trust in TRUSTS:
        run = store.open(path, trust=trust)

        def read(run=run):
            with pytest.raises(CorruptSegment, match="cannot be unpacked"):
                run.read("a", 1)

        assert grown(read) < 10e6
        assert run.read("b", 1).shape == (ROWS, WIDTH)


def test_an_untrusted_read_has_a_budget(made, monkeypatch, shared):
    monkeypatch.setattr(catalog, "_UNTRUSTED_BYTES", ROWS * WIDTH * 4)
    for path in (made / "run", made / "gzip.h5"):
        run = store.open(path, trust="untrusted")
        assert run.read("a", 1).equal(store.open(path).read("a", 1))
        with pytest.raises(UntrustedStore, match="declares 288 bytes for outputs"):
            run.series("a")
        assert run.series("a", units=[0, 3]).shape == (3, ROWS, 2)
        assert store.open(path).series("a").shape == (3, ROWS, WIDTH)


# -- other files -----------------------------------------------------------------
def truncated(path, sound):
    data = sound.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def user_block(path, sound):
    with h5py.File(path, "w", userblock_size=512) as file:
        file["x"] = [1.0]


def cut_magic(path, sound):
    path.write_bytes(sound.read_bytes()[1:])


def device(path, *_):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        path.open("rb").close()
    except PermissionError:
        pytest.skip("needs the right to make devices")


FILES = {
    "truncated": truncated,
    "head alone": lambda path, _: path.write_bytes(walker.MAGIC),
    "magic and zeros": lambda path, _: path.write_bytes(walker.MAGIC + bytes(4096)),
    "empty": lambda path, _: path.touch(),
    "garbage": lambda path, _: path.write_bytes(bytes(range(256)) * 40),
    "zip": lambda path, sound: path.write_bytes(b"PK\3\4" + sound.read_bytes()),
    "user block": user_block,
    "not from the start": cut_magic,
    "pipe": lambda path, _: os.mkfifo(path),
    "device": device,
    "link to a device": lambda path, _: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path, _: path.symlink_to("nothing"),
    "link to itself": lambda path, _: path.symlink_to(path),
    "directory": lambda path, _: path.mkdir(),
    "directory with a log": lambda path, _: (path / "wal").mkdir(parents=True),
    "nothing": lambda path, _: None,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none(made, tmp_path, name, shared):
    FILES[name](tmp_path / "x.h5", made / "none.h5")
    for trust in TRUSTS:
        refusal(tmp_path / "x.h5", trust)


@pytest.mark.parametrize("name", ["FORMAT", "MANIFEST", "segments/00000000.h5"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "nothing"])
def test_a_directory_with_something_else_in_it(run, name, kind, shared):
    (run / name).unlink()
    FILES[kind](run / name, None)
    refusal(run, "untrusted")
    with promptly(10), pytest.raises((NotAStore, CorruptSegment)):
        store.open(run).read("a", 1)


@pytest.mark.parametrize(
    "name", ["FORMAT", "MANIFEST", "segments", "segments/00000000.h5", "wal", ""]
)
def test_a_symbolic_link(run, made, tmp_path, name, shared):
    """Followed by default, as by everyone; a stranger may not point at our files."""
    if name == "wal":
        (run / name).mkdir()
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    same(store.open(run), store.open(made / "run"))
    refusal(run, "untrusted", UntrustedStore)


def test_a_symbolic_link_to_a_packed_store(packed, made, shared):
    link = packed.with_name("link.h5")
    link.symlink_to(packed)
    same(store.open(link), store.open(made / "run"))
    assert "not a regular file" in refusal(link, "untrusted", UntrustedStore)


def test_a_log_of_a_stranger(tmp_path, snapshot, shared):
    w = store.create(tmp_path / "log", meta={}, durability="append")
    w.append(snapshot(1))
    w.abort()
    (log,) = (w.path / "wal").iterdir()
    assert store.open(w.path, trust="untrusted").read("fc1", 1).shape == (6, 5)
    log.rename(tmp_path / "elsewhere")
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere")):
        make(log)
        refusal(w.path, "untrusted", UntrustedStore)
        with promptly(10):
            assert store.open(w.path).steps in ([], [1])
        log.unlink()


# -- the child -------------------------------------------------------------------
CHILDREN = {
    "dies": ("os._exit(9)", "ended its process"),
    "is killed": ("os.kill(os.getpid(), 11)", "ended its process"),
    "cannot start": ("import no_such_module", "ended its process"),
    "hangs": ("time.sleep(60)", r"took over 0\.5 s"),
    "never ends": (
        "while True: print(1, end='', flush=True); time.sleep(.1)",
        "took over",
    ),
    "floods": ("while True: sys.stdout.write('x' * 9999)", "ended its process"),
    "says nonsense": ("print('nonsense', flush=True)", "ended its process"),
    "says a number": ("print(3, flush=True)", "ended its process"),
    "says half": ("print('{\"manifest\": ', end='')", "ended its process"),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_that(name, made, tmp_path, monkeypatch):
    code, reason = CHILDREN[name]
    script = tmp_path / "walker.py"
    script.write_text(f"import os, sys, time\nsys.stdin.readline()\n{code}\n")
    monkeypatch.setattr(walker, "__file__", str(script))
    monkeypatch.setattr(guard, "SECONDS", 0.5 if "took" in reason else 10)
    # A directory has its files looked at one by one, a packed store is one.
    for path in (made / "none.h5", made / "run")[: 1 if "took" in reason else 2]:
        text = refusal(path, "untrusted", UntrustedStore)
        assert re.search(reason, text), text


def test_a_child_that_died_is_replaced(made):
    with guard.Guard() as one:
        one.walk(made / "none.h5", None)
        one._child.kill()
        with pytest.raises(walker.Refused, match="ended its process"):
            one.walk(made / "none.h5", None)
        one.walk(made / "none.h5", None)


def test_the_child_knows_nothing_of_its_parent(made, tmp_path, monkeypatch):
    """Modules beside the caller, on its path and in its folder stay unread."""
    for name in ("sitecustomize", "h5py", "json", "numpy", "usercustomize"):
        text = f"import pathlib; pathlib.Path({str(tmp_path / 'harm')!r}).touch()"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "HDF5_PLUGIN_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    same(store.open(made / "none.h5", trust="untrusted"), store.open(made / "run"))
    assert not (tmp_path / "harm").exists()
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import os, json, sys\nsys.stdin.readline()\n"
        f"file = open({str(tmp_path / 'told')!r}, 'w')\n"
        "json.dump([dict(os.environ), sys.path], file)"
    )
    monkeypatch.setattr(walker, "__file__", str(probe))
    refusal(made / "none.h5", "untrusted", UntrustedStore)
    environment, path = json.loads((tmp_path / "told").read_text())
    assert environment["HDF5_PLUGIN_PRELOAD"] == "::"
    assert str(tmp_path) not in [*environment.values(), *path]


SCRIPT = """
import sys, h5py
from pathlib import Path
from repscope import store
from repscope.errors import UntrustedStore

print("ran")
folder, marker = map(Path, sys.argv[1:])
for name in sys.stdin.read().split():
    for trust in ("default", "untrusted"):
        try:
            print(name, trust, store.open(folder / name, trust=trust).steps)
        except UntrustedStore:
            print(name, trust, "refused")
print("marker", marker.exists(), h5py.h5pl.size())
try:
    h5py.File(folder / "plugin.h5")["a"][:]
except OSError:
    print("marker", marker.exists())
"""


def test_no_plugin_is_loaded_and_no_script_runs_twice(made, tmp_path):
    hdf5plugin = pytest.importorskip("hdf5plugin")
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    marker = tmp_path / "marker"
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugin.c").write_text(
        "#include <fcntl.h>\n__attribute__((constructor)) static void loaded(void)"
        f'{{ open("{marker}", O_CREAT | O_WRONLY, 0600); }}'
    )
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", "plugins/libx.so", "plugin.c"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    zstd = hdf5plugin.Zstd.filter_id  # known here, to write with, but not there
    names = {"plugin.h5": plugin, "names.h5": compressed_names(zstd)}
    for name, build in names.items():
        with h5py.File(tmp_path / name, "w", libver=LIBVER) as file:
            build(file, "a", tmp_path)
    shutil.copy(made / "none.h5", tmp_path / "sound.h5")
    put(shutil.copy(made / "none.h5", tmp_path / "store.h5"), plugin, tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path, marker],
        input="sound.h5 plugin.h5 names.h5 store.h5",
        env={**os.environ, "HDF5_PLUGIN_PATH": str(tmp_path / "plugins")},
        cwd=Path(store.__file__).parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "ran",
        *[f"sound.h5 {trust} [0, 1, 2]" for trust in TRUSTS],
        *[
            f"{name}.h5 {trust} refused"
            for name in ("plugin", "names", "store")
            for trust in TRUSTS
        ],
        "marker False 1",  # and the caller still has its own plugins
        "marker True",  # which h5py alone would have loaded
    ]


# -- sound stores ----------------------------------------------------------------
@pytest.mark.parametrize("name", ["run", "none.h5", "gzip.h5"])
def test_a_sound_store_is_the_same(made, name):
    same(store.open(made / name, trust="untrusted"), store.open(made / "run"))


def test_many_streams_and_dead_layers(tmp_path, shared):
    """Zeros compress a thousandfold and more, and big groups keep names elsewhere."""
    pytest.importorskip("hdf5plugin")
    w = store.create(tmp_path / "run", meta={})
    streams = {("outputs", f"layer.{i}"): torch.zeros(2, 3) for i in range(40)}
    streams["outputs", "dead"] = torch.zeros(1000, 2000)
    w.append(Snapshot(0, streams))
    w.close()
    for kind in ("gzip", "zstd"):
        out = tmp_path / f"{kind}.h5"
        store.pack(w.path, out, compression=kind)
        for trust in TRUSTS:
            assert len(store.open(out, trust=trust).layers) == 41


def test_names_of_many_objects_are_read_in_one_go(tmp_path):
    """A minute for ten thousand of them, when each is looked up by its number."""
    with h5py.File(tmp_path / "x.h5", "w", libver=LIBVER) as file:
        for i in range(4000):
            h5g.create(file.id, b"%d" % i)
    start = time.perf_counter()
    refusal(tmp_path / "x.h5", "default", NotAStore)
    assert time.perf_counter() - start < 5


NAMES = ["../../x", "a/b", "/", "..", ".", "", "nul\0byte", "n" * 10_000, "\x1b[2J\n",
         "né", "\udc80", "@manifest", "@index/outputs/a", "C:\\x", "%2e"]  # fmt: skip


def test_names_lead_nowhere(tmp_path, shared):
    w = store.create(tmp_path / "run", meta={})
    values = {name: torch.full((2, 3), float(i)) for i, name in enumerate(NAMES)}
    w.append(Snapshot(0, {("outputs", name): v for name, v in values.items()}))
    w.close()
    store.pack(w.path, tmp_path / "out.h5")
    for path in (w.path, tmp_path / "out.h5"):
        for trust in TRUSTS:
            run = store.open(path, trust=trust)
            assert run.layers == NAMES
            for name, value in values.items():
                assert run.read(name).equal(value)
    found = []
    with h5py.File(tmp_path / "out.h5") as file:
        file.visit(found.append)
    allowed = r"@?[A-Za-z0-9_.%-]{1,200}"
    for part in {part for name in found for part in name.split("/")}:
        assert re.fullmatch(allowed, part)
        assert part.strip(".")
    files = sorted(f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*"))
    assert [f for f in files if "LOCK" not in f] == [
        "out.h5", "run", "run/FORMAT", "run/MANIFEST", "run/segments",
        "run/segments/00000000.h5",
    ]  # fmt: skip


# -- the option ------------------------------------------------------------------
def test_what_trust_may_be(made):
    with pytest.raises(UsageError, match="'nonsense' is not one of"):
        store.open(made / "run", trust="nonsense")


def test_a_run_remembers_that_it_is_not_trusted(packed, tmp_path, shared):
    runs = [store.open(packed, trust=trust) for trust in TRUSTS]
    runs += [pickle.loads(pickle.dumps(run)) for run in runs]
    assert [run._trust for run in runs] == [*TRUSTS, *TRUSTS]
    link = packed.with_name("moved.h5")
    packed.rename(link)
    packed.symlink_to(link)  # fine for a friend, not for a stranger
    for run in runs:
        if run._trust == "default":
            assert run.refresh().steps == [0, 1, 2]
            continue
        with pytest.raises(UntrustedStore, match="not a regular file"):
            run.refresh()
        with pytest.raises(UntrustedStore, match="not a regular file"):
            pickle.loads(pickle.dumps(run))
