"""Many small commits leave few files, and no reader notices."""

from __future__ import annotations

import shutil

import pytest
import torch

from repscope import store
from repscope.errors import CorruptSegment
from repscope.snapshot import Snapshot
from repscope.store import compact, files, manifest


def commits(writer, snapshot, steps):
    for step in steps:
        tags = ("ten",) if step % 10 == 0 else ()
        writer.append(snapshot(step, tags=tags))
        writer.commit()


def expected(snapshot, step):
    return snapshot(step, tags=("ten",) if step % 10 == 0 else ())


def check(path, snapshot, same, steps):
    run = store.open(path)
    seen = list(run.snapshots())
    assert [s.step for s in seen] == list(steps)
    for each in seen:
        same(each, expected(snapshot, each.step))
    assert run.scalars()["loss"].tolist() == [1 / (1 + step) for step in steps]


def n_files(path):
    return len(list((path / "segments").iterdir()))


def test_files_grow_with_the_logarithm(create, snapshot, same):
    w = create()
    run = None
    for start in range(0, 300, 50):
        commits(w, snapshot, range(start, start + 50))
        run = run or store.open(w.path)
    assert n_files(w.path) == 300 // 256 + 300 % 256 // 16 + 300 % 16
    assert w.acked_rows("outputs", "fc1") == 1800
    check(w.path, snapshot, same, range(300))
    assert store.open(w.path).tags == {"ten": 290}
    # a reader from before sees what it saw, and from now on where it is now
    assert run.steps == list(range(50))
    same.tensor(run.read("fc1", 3), snapshot(3).streams["outputs", "fc1"])
    assert len(list(run.snapshots())) == 50
    assert run.labels(7).tolist() == [0, 1, 2, 0, 1, 2]
    w.close()
    check(w.path, snapshot, same, range(300))
    assert store.open(w.path).nbytes == sum(
        f.stat().st_size for f in (w.path / "segments").iterdir()
    )


def test_equal_labels_are_stored_once(create):
    w = create()
    for step in range(16):
        w.append(Snapshot(step, {("outputs", "a"): torch.ones(1, 1)},
                          labels=torch.arange(1000)))  # fmt: skip
        w.commit()
    w.close()
    assert n_files(w.path) == 1
    assert store.open(w.path).nbytes < 20_000
    assert torch.equal(store.open(w.path).labels(9), torch.arange(1000))


def test_what_a_rewind_hid_stays_hidden(create, snapshot, same):
    w = create()
    commits(w, snapshot, range(12))
    w.abort()
    w = store.reopen(w.path, at=8)
    commits(w, snapshot, range(9, 20))
    w.abort()
    assert n_files(w.path) == 12 + 11 - 15
    check(w.path, snapshot, same, range(20))
    run = store.open(w.path)
    hidden = [s for b in run._catalog.batches for s in b.steps[~b.visible].tolist()]
    assert hidden == [9, 10, 11]
    w = store.reopen(w.path)
    commits(w, snapshot, range(20, 40))
    w.close()
    check(w.path, snapshot, same, range(40))


def test_every_dtype_and_shape(create, same):
    def at(step):
        g = torch.Generator().manual_seed(step)
        return Snapshot(step, {
            ("outputs", "bf"): torch.randn(3, 2, generator=g).bfloat16(),
            ("outputs", "none"): torch.ones(0, 4),
            ("outputs", "some"): torch.randn(step % 3, 2, generator=g),
            ("weights", "0-dim"): torch.randn((), generator=g),
            ("weights", "nothing"): torch.ones(0),
            **({("outputs", "late"): torch.ones(1, 1)} if step > 9 else {}),
        }, scalars={"loss": step} if step % 2 else {})  # fmt: skip

    w = create()
    for step in range(16):
        w.append(at(step))
        w.commit()
    assert n_files(w.path) == 1
    for each in store.open(w.path).snapshots():
        same(each, at(each.step))


def test_big_batches_stay(create, tiny):
    w = create()
    for step in range(40):
        w.append(Snapshot(step, {("outputs", "a"): torch.ones(12, 100)}))
        w.commit()
    assert n_files(w.path) == 40


