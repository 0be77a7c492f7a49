"""Going on with a store: after a kill, a torn write, or a change of mind."""

from __future__ import annotations

import shutil

import pytest
import torch

from repscope import store
from repscope.errors import (
    CorruptSegment,
    DtypeChanged,
    NotAStore,
    ShapeChanged,
    StoreError,
    StoreLocked,
    UsageError,
)
from repscope.snapshot import Snapshot
from repscope.store import files, manifest


@pytest.fixture
def reopen():
    made = []

    def again(path, **options):
        made.append(store.reopen(path, **options))
        return made[-1]

    yield again
    for each in made:
        each.abort()


@pytest.fixture
def path(create, snapshot):
    """Steps 0 to 5, two a commit, of a writer that died."""
    w = create(seed=1)
    for step in range(6):
        w.append(snapshot(step, tags=(f"at-{step}", "latest")))
        if step % 2:
            w.commit()
    w.abort()
    return w.path


def tree(path):
    return {f: f.read_bytes() for f in path.rglob("*")
            if f.is_file() and f.name != "LOCK"}  # fmt: skip


def test_go_on_after_the_last_acknowledged_step(path, reopen, snapshot, same):
    w = reopen(path)
    assert w.progress == 5
    assert w.recovered == {}
    assert w.acked_rows("outputs", "fc1") == 36
    assert w.acked_rows("weights", "fc2.weight") == 6
    w.append(snapshot(6))
    w.close()
    run = store.open(path)
    assert run.closed
    assert "recovered" not in run.meta
    for a, b in zip(run.snapshots(layers=["fc1"]), range(7), strict=True):
        same.tensor(a.streams["outputs", "fc1"], snapshot(b).streams["outputs", "fc1"])
    names = sorted(f.name for f in (path / "segments").iterdir())
    assert names == [f"0000000{i}.h5" for i in range(4)]


def test_a_closed_run_goes_on_too(path, reopen, snapshot):
    reopen(path).close()
    assert store.open(path).closed
    w = reopen(path)
    assert not store.open(path).closed
    w.append(snapshot(9))
    w.close()
    assert store.open(path).steps == [0, 1, 2, 3, 4, 5, 9]


def test_what_a_killed_writer_left_is_put_aside(path, reopen, snapshot, same):
    segments = path / "segments"
    (segments / "00000003.h5").write_bytes(b"half a batch")
    (segments / "00000007.h5").mkdir()
    (segments / ".tmp-4-77").write_bytes(b"x")
    (path / ".tmp-MANIFEST-77").write_bytes(b"x")
    (path / "notes.txt").write_text("mine")
    with (path / "MANIFEST").open("ab") as file:
        file.write(b"RSF1 torn")
    before = tree(path)
    assert store.open(path).steps == list(range(6))
    assert tree(path) == before  # reading changes nothing
    w = reopen(path)
    assert w.recovered == {
        "torn_bytes": 9,
        "quarantined": ["00000003.h5", "00000007.h5"],
        "removed": 2,
    }
    w.append(snapshot(6))
    w.close()
    quarantine = path / "quarantine"
    assert (quarantine / "00000003.h5").read_bytes() == b"half a batch"
    assert (quarantine / "MANIFEST-tail").read_bytes() == b"RSF1 torn"
    assert not list(path.rglob(".tmp-*"))
    assert (path / "notes.txt").read_text() == "mine"
    run = store.open(path)
    assert run.meta["recovered"] == [w.recovered]
    assert run.steps == list(range(7))
    same.tensor(run.read("fc1", 6), snapshot(6).streams["outputs", "fc1"])


def test_the_quarantine_never_overwrites(path, reopen):
    for content in (b"first", b"second"):
        (path / "segments" / "00000009.h5").write_bytes(content)
        reopen(path).close()
    names = {f.name: f.read_bytes() for f in (path / "quarantine").iterdir()}
    assert names == {"00000009.h5": b"first", "00000009.h5.1": b"second"}
    assert len(store.open(path).meta["recovered"]) == 2


