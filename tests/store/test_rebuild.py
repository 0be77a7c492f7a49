"""A manifest that is damaged, cut or deleted is made again from the segments."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from repscope import store
from repscope.errors import CorruptSegment, FormatTooNew, NotAStore, StoreLocked
from repscope.snapshot import Snapshot
from repscope.store import compact, files, manifest, rebuild, segment, writer


def everything(path):
    run = store.open(path)
    return list(run.snapshots()), run.tags, run.steps, run.progress


@pytest.fixture
def unchanged(same):
    """Return a function that asserts a store to show what it showed before."""

    def check(path, before):
        seen, tags, steps, progress = everything(path)
        assert (tags, steps, progress) == before[1:]
        assert len(seen) == len(before[0])
        for a, b in zip(seen, before[0], strict=True):
            same(a, b)

    return check


@pytest.fixture
def path(create, snapshot, monkeypatch):
    """Commits of one and of several segments, notes, merges and a rewind."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 2**15)
    monkeypatch.setattr(segment, "CHUNK_BYTES", 512)
    monkeypatch.setattr(compact, "FAN", 3)
    w = create(seed=4, note="kept")
    for step in range(12):
        w.append(snapshot(step, tags=(f"t{step}",) if step % 5 == 0 else ()))
        w.progress = step
        if step % 2:
            w.commit()
    w.abort()
    w = store.reopen(w.path, at=9)
    assert any(batch.level for batch in w._batches)
    w.annotate(later="noted")
    big = {("outputs", "big"): torch.randn(2500, 5, generator=torch.manual_seed(0))}
    w.append(Snapshot(12, big, tags=("big",)))
    w.append(snapshot(13))
    w.close()
    run = store.open(w.path)
    assert 11 not in run.steps  # hidden by the rewind
    assert any(batch.n_segments > 1 for batch in run._catalog.batches)
    return w.path


def test_a_sound_store_needs_no_repair(path, unchanged):
    before = everything(path)
    assert store.repair(path) == {}
    unchanged(path, before)
    assert store.open(path).closed


def test_a_deleted_manifest(path, unchanged):
    before = everything(path)
    (path / "MANIFEST").unlink()
    with pytest.raises(NotAStore, match=r"no MANIFEST.*`repscope check --repair"):
        store.open(path)
    found = store.repair(path)
    assert found["kept"] == 0
    assert found["restored"] > 3
    unchanged(path, before)
    meta = store.open(path).meta
    assert (meta["seed"], meta["note"], meta["later"]) == (4, "kept", "noted")
    assert meta["rebuilt"] == [found]
    again = store.reopen(path)  # and it goes on
    again.append(Snapshot(20, {("outputs", "fc1"): torch.ones(1, 5)}))
    again.close()
    assert store.open(path).steps[-1] == 20


@pytest.mark.parametrize("name", ["FORMAT", "MANIFEST"])
@pytest.mark.parametrize("content", [None, b"", b"rubbish" * 9])
def test_a_lost_file(path, unchanged, name, content):
    before = everything(path)
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(NotAStore):
        store.open(path)
    store.repair(path)
    unchanged(path, before)


def test_damage_to_any_frame_costs_no_row(path, unchanged, tmp_path):
    before = everything(path)
    whole = (path / "MANIFEST").read_bytes()
    ends = [end for _, end in manifest.scan(whole)]
    assert len(ends) > 10
    for number, end in enumerate(ends):
        broken = tmp_path / f"copy{number}"
        shutil.copytree(path, broken)
        data = bytearray(whole)
        data[end - 9] ^= 4
        (broken / "MANIFEST").write_bytes(data)
        if number < len(ends) - 1:
            with pytest.raises(CorruptSegment, match="--repair"):
                store.open(broken)
        found = store.repair(broken)
        assert found
        unchanged(broken, before)
        quarantine = [f.name for f in (broken / "quarantine").iterdir()]
        assert any(name.startswith("MANIFEST") for name in quarantine)


def test_two_damaged_frames_and_a_lost_segment(path, same):
    run = store.open(path)
    lost = run._catalog.batches[1]
    whole = bytearray((path / "MANIFEST").read_bytes())
    ends = [end for _, end in manifest.scan(bytes(whole))]
    for end in ends[1:]:
        whole[end - 9] ^= 4
    (path / "MANIFEST").write_bytes(whole)
    for number in lost.numbers:
        manifest.locate(path, number).unlink()
    with pytest.raises(CorruptSegment, match="has lost its end"):
        store.reopen(path)
    found = store.repair(path)
    assert found["kept"] == 1
    assert found["lost_frames"]
    rest = store.open(path)
    assert set(rest.steps) == set(run.steps) - set(lost.steps.tolist())
    for seen in rest.snapshots():
        for key, value in seen.streams.items():
            same.tensor(value, run.read(key[1], seen.step, target=key[0]))


def test_what_only_the_log_has_survives_a_lost_manifest(tmp_path, snapshot, same):
    path = tmp_path / "run"
    w = store.create(path, meta={"seed": 1}, durability="append")
    for step in range(4):
        w.append(snapshot(step))
        if step == 1:
            w.commit()
    w.abort()
    (path / "MANIFEST").unlink()
    store.repair(path)
    run = store.open(path)
    assert run.steps == [0, 1, 2, 3]
    for seen in run.snapshots():
        same(seen, snapshot(seen.step))


