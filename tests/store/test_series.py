"""Whole series of a stream: the same values as step by step, without the steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from repscope import store
from repscope.errors import CorruptSegment, UnknownName, UsageError
from repscope.snapshot import Snapshot
from repscope.store import chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool)
SHAPES = {"outputs": (6, 5), "weights": (3, 4, 5)}


def tensor(step, shape, dtype):
    g = torch.Generator().manual_seed(step)
    return torch.randint(0, 2**15, shape, generator=g).to(dtype)


@pytest.fixture
def run(create, tiny):
    """40 steps over many segments; step 7 recorded twice."""
    w = create()
    for step in (*range(0, 400, 10), 70):
        seed = step + (len(w._batches) > 0 and step == 70)
        streams = {
            (target, str(dtype)): tensor(seed, shape, dtype)
            for target, shape in SHAPES.items()
            for dtype in DTYPES
        }
        w.append(Snapshot(step, streams))
        if step % 50 == 0:
            w.commit()
    w.close()
    assert len(list((w.path / "segments").iterdir())) > 3
    return store.open(w.path)


def stacked(run, layer, target, steps, units=slice(None)):
    if isinstance(units, slice) and units.step == -2:
        units = [4, 2, 0]  # torch has no negative strides
    return torch.stack([run.read(layer, s, target=target)[..., units] for s in steps])


@pytest.mark.parametrize("target", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "units",
    [
        None,
        2,
        -1,
        [0, 4],
        [3, 1],
        slice(1, 4),
        slice(None, None, -2),
        [4],
        np.array([0, -1]),
        torch.tensor(3),
    ],
)
def test_a_series_is_what_the_steps_are(run, same, target, dtype, units):
    layer = str(dtype)
    got = run.series(layer, target=target, units=units)
    want = stacked(
        run, layer, target, run.steps, slice(None) if units is None else units
    )
    same.tensor(got, want)
    assert run.series(layer, target=target, units=[]).shape[-1] == 0


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (slice(100, 200), range(100, 200, 10)),
        (slice(105, None), range(110, 400, 10)),
        (slice(None, None, 30), range(0, 400, 30)),
        ([390, 0, 70], [390, 0, 70]),
        ([70, 70], [70, 70]),
        (range(20, 60, 20), [20, 40]),
    ],
)
def test_steps(run, same, steps, expected):
    got = run.series("torch.float32", steps=steps, units=3)
    same.tensor(got, stacked(run, "torch.float32", "outputs", expected, 3))


def test_a_step_recorded_twice_counts_once(run, same):
    got = run.series("torch.float32", steps=slice(70, 71))
    assert len(got) == 1
    same.tensor(got[0], run.read("torch.float32", 70))


def test_records_that_are_cut_or_flat(create, tiny, same):
    """Larger than a segment of 8 KB: cut between rows, and inside a row."""
    w = create()
    for step in range(3):
        streams = {
            ("outputs", "cut"): tensor(step, (700, 5), torch.float32),
            ("outputs", "flat"): tensor(step, (2, 3000), torch.float32),
            ("weights", "w"): tensor(step, (9, 999), torch.float32),
        }
        w.append(Snapshot(step, streams))
    w.close()
    run = store.open(w.path)
    for layer, target in (("cut", "outputs"), ("flat", "outputs"), ("w", "weights")):
        want = stacked(run, layer, target, run.steps, [1, 3])
        same.tensor(run.series(layer, target=target, units=[1, 3]), want)


def test_what_is_only_in_the_log(tmp_path, snapshot, same):
    w = store.create(tmp_path / "run", meta={}, durability="append")
    for step in range(5):
        w.append(snapshot(step))
    run = store.open(w.path)
    same.tensor(run.series("fc1"), stacked(run, "fc1", "outputs", range(5)))
    w.abort()


def test_rows_without_units(create, same):
    w = create()
    for step in range(2):
        rows, tensor = torch.arange(4.0) + step, torch.tensor(float(step))
        w.append(Snapshot(step, {("outputs", "a"): rows, ("weights", "t"): tensor}))
    w.close()
    run = store.open(w.path)
    same.tensor(run.series("a"), torch.tensor([[0.0, 1, 2, 3], [1, 2, 3, 4]]))
    same.tensor(run.series("t", target="weights"), torch.tensor([0.0, 1.0]))
    for layer, target in (("a", "outputs"), ("t", "weights")):
        with pytest.raises(UsageError, match="no axis of units"):
            run.series(layer, target=target, units=0)


def test_questions_without_an_answer(run, create, snapshot):
    with pytest.raises(UsageError, match="which have 5"):
        run.series("torch.float32", units=5)
    with pytest.raises(UsageError, match="units='x' does not fit"):
        run.series("torch.float32", units="x")
    with pytest.raises(UnknownName, match="at any step of slice"):
        run.series("torch.float32", steps=slice(1, 9))
    with pytest.raises(UnknownName, match="no step 5"):
        run.series("torch.float32", steps=[5])
    with pytest.raises(UsageError, match="at least one step"):
        run.series("torch.float32", steps=[])
    with pytest.raises(UnknownName, match="did you mean"):
        run.series("float32")
    w = create("other")
    w.append(snapshot(0))
    w.append(snapshot(1, rows=7))
    w.close()
    with pytest.raises(UsageError, match=r"\(6, 5\) at step 0 and \(7, 5\) at step 1"):
        store.open(w.path).series("fc1")


def test_a_series_over_damage_is_an_error(run):
    path = next(iter(sorted((run.path / "segments").iterdir())))
    data = bytearray(path.read_bytes())
    run.series("torch.float32", units=0)
    for at in range(700, len(data), 40):
        data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptSegment, match=r"torch.float32' at step"):
        run.series("torch.float32", units=0)
    path.unlink()
    with pytest.raises(CorruptSegment, match="is missing"):
        run.series("torch.float32", units=0)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts by /proc")
def test_few_files_stay_mapped_and_none_open(run, monkeypatch):
    monkeypatch.setattr(chunks._maps, "most", 2)
    chunks._maps.clear()
    before = len(list(Path("/proc/self/fd").iterdir()))
    run.series("torch.float32", units=0)
    assert len(chunks._maps) == 2
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_only_the_asked_bytes_are_copied(create):
    w = create()
    for step in range(64):
        w.append(Snapshot(step, {("outputs", "a"): torch.ones(64, 1024)}))
    w.close()
    series = store.open(w.path).series("a", units=3)
    assert series.untyped_storage().nbytes() == 64 * 64 * 4
    assert np.all(series.numpy() == 1)


def test_threads_may_share_a_run(run, monkeypatch):
    monkeypatch.setattr(chunks._maps, "most", 1)
    want = run.series("torch.float32", units=0)
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(run.series, "torch.float32", units=0) for _ in range(200)]
        assert all(torch.equal(each.result(), want) for each in done)


def test_a_file_too_large_for_a_private_map(run, monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

    want = run.series("torch.float32", units=0)
    chunks._maps.clear()
    monkeypatch.setattr(torch, "from_file", refused)
    assert torch.equal(run.series("torch.float32", units=0), want)


def test_a_script_may_change_its_folder(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run.path.parent)
    near = store.open(run.path.name)
    monkeypatch.chdir("/")
    assert near.read("torch.float32", 0).shape == (6, 5)
    assert near.refresh().steps == run.steps
