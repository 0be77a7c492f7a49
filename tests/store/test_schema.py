"""Frames with a good checksum and nonsense inside: an error with a name, at once."""

from __future__ import annotations

import copy
import tracemalloc

import pytest

from repscope import store
from repscope.errors import CorruptSegment, StoreError
from repscope.store import manifest

HUGE = 10**15


@pytest.fixture
def path(create, snapshot):
    w = create(seed=1)
    for step in range(3):
        w.append(snapshot(step))
    w.close()
    return w.path


def rewrite(path, change):
    """Change the frame of the commit, and give it a good checksum again."""
    frames = manifest.read(path)
    frames[1] = change(copy.deepcopy(frames[1]))
    data = b"".join(manifest.encode(i, frame) for i, frame in enumerate(frames))
    (path / "MANIFEST").write_bytes(data)


def at(frame, *keys, value):
    for key in keys[:-1]:
        frame = frame[key]
    frame[keys[-1]] = value


SEGMENT = ("segments", 0)
PART = (*SEGMENT, "parts", 0)
NONSENSE = [
    *[(("steps",), v) for v in ([[0, HUGE, 1]], [[0, 2**62, 2**62]], [[-1, 3, 1]])],
    *[(("steps",), v) for v in ("abc", [[1, 2]], [[0, 3, 1.5]], [[0, "3", 1]], 7)],
    *[(("tags",), v) for v in ([[9, "a"]], [[0, 1]], [["a", "b"]], {"a": 1}, None)],
    *[((name,), v) for name in ("meta", "closed", "rewind") for v in ("x", 1.5, [])],
    *[(("segments",), v) for v in (None, 3, [3], [{}])],
    *[((*SEGMENT, "number"), v) for v in (-1, "../../x", None, 1.0, True)],
    *[((*SEGMENT, "bytes"), v) for v in (-1, 10, "x", None)],
    *[((*PART, name), v) for name in ("target", "layer", "name") for v in (None, 3)],
    *[((*PART, "dtype"), v) for v in ("object", "complex64", None, [1])],
    *[((*PART, "shape"), v) for v in ([], [HUGE, 5], [HUGE] * 9, [-1, 5], None, "ab")],
    *[((*PART, "row_shape"), v) for v in ([HUGE], [4], [5, 1], [-5], None, "a")],
    *[((*PART, "whole"), v) for v in (None, 2)],
    *[((*PART, "chunk_rows"), v) for v in (0, -1, HUGE, "x", None)],
    *[((*PART, "chunks"), v) for v in ([], [[0, 1], [0, 1]], [[HUGE, 1]], [[0, -1]])],
    *[((*PART, "records"), v) for v in ([], [[0, HUGE, 1]], [[2, 1, 0], [0, 2, 1]])],
    *[((*PART, "records"), v) for v in ([[1, 3, 1]], [[0, 3, 0]], [[0, 2, 1]], None)],
    *[((*PART, name), v) for name in ("starts", "rows") for v in ([[0, HUGE, 0]], [])],
]


@pytest.mark.parametrize(("keys", "value"), NONSENSE, ids=str)
def test_nonsense_is_refused_at_open_and_costs_nothing(path, keys, value):
    def change(frame):
        at(frame, *keys, value=value)
        return frame

    rewrite(path, change)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="run/MANIFEST"):
            store.open(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["number", "bytes", "parts"])
def test_a_missing_field(path, name):
    rewrite(path, lambda frame: frame["segments"][0].pop(name) and frame)
    with pytest.raises(CorruptSegment, match=name):
        store.open(path)


@pytest.mark.parametrize("frame", [[], 3, None, "text"])
def test_a_frame_that_is_no_object(path, frame):
    rewrite(path, lambda _: frame)
    with pytest.raises(CorruptSegment, match="makes no sense"):
        store.open(path)


def test_a_frame_that_is_no_json(path, monkeypatch):
    whole = manifest.read(path)
    data = manifest.encode(0, whole[0])
    monkeypatch.setattr(manifest.json, "dumps", lambda *_a, **_k: "[" * 100_000)
    data += manifest.encode(1, {})
    (path / "MANIFEST").write_bytes(data)
    with pytest.raises(CorruptSegment, match="no JSON"):
        store.open(path)


@pytest.mark.parametrize(
    ("name", "value"), [("starts", [[3, 3, 6]]), ("rows", [[5, 3, 0]])]
)
def test_rows_that_do_not_exist(path, name, value):
    """Found when they are asked for: never other rows, never uninitialised memory."""

    def change(frame):
        part = frame["segments"][0]["parts"]
        next(p for p in part if p["layer"] == "fc1")[name] = value
        return frame

    rewrite(path, change)
    run = store.open(path)
    if name == "starts":
        with pytest.raises(CorruptSegment, match="fewer rows than"):
            run.read("fc1", 2)
    else:
        assert run.read("fc1", 2).shape == (5, 5)


def test_two_layouts_of_one_stream(path):
    def change(frame):
        part = next(p for p in frame["segments"][0]["parts"] if p["layer"] == "fc1")
        part["dtype"] = "int32"
        frame["segments"].append({**frame["segments"][0], "parts": [dict(part)]})
        part["dtype"] = "float32"
        return frame

    rewrite(path, change)
    with pytest.raises(CorruptSegment, match="two layouts"):
        store.open(path)


def test_a_tensor_with_too_few_bytes(path):
    def change(frame):
        parts = frame["segments"][0]["parts"]
        part = next(p for p in parts if p["layer"] == "fc2.weight")
        part["rows"] = [[0, 3, 0]]
        return frame

    rewrite(path, change)
    with pytest.raises(CorruptSegment, match=r"the shape .* but 0 bytes"):
        store.open(path).read("fc2.weight", 1, target="weights")