def test_a_torn_manifest_at_any_byte(path, reopen, snapshot, same, tmp_path):
    """The segments of a torn frame carry it: what they hold is adopted."""
    whole = (path / "MANIFEST").read_bytes()
    starts = [end for _, end in manifest.scan(whole)]
    for length in range(starts[-2], starts[-1], 97):
        torn = tmp_path / str(length)
        shutil.copytree(path, torn)
        (torn / "MANIFEST").write_bytes(whole[:length])
        assert store.open(torn).steps == [0, 1, 2, 3]
        w = reopen(torn)
        assert w.progress == 5
        assert w.recovered["adopted"] == [2]
        assert w.acked_rows("outputs", "fc1") == 36
        w.append(snapshot(6))
        w.close()
        run = store.open(torn)
        assert run.tags["latest"] == 5
        for step, seen in enumerate(run.snapshots()):
            same.tensor(
                seen.streams["outputs", "fc1"],
                snapshot(step).streams["outputs", "fc1"],
            )
        assert run.steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_segment_that_is_not_whole_is_not_adopted(path, reopen, snapshot):
    whole = (path / "MANIFEST").read_bytes()
    end = [end for _, end in manifest.scan(whole)][-2]
    (path / "MANIFEST").write_bytes(whole[:end])
    last = path / "segments" / "00000002.h5"
    data = bytearray(last.read_bytes())
    data[
        store.open(path)._catalog.batches[0].parts["outputs", "fc1"][0].part.block
    ] ^= 1
    last.write_bytes(data)
    w = reopen(path)
    assert w.progress == 3
    assert w.recovered == {"quarantined": ["00000002.h5"]}
    w.append(snapshot(4))
    w.close()
    assert store.open(path).steps == [0, 1, 2, 3, 4]


def test_the_log_wins_over_an_earlier_try_that_left_its_segments(
    tmp_path, reopen, snapshot, same, monkeypatch
):
    """A commit fails at its frame and cannot remove what it wrote; the log goes on."""
    path = tmp_path / "run"
    w = store.create(path, meta={}, durability="append")
    w.append(snapshot(0))
    with monkeypatch.context() as patch:
        patch.setattr(w._manifest, "write", lambda frame: 1 / 0)
        patch.setattr(files, "discard", lambda path: None)
        with pytest.raises(ZeroDivisionError):
            w.commit()
    w.append(snapshot(1))
    w.abort()
    assert (path / "segments" / "00000000.h5").exists()
    again = reopen(path)
    assert again.recovered == {"quarantined": ["00000000.h5"]}
    again.close()
    for step, seen in enumerate(store.open(path).snapshots()):
        same(seen, snapshot(step))
    assert store.open(path).steps == [0, 1]


def test_damage_before_whole_frames_is_not_a_torn_tail(path, reopen):
    data = bytearray((path / "MANIFEST").read_bytes())
    start = next(end for _, end in manifest.scan(bytes(data)))
    data[start + 40] ^= 1
    (path / "MANIFEST").write_bytes(data)
    before = tree(path)
    with pytest.raises(CorruptSegment, match=f"damaged at byte {start}, and whole"):
        reopen(path)
    with pytest.raises(CorruptSegment, match="repscope check --repair"):
        store.open(path)
    assert tree(path) == before
    store.remove(path)  # the lock was let go


def test_a_listed_segment_that_is_damaged_is_reported_and_the_rest_goes_on(
    path, reopen, snapshot
):
    (path / "segments" / "00000001.h5").write_bytes(b"short")
    (path / "segments" / "00000000.h5").unlink()
    w = reopen(path)
    assert w.recovered == {"damaged": ["00000000.h5", "00000001.h5"]}
    w.append(snapshot(6))
    w.close()
    run = store.open(path)
    with pytest.raises(CorruptSegment, match="steps 2 and 3"):
        run.read("fc1", 2)
    assert run.read("fc1", 6).shape == (6, 5)


