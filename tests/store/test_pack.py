"""One file of a store: the same run, and any HDF5 reader opens it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
import torch

from repscope import store
from repscope.errors import (
    CorruptSegment,
    FormatTooNew,
    MissingExtra,
    NotAStore,
    StoreError,
    StoreExists,
    StoreFull,
    StoreWriteError,
    UsageError,
)
from repscope.snapshot import Snapshot
from repscope.store import filters, packed, packing
from repscope.store.index import STORED_AS

try:
    import hdf5plugin  # noqa: F401
except ImportError:
    KINDS = ("none", "gzip")
else:
    KINDS = ("none", "gzip", "zstd")
EVERY = [(kind, layout) for kind in KINDS for layout in ("step", "series")]


def tensor(step, shape, dtype):
    g = torch.Generator().manual_seed(step)
    return torch.randint(-(2**15), 2**15, shape, generator=g).to(dtype)


@pytest.fixture
def path(create, snapshot, tiny):
    """Everything a store can have, over many segments, rewound once."""
    w = create(seed=5, note={"nested": [1, 2.5, None]})
    for step in range(12):
        w.append(snapshot(step, rows=6 + step % 2, tags=(f"t{step}", "last")))
        w.progress = step
        if step % 4 == 3:
            w.commit()
    w.commit()
    w.abort()
    w = store.reopen(w.path, at=9)
    odd = {("outputs", str(dtype)): tensor(3, (5, 7), dtype) for dtype in STORED_AS}
    odd |= {("weights", "a/b ../c"): tensor(1, (3, 4, 5), torch.bfloat16)}
    odd |= {("weights", "0-dim"): torch.tensor(float("nan"))}
    odd |= {("outputs", "big"): tensor(4, (2, 3000), torch.float32)}
    odd |= {("outputs", "none"): torch.empty(0, 4)}
    odd |= {("outputs", "flat rows"): torch.arange(4.0)}
    w.append(Snapshot(20, odd, labels=torch.arange(5)))
    w.append(Snapshot(21, {}, scalars={"only": float("inf")}))
    w.progress = 25
    w.close()
    return w.path


def same_run(a, b, same):
    for name in ("steps", "tags", "streams", "shapes", "meta", "closed", "progress"):
        assert getattr(a, name) == getattr(b, name), name
    pairs = zip(a.snapshots(), b.snapshots(), strict=True)
    for one, other in pairs:
        same(one, other)
    assert a.scalars().equals(b.scalars())
    for target, layer in a.streams:
        for units in (None, 0):
            try:
                want = a.series(layer, target=target, units=units)
            except (UsageError, IndexError):
                continue
            same.tensor(b.series(layer, target=target, units=units), want)


@pytest.mark.parametrize(("compression", "layout"), EVERY)
def test_the_same_run(path, tmp_path, same, compression, layout, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_BYTES", 600)
    monkeypatch.setattr(packing, "_BUFFER_BYTES", 4096)
    out = tmp_path / "out.h5"
    store.pack(path, out, compression=compression, layout=layout)
    run = store.open(path)
    same_run(run, store.open(out), same)
    same_run(
        run, store.open(out, trust="untrusted"), same
    ) if compression != "zstd" else 0
    assert [f.name for f in tmp_path.iterdir()] == ["run", "out.h5"] or sorted(
        f.name for f in tmp_path.iterdir()
    ) == ["out.h5", "run"]


# -- other readers -------------------------------------------------------------
def test_h5py_alone_finds_the_rows_of_a_step(path, tmp_path):
    """As the documentation says: an index of (step, first row, rows) a stream."""
    store.pack(path, tmp_path / "out.h5", compression="gzip", layout="series")
    run = store.open(path)
    with h5py.File(tmp_path / "out.h5") as file:
        for step in run.steps:
            index = file["@index/outputs/fc1"][:]
            if step not in index[:, 0]:
                continue
            _, first, rows = index[index[:, 0] == step][-1]
            values = file["outputs/fc1"][first : first + rows]
            np.testing.assert_array_equal(values, run.read("fc1", step).numpy())
        bits = file["weights/a%2Fb%20..%2Fc"]
        assert bits.attrs["torch_dtype"] == b"bfloat16"
        assert b"RepScope packed store" in file.attrs["format"]


@pytest.mark.skipif(not shutil.which("h5dump"), reason="needs Debian's hdf5-tools")
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_an_independent_reader_gives_the_values(create, tmp_path, compression):
    """Debian's h5dump is of another, older HDF5 than ours."""
    values = torch.randn(40, 6)
    w = create()
    for step in range(4):
        w.append(
            Snapshot(step, {("outputs", "fc"): values[10 * step : 10 * step + 10]})
        )
    w.close()
    store.pack(w.path, tmp_path / "o.h5", compression=compression)
    files = [(tmp_path / "o.h5", "/outputs/fc"),
             (w.path / "segments" / "00000000.h5", "/outputs/fc")]  # fmt: skip
    for file, name in files:
        done = subprocess.run(
            ["h5dump", "-d", name, "-b", "LE", "-o", tmp_path / "raw", file],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "H5T_IEEE_F32LE" in done.stdout
        raw = np.fromfile(tmp_path / "raw", "<f4").reshape(40, 6)
        np.testing.assert_array_equal(raw, values.numpy())


def test_a_series_layout_reads_few_bytes_for_one_unit(create, tmp_path, same):
    w = create()
    for step in range(64):
        w.append(Snapshot(step, {("outputs", "a"): torch.randn(64, 256)}))
    w.close()
    store.pack(w.path, tmp_path / "out.h5", layout="series")
    run = store.open(tmp_path / "out.h5")
    part = run._catalog.batches[0].parts["outputs", "a"][0].part
    assert part.chunk_shape == (64 * 64, 64)  # 1 MiB: 64 units of all steps
    same.tensor(run.series("a", units=9), store.open(w.path).series("a", units=9))


# -- refusals -------------------------------------------------------------------
def test_what_is_there_stays(path, tmp_path):
    out = tmp_path / "out.h5"
    out.write_text("mine")
    with pytest.raises(StoreExists, match="left untouched"):
        store.pack(path, out)
    assert out.read_text() == "mine"
    with pytest.raises(UsageError, match=r"NAME\.h5"):
        store.pack(path, tmp_path / "out.hdf")
    for option in ({"compression": "lzma"}, {"layout": "steps"}):
        with pytest.raises(UsageError, match="is not one of"):
            store.pack(path, tmp_path / "new.h5", **option)
    assert not (tmp_path / "new.h5").exists()


def test_zstd_without_its_package_names_the_install_line(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(MissingExtra, match=r"pip install 'repscope\[compression\]'"):
        store.pack(path, tmp_path / "out.h5", compression="zstd")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]


def test_a_damaged_store_is_not_packed(path, tmp_path):
    file = sorted((path / "segments").iterdir())[0]
    data = bytearray(file.read_bytes())
    data[
        store.open(path)._catalog.batches[0].parts["outputs", "fc1"][0].part.block
    ] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptSegment, match="fc1"):
        store.pack(path, tmp_path / "out.h5")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]