def test_of_a_commit_that_was_tried_twice_the_later_try_counts(
    create, snapshot, same, monkeypatch
):
    """The first frame was written and not synced: its segments had to stay."""
    w = create()
    w.append(snapshot(0))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_sync_data", lambda fd: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            w.commit()
    w.append(snapshot(1))
    w.close()
    assert len(list((w.path / "segments").iterdir())) == 2
    (w.path / "MANIFEST").unlink()
    store.repair(w.path)
    run = store.open(w.path)
    assert run.steps == [0, 1]
    for seen in run.snapshots():
        same(seen, snapshot(seen.step))


# -- what cannot be repaired --------------------------------------------------
def test_nothing_to_make_it_of(create, tmp_path, snapshot):
    with pytest.raises(NotAStore, match="neither FORMAT nor segments"):
        store.repair(tmp_path)
    w = create()
    w.append(snapshot(0))
    w.close()
    for file in (w.path / "segments").iterdir():
        file.write_bytes(b"gone")
    (w.path / "MANIFEST").unlink()
    with pytest.raises(CorruptSegment, match="nothing tells which rows"):
        store.repair(w.path)
    store.remove(w.path)  # the lock was let go


def test_a_living_writer_is_left_alone(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.commit()
    with pytest.raises(StoreLocked):
        store.repair(w.path)


def test_a_newer_format_is_left_alone(path):
    (path / "FORMAT").write_text("RepScope store\nversion 9\n")
    (path / "MANIFEST").unlink()
    (path / "MANIFEST").write_bytes(b"")
    with pytest.raises(FormatTooNew):
        store.repair(path)


def test_damaged_rows_stay_damaged_and_say_so(path):
    file = sorted((path / "segments").iterdir())[0]
    stored = store.open(path)._catalog.batches[0].parts["outputs", "fc1"][0]
    data = bytearray(file.read_bytes())
    data[stored.part.block] ^= 1
    file.write_bytes(data)
    (path / "MANIFEST").unlink()
    store.repair(path)
    with pytest.raises(CorruptSegment, match="layer 'fc1'"):
        list(store.open(path).snapshots())


@pytest.mark.parametrize("where", ["frame", "checksums"])
def test_a_segment_whose_own_copy_is_damaged_carries_nothing(path, where):
    file = sorted((path / "segments").iterdir())[0]
    data = bytearray(file.read_bytes())
    seq, body = rebuild.carried(file)
    assert seq > 0
    assert body["run"]["meta"]["seed"] == 4
    at = data.rfind(manifest.MAGIC) + 30 if where == "frame" else body["@crc32"]
    data[at] ^= 1
    file.write_bytes(data)
    assert rebuild.carried(file) is None


def test_a_forged_copy_is_not_believed(path):
    """A good checksum over nonsense: refused as in the manifest."""
    file = sorted((path / "segments").iterdir())[0]
    data = file.read_bytes()
    at = data.rfind(manifest.MAGIC)
    body, seq, _ = manifest.frame_at(data, at)
    for change in ({"parts": 3}, {"@crc32": "x"}, {"frame": {"steps": [[0, -1, 0]]}}):
        forged = manifest.encode(seq, json.loads(json.dumps({**body, **change})))
        file.write_bytes(data[:at] + forged)
        assert rebuild.carried(file) is None


def test_a_merge_that_spans_a_rewind(create, snapshot, unchanged):
    """What the rewind hid the merged batch says itself: it must not hide it twice."""
    w = create()
    for step in range(10):
        w.append(snapshot(step))
        w.progress = step
        w.commit()
    w.abort()
    w = store.reopen(w.path, at=4)
    for step in range(5, 12):
        w.append(snapshot(step))
        w.progress = step
        w.commit()
    assert any(b.level and b.frames[0] < 11 < b.frames[1] for b in w._batches)
    w.close()
    before = everything(w.path)
    assert before[2] == list(range(12))
    (w.path / "MANIFEST").unlink()
    assert store.repair(w.path)["lost_frames"] == []
    unchanged(w.path, before)


def test_what_a_merge_left_behind_is_not_taken_twice(
    create, snapshot, unchanged, monkeypatch
):
    """Killed before it removed the old segments; then the manifest is lost."""
    monkeypatch.setattr(compact, "FAN", 3)
    for notes in (1, 3):
        w = create(f"run{notes}")
        for number in range(notes):
            w.annotate(number=number)
            w.commit()
        with monkeypatch.context() as patch:
            patch.setattr(files, "discard", lambda path: None)
            for step in range(3):
                w.append(snapshot(step))
                w.progress = step
                w.commit()
        w.abort()
        assert len(list((w.path / "segments").glob("0*"))) == 4
        before = everything(w.path)
        (w.path / "MANIFEST").unlink()
        store.repair(w.path)
        unchanged(w.path, before)


def test_notes_that_spell_the_magic(create, snapshot, unchanged):
    w = create(note="uses RSF1 frames", other="RSF1" * 9)
    w.append(snapshot(0, tags=("RSF1",)))
    w.close()
    before = everything(w.path)
    (w.path / "MANIFEST").unlink()
    store.repair(w.path)
    unchanged(w.path, before)


def test_an_interruption_that_was_resumed_stays_forgotten(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.annotate(interrupted="KeyboardInterrupt")
    w.close()
    w = store.reopen(w.path)
    w.append(snapshot(1))
    w.close()
    assert "interrupted" not in store.open(w.path).meta
    (w.path / "MANIFEST").unlink()
    store.repair(w.path)
    assert "interrupted" not in store.open(w.path).meta


def test_a_repair_of_what_is_sound_writes_nothing(path):
    before = (path / "MANIFEST").read_bytes()
    for _ in range(2):
        assert store.repair(path) == {}
    assert (path / "MANIFEST").read_bytes() == before