# -- rewinding ---------------------------------------------------------------
def test_a_rewind_hides_and_does_not_lose(path, reopen, snapshot, same):
    before = tree(path)
    w = reopen(path, at=2)
    assert w.progress == 2
    assert w.acked_rows("outputs", "fc1") == 36
    run = store.open(path)
    assert run.steps == [0, 1, 2]
    assert run.tags == {"at-0": 0, "at-1": 1, "at-2": 2, "latest": 2}
    assert run.scalars().index.tolist() == [0, 1, 2]
    assert [s.step for s in run.snapshots()] == [0, 1, 2]
    same.tensor(run.read("fc1"), snapshot(2).streams["outputs", "fc1"])
    assert run.labels().tolist() == [0, 1, 2, 0, 1, 2]
    g = torch.Generator().manual_seed(77)
    new = Snapshot(
        3, {("outputs", "fc1"): torch.randn(6, 5, generator=g)}, scalars={"loss": 7.0}
    )
    w.append(new)
    w.close()
    run = store.open(path)
    assert run.steps == [0, 1, 2, 3]
    same.tensor(run.read("fc1", 3), new.streams["outputs", "fc1"])
    assert run.labels(3) is None
    assert run.scalars()["loss"].tolist() == [1.0, 1 / 2, 1 / 3, 7.0]
    assert len(list(run.snapshots())) == 4
    after = tree(path)
    assert all(after[f] == before[f] for f in before if f.suffix == ".h5")


def test_rewinding_before_everything(path, reopen):
    w = reopen(path, at=0)
    assert store.open(path).steps == [0]
    w.close()
    for at in (-1, -5):
        with pytest.raises(UsageError, match=str(at)):
            reopen(path, at=at)


def test_a_stream_that_only_hidden_records_had_is_gone(create, reopen):
    w = create()
    w.append(Snapshot(0, {("outputs", "a"): torch.ones(1, 1)}))
    w.append(Snapshot(5, {("outputs", "b"): torch.ones(1, 1)}))
    w.close()
    reopen(w.path, at=3).close()
    run = store.open(w.path)
    assert run.layers == ["a"]
    assert run.shapes == {("outputs", "a"): (1, 1)}


# -- what is refused ---------------------------------------------------------
def test_widths_and_dtypes_are_known_again(path, reopen):
    w = reopen(path)
    with pytest.raises(ShapeChanged, match=r"\(5,\), at step 6 .*\(7,\)"):
        w.append(Snapshot(6, {("outputs", "fc1"): torch.ones(1, 7)}))
    with pytest.raises(DtypeChanged, match="float32"):
        w.append(Snapshot(6, {("outputs", "fc1"): torch.ones(1, 5).double()}))
    with pytest.raises(ShapeChanged):
        w.append(Snapshot(6, {("weights", "fc2.weight"): torch.ones(5, 3)}))
    with pytest.raises(DtypeChanged, match="labels"):
        w.append(Snapshot(6, {}, labels=torch.ones(1, dtype=torch.int8)))


def test_a_live_writer_is_left_alone(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.commit()
    before = tree(w.path)
    with pytest.raises(StoreLocked, match=r"process \d+ on .*every rank"):
        store.reopen(w.path)
    assert tree(w.path) == before
    w.append(snapshot(1))
    w.close()
    assert store.open(w.path).steps == [0, 1]


def test_no_store_gets_no_lock(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "thesis.tex"):
        with pytest.raises(NotAStore):
            store.reopen(path)
        assert not store.is_stillborn(path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_stillborn_stores(tmp_path, create, snapshot):
    """A writer may die at any moment of making a store."""
    w = create()
    files = {f.name: f.read_bytes() for f in w.path.iterdir() if f.is_file()}
    path = tmp_path / "unborn"
    path.mkdir()
    assert store.is_stillborn(path)
    for name in ("LOCK", "FORMAT", ".tmp-x"):
        (path / name).write_bytes(files.get(name, b""))
        assert store.is_stillborn(path)
    (path / "segments").mkdir()
    for length in (0, 3, len(files["MANIFEST"]) - 1):
        (path / "MANIFEST").write_bytes(files["MANIFEST"][:length])
        assert store.is_stillborn(path)
    (path / "segments" / "0.h5").write_text("data")
    assert not store.is_stillborn(path)
    assert not store.is_stillborn(w.path)


def test_nonsense_is_not_gone_on_with(path, reopen):
    data = (path / "MANIFEST").read_bytes()
    frames = len(list(manifest.decode(data)))
    bad = manifest.encode(frames, {"steps": [[0, 10**15, 1]]})
    (path / "MANIFEST").write_bytes(data + bad)
    before = tree(path)
    with pytest.raises(StoreError, match="makes no sense"):
        reopen(path)
    assert tree(path) == before