def packs(path, out, compression):
    """Return whether there was room."""
    try:
        store.pack(path, out, compression=compression)
    except StoreFull as error:
        full = (error.errno, "is as it was" in str(error))
    else:
        return True
    assert full == (28, True)
    return False


@pytest.mark.parametrize("compression", KINDS)
def test_a_disk_that_fills_at_any_write(create, tmp_path, monkeypatch, compression):
    """HDF5 never meets the full disk: it would take the process with it."""
    w = create()
    for step in range(3):
        w.append(Snapshot(step, {("outputs", "a"): torch.randn(50, 40)}))
    w.close()
    out, real, room = tmp_path / "out.h5", os.pwrite, [0]

    def pwrite(fd, data, at):
        if len(data) > room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= len(data)
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    failures = 0
    for size in range(0, 60000, 997):
        room[0] = size
        if packs(w.path, out, compression):
            break
        failures += 1
        assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]
    assert failures > 5
    assert store.open(out).read("a", 2).equal(store.open(w.path).read("a", 2))


def test_a_file_that_does_not_read_back_is_not_kept(path, tmp_path, monkeypatch):
    real = packing._series
    calls = []

    def other(*args):
        calls.append(args)
        return real(*args) + 1 if len(calls) == 2 else real(*args)

    monkeypatch.setattr(packing, "_series", other)
    with pytest.raises(StoreWriteError, match="did not read back"):
        store.pack(path, tmp_path / "out.h5")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]


def test_interrupted_packing_leaves_nothing(path, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.pack(path, tmp_path / "out.h5")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]


# -- damage ---------------------------------------------------------------------
@pytest.mark.parametrize(("compression", "layout"), EVERY)
def test_no_changed_byte_is_read_as_data(create, tmp_path, compression, layout, same):
    w = create()
    want = {}
    for step in range(3):
        want[step] = torch.randn(20, 8)
        w.append(Snapshot(step, {("outputs", "a"): want[step]}))
    w.close()
    out = tmp_path / "out.h5"
    store.pack(w.path, out, compression=compression, layout=layout)
    whole = out.read_bytes()
    refused = 0
    for at in range(0, len(whole), 31):
        data = bytearray(whole)
        data[at] ^= 0x41
        out.write_bytes(data)
        os.utime(out, ns=(at, at))
        for step in range(3):
            try:
                same.tensor(store.open(out).read("a", step), want[step])
            except StoreError:
                refused += 1
    assert refused > 20


def test_a_newer_packed_format(path, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "VERSION", 2)
    store.pack(path, tmp_path / "out.h5")
    monkeypatch.undo()
    with pytest.raises(FormatTooNew, match="format 2 of packed stores"):
        store.open(tmp_path / "out.h5")


def test_an_hdf5_file_of_somebody_else(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = [1.0, 2.0]
    with pytest.raises(NotAStore, match="no @manifest"):
        store.open(tmp_path / "other.h5")


@pytest.mark.parametrize(
    "head", [b"", b"\x28\xb5\x2f\xfd", b"rubbish rubbish", b"\x28\xb5\x2f\xfd\x00\x58"]
)
def test_zstd_frames_that_declare_no_size(head):
    assert filters._zstd_size(head) == -1


@pytest.mark.skipif("zstd" not in KINDS, reason="needs hdf5plugin")
def test_a_zstd_chunk_that_declares_too_much_is_not_unpacked():
    bomb = b"\x28\xb5\x2f\xfd\xc0\x00" + (2**40).to_bytes(8, "little") + bytes(9)
    data = np.frombuffer(bomb, np.uint8)
    with pytest.raises(ValueError, match="does not hold 64 bytes"):
        filters.unpack("zstd", data, nbytes=64, itemsize=4)
    honest = np.frombuffer(b"\x28\xb5\x2f\xfd\x20\x40" + bytes(9), np.uint8)
    with pytest.raises(ValueError, match=r".+"):
        filters.unpack("zstd", honest, nbytes=64, itemsize=4)


def test_a_gzip_bomb_is_cut_where_the_chunk_ends():
    bomb = np.frombuffer(zlib.compress(bytes(2**28)), np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="does not hold 1024 bytes"):
        filters.unpack("gzip", bomb, nbytes=1024, itemsize=4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 2**10
    with pytest.raises(ValueError, match="header"):
        filters.unpack("gzip", bomb[5:], nbytes=1024, itemsize=4)
