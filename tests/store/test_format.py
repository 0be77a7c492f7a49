"""The bytes on disk, read with nothing but the page that describes them."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
import zlib

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repscope import store
from repscope.snapshot import Snapshot
from repscope.store.index import from_spans, to_spans
from repscope.store.names import encode

ODD = [
    "../../x",
    "..",
    ".",
    "a/b",
    "with spaces",
    "nul\0byte",
    "",
    "%",
    "%2F",
    "/",
    "ünïcode ✓",
    "\ud800",
    "x" * 10_000,
    "x" * 10_001,
    "CON",
]


def read_frames(path):
    """Decode a manifest by hand."""
    data, at, out = (path / "MANIFEST").read_bytes(), 0, []
    while at < len(data):
        assert data[at : at + 4] == b"RSF1"
        seq, n = struct.unpack("<QI", data[at + 4 : at + 16])
        assert seq == len(out)
        body = data[at + 16 : at + 16 + n]
        (crc,) = struct.unpack("<I", data[at + 16 + n : at + 20 + n])
        assert crc == zlib.crc32(data[at : at + 16 + n])
        out.append(json.loads(body))
        at += 20 + n
    return out


def expand(spans):
    return [first + i * stride for first, n, stride in spans for i in range(n)]


def test_the_tree(create, snapshot):
    w = create(seed=1)
    w.append(snapshot(0))
    w.commit()
    tree = sorted(p.relative_to(w.path).as_posix() for p in w.path.rglob("*"))
    assert tree == ["FORMAT", "LOCK", "MANIFEST", "segments", "segments/00000000.h5"]
    assert (w.path / "FORMAT").read_text() == "RepScope store\nversion 1\n"
    assert set(json.loads((w.path / "LOCK").read_text())) == {"host", "pid", "started"}


def test_frames_and_plain_h5py_give_the_arrays(create, snapshot, tiny):
    """An independent reader: struct, json and h5py, as documented."""
    w = create(seed=1)
    for step in range(0, 500, 10):
        w.append(snapshot(step, tags=("ten",) if step == 10 else ()))
    w.close()
    header, *commits, last = read_frames(w.path)
    assert header["meta"] == {"seed": 1}
    assert last == {"closed": True}
    seen = {}
    for frame in commits:
        steps = expand(frame["steps"])
        assert all(tag == "ten" and steps[i] == 10 for i, tag in frame["tags"])
        for segment in frame["segments"]:
            name = w.path / "segments" / f"{segment['number']:08d}.h5"
            assert name.stat().st_size == segment["bytes"]
            raw = name.read_bytes()
            with h5py.File(name) as file:
                for part in segment["parts"]:
                    dataset = file[part["name"]]
                    collect(part, dataset, raw, steps, seen)
    for step in range(0, 500, 10):
        for (target, layer), tensor in snapshot(step).streams.items():
            got = seen[target, layer, step]
            np.testing.assert_array_equal(got, tensor.numpy(), strict=True)
        assert seen["scalars", "loss", step] == 1 / (1 + step)
        np.testing.assert_array_equal(
            seen["labels", "y", step], snapshot(step).labels.numpy()
        )


def collect(part, dataset, raw, steps, seen):
    assert dataset.compression is None
    assert dataset.shuffle is dataset.fletcher32 is False
    assert dataset.is_virtual is False
    assert dataset.external is None
    assert list(dataset.shape) == part["shape"]
    size = part["chunk_rows"] * dataset[:1].nbytes
    for offset, crc in part["chunks"]:
        assert zlib.crc32(raw[offset : offset + size]) == crc
    if part["chunks"]:
        first = part["chunks"][0][0]  # one block, so that it can be mapped
        assert first % 64 == 0
        assert part["chunks"] == [
            [first + i * size, crc] for i, (_, crc) in enumerate(part["chunks"])
        ]
        used = dataset.nbytes - (len(part["chunks"]) - 1) * size
        last = part["chunks"][-1][0]
        assert not any(raw[last + used : last + size])  # padded with zeros
    places = zip(*(expand(part[k]) for k in ("records", "starts", "rows")), strict=True)
    for record, start, rows in places:
        values = dataset[start : start + rows]
        key = part["target"], part["layer"], steps[record]
        seen[key] = values[0] if part["whole"] else values


def test_bfloat16_and_bool_in_plain_h5py(create):
    values = torch.tensor([[1.5, -2.0, float("nan")]], dtype=torch.bfloat16)
    w = create()
    streams = {
        ("outputs", "half"): values,
        ("outputs", "mask"): torch.tensor([[True, False]]),
    }
    w.append(Snapshot(0, streams))
    w.close()
    with h5py.File(w.path / "segments" / "00000000.h5") as file:
        half, mask = file["outputs/half"], file["outputs/mask"][:]
        assert half.attrs["torch_dtype"] == b"bfloat16"
        decoded = (half[:].astype("uint32") << 16).view("float32")
    np.testing.assert_array_equal(decoded, values.float().numpy())
    assert mask.dtype == bool
    assert mask.tolist() == [[True, False]]


def test_the_same_data_gives_the_same_segment(create, snapshot, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.75e9)
    images = []
    for name in ("one", "two"):
        w = create(name)
        for step in range(5):
            w.append(snapshot(step))
        w.close()
        images.append((w.path / "segments" / "00000000.h5").read_bytes())
    assert images[0] == images[1]


def test_odd_layer_names_survive_and_leave_the_directory_alone(create, tmp_path):
    w = create()
    streams = {
        ("outputs", name): torch.full((1, 1), float(i)) for i, name in enumerate(ODD)
    }
    scalars = {name: float(i) for i, name in enumerate(ODD)}
    w.append(Snapshot(0, streams, scalars=scalars))
    w.close()
    run = store.open(w.path)
    assert run.layers == ODD
    assert [run.read(name).item() for name in ODD] == list(range(len(ODD)))
    assert run.scalars().loc[0].to_dict() == scalars
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert len(list(w.path.rglob("*"))) == 5
    with h5py.File(w.path / "segments" / "00000000.h5") as file:
        names = list(file["outputs"])
    assert len(names) == len(ODD)
    assert all(re.fullmatch(r"[A-Za-z0-9_.%-]{1,200}", name) for name in names)
    assert not {".", ".."} & set(names)


def test_a_long_name_ends_in_its_hash():
    name = encode("ab/" * 1000)
    assert len(name) == 200
    assert name.startswith("ab%2Fab%2F")
    assert name.endswith("-" + hashlib.sha256(b"ab/" * 1000).hexdigest())


@given(st.sets(st.text(), min_size=2, max_size=20))
def test_different_names_have_different_codes(names):
    assert len({encode(name) for name in names}) == len(names)


@given(st.lists(st.integers(-(2**40), 2**40)))
def test_spans_keep_every_integer(values):
    spans = to_spans(values)
    assert expand(spans) == values
    assert from_spans(spans).tolist() == values


@pytest.mark.parametrize("values", [range(0, 10**6, 100), [7] * 10**5])
def test_a_regular_schedule_costs_one_span(values):
    assert len(to_spans(values)) == 1


def test_a_long_run_of_scalars_has_a_short_manifest(create):
    w = create()
    for step in range(20_000):
        w.append(Snapshot(step, {}, scalars={"loss": 0.0, "acc": 1.0}))
    w.close()
    assert (w.path / "MANIFEST").stat().st_size < 5000
    table = store.open(w.path).scalars()
    assert table.shape == (20_000, 2)
    assert table.index.tolist() == list(range(20_000))