def test_damage_is_not_copied(create, snapshot, same):
    w = create()
    commits(w, snapshot, range(15))
    file = w.path / "segments" / "00000004.h5"
    file.write_bytes(file.read_bytes()[:-1])
    commits(w, snapshot, range(15, 40))
    w.close()
    run = store.open(w.path)
    with pytest.raises(CorruptSegment, match="step 4"):
        run.read("fc1", 4)
    for step in (0, 15, 16, 39):
        same.tensor(run.read("fc1", step), snapshot(step).streams["outputs", "fc1"])
    assert n_files(w.path) == 16 + 24 - 15


def test_a_disk_too_full_to_merge_still_records(create, snapshot, same, monkeypatch):
    w = create()
    commits(w, snapshot, range(15))

    def full(batches):
        raise OSError(28, "full")

    monkeypatch.setattr(compact, "frame", full)
    commits(w, snapshot, range(15, 17))
    assert n_files(w.path) == 17
    check(w.path, snapshot, same, range(17))


@pytest.mark.parametrize("durability", ["batch", "append"])
def test_every_moment_of_a_merge_is_a_whole_store(
    tmp_path, snapshot, same, monkeypatch, durability
):
    w = store.create(tmp_path / "run", meta={}, durability=durability)
    commits(w, snapshot, range(15))
    copies = []

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*args):
            for moment in ("before", "after"):
                if moment == "after":
                    real(*args)
                copies.append(tmp_path / f"copy-{len(copies)}")
                shutil.copytree(w.path, copies[-1])

        monkeypatch.setattr(owner, name, call)

    w.append(snapshot(15))
    for owner, name in ((files, "write_new"), (files, "sync_directory"),
                        (files, "discard"), (manifest, "_sync_data")):  # fmt: skip
        watch(owner, name)
    w.commit()
    monkeypatch.undo()
    w.append(snapshot(16))
    w.abort()
    assert len(copies) > 30
    counts = set()
    for copy in copies:
        run = store.open(copy)
        acked = 16 if durability == "append" else 15
        assert run.steps in (list(range(acked)), list(range(16)))
        for each in run.snapshots():
            same(each, expected(snapshot, each.step))
    for copy in copies[::5]:
        again = store.reopen(copy)
        again.append(snapshot(again.progress + 1))
        again.close()
        counts.add(n_files(copy))
        steps = store.open(copy).steps
        assert steps == list(range(len(steps)))
        assert len(steps) >= 16
        for each in store.open(copy).snapshots():
            same(each, expected(snapshot, each.step))
    assert min(counts) <= 2
    assert store.open(w.path).steps[:16] == list(range(16))


def test_a_manifest_that_merges_other_records(create, snapshot):
    w = create()
    commits(w, snapshot, range(16))
    w.close()
    frames = manifest.read(w.path)
    merged = next(frame for frame in frames if "replaces" in frame)
    for change in ({"steps": [[1, 16, 1]]}, {"replaces": [500, 600]}):
        bad = [frame | change if frame is merged else frame for frame in frames]
        data = b"".join(manifest.encode(i, frame) for i, frame in enumerate(bad))
        (w.path / "MANIFEST").write_bytes(data)
        with pytest.raises(CorruptSegment, match="other records"):
            store.open(w.path)


def test_records_with_only_a_tag_among_those_that_are_merged(create, snapshot, same):
    """As `capture_now("task-1")` of a live recording makes them."""
    w = create()
    for step in range(40):
        w.append(snapshot(step))
        w.commit()
        if step % 9 == 4:
            w.append(Snapshot(step, {}, tags=(f"task-{step}",)))
            w.commit()
    for step in range(40, 60):
        w.append(Snapshot(step, {}, tags=(f"only-{step}",)))
        w.commit()
    w.close()
    run = store.open(w.path)
    assert len(list((w.path / "segments").iterdir())) < 20
    assert run.tags["task-13"] == 13
    assert run.tags["only-59"] == 59
    for seen in run.snapshots():
        same(seen, snapshot(seen.step))
    assert run.steps == list(range(40))
    store.reopen(w.path).close()
