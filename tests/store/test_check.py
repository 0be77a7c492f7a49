"""What `check` finds, and that looking changes nothing."""

from __future__ import annotations

import os
import shutil

import h5py
import pytest

from repscope import store
from repscope.errors import FormatTooNew, NotAStore
from repscope.store import compact, manifest, verify


@pytest.fixture
def path(create, snapshot, tiny):
    """Thirty steps in several segments of small chunks."""
    w = create(seed=1)
    for step in range(30):
        w.append(snapshot(step))
        if step % 10 == 9:
            w.commit()
    w.close()
    return w.path


@pytest.fixture(params=["directory", "none", "gzip"])
def sound(request, path, tmp_path):
    """The same run as a directory and as one file."""
    if request.param == "directory":
        return path
    store.pack(path, tmp_path / "one.h5", compression=request.param)
    return tmp_path / "one.h5"


def tree(path):
    return {f: (f.read_bytes(), f.stat().st_mtime_ns)
            for f in path.parent.rglob("*") if f.is_file()}  # fmt: skip


def states(found, state):
    return [each.item for each in found.findings if each.state == state]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("trust", ["default", "untrusted"])
def test_a_sound_store(sound, full, trust):
    before = tree(sound)
    found = store.check(sound, full=full, trust=trust)
    assert not found.damaged
    assert states(found, "ok") == ["MANIFEST", "segments"]
    assert not states(found, "note")
    assert "30 steps, steps 0 to 29, closed" in found.findings[0].detail
    assert list(found.to_frame().columns) == ["item", "state", "detail"]
    assert tree(sound) == before


def test_one_flipped_bit_anywhere_in_the_data(sound):
    """Sizes cannot tell; every byte can, also of what was read before."""
    run = store.open(sound)
    run.read("fc1", 3)
    stored = run._catalog.batches[0].parts["outputs", "fc1"][0]
    at = stored.part.chunks[0][0]
    info = stored.path.stat()
    with stored.path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(stored.path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert not store.check(sound).damaged
    found = store.check(sound, full=True)
    assert found.damaged
    [damaged] = [each for each in found.findings if each.state == "damaged"]
    assert damaged.item.endswith(stored.path.name)
    words = "other bytes than were written: outputs of layer 'fc1' at steps 0"
    assert damaged.detail.startswith(words)


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_segment_that_is_not_there(path, how):
    file = path / "segments" / "00000001.h5"
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    found = store.check(path)
    [damaged] = [each for each in found.findings if each.state == "damaged"]
    assert damaged.item == "segments/00000001.h5"
    assert "outputs of layer 'fc1' at" in damaged.detail
    assert "is missing" in damaged.detail or "bytes instead of" in damaged.detail
    assert "of" in found.findings[-1].detail


def test_damage_to_the_structure_is_for_other_readers(path, same):
    """Ours reads by address: the numbers are right, and h5py cannot open the file."""
    file = path / "segments" / "00000000.h5"
    want = store.open(path).read("fc1", 0)
    data = bytearray(file.read_bytes())
    data[:8] = b"not hdf5"
    file.write_bytes(data)
    with pytest.raises(OSError, match="signature"):
        h5py.File(file)
    same.tensor(store.open(path).read("fc1", 0), want)
    assert not store.check(path).damaged
    found = store.check(path, full=True)
    assert found.damaged
    assert "other HDF5 readers cannot be trusted" in found.findings[1].detail


def test_a_manifest_that_cannot_be_read(path):
    (path / "MANIFEST").unlink()
    found = store.check(path)
    assert found.damaged
    assert "--repair" in found.findings[0].detail
    assert "carry" in found.findings[1].detail
    (path / "segments").rename(path / "gone")
    assert len(store.check(path).findings) == 1


def test_a_manifest_that_lost_its_end(path, tmp_path):
    whole = (path / "MANIFEST").read_bytes()
    ends = [end for _, end in manifest.scan(whole)]
    for keep, damaged in ((len(ends) - 2, False), (2, True)):
        cut = tmp_path / f"cut{keep}"
        shutil.copytree(path, cut)
        (cut / "MANIFEST").write_bytes(whole[: ends[keep - 1] + 7])
        found = store.check(cut)
        assert found.damaged is damaged
        assert "7 bytes after its end" in found.to_frame()["detail"].str.cat()
        assert store.repair(cut)
        assert store.open(cut).steps == list(range(30))
        assert not store.check(cut, full=True).damaged


def test_what_is_worth_knowing(tmp_path, snapshot):
    w = store.create(tmp_path / "run", meta={}, durability="append")
    w.append(snapshot(0))
    w.commit()
    w.append(snapshot(1))
    w.abort()
    (w.path / "quarantine").mkdir()
    (w.path / "quarantine" / "x").write_text("x")
    found = store.check(w.path)
    assert not found.damaged
    assert states(found, "note") == ["wal", "quarantine"]


def test_no_store_and_a_newer_one(path, tmp_path):
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotAStore):
            store.check(nothing)
    (tmp_path / "text.h5").write_text("text")
    assert store.check(tmp_path / "text.h5").damaged
    (path / "FORMAT").write_text("RepScope store\nversion 9\n")
    with pytest.raises(FormatTooNew):
        store.check(path)


def test_many_damaged_streams_are_counted(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.close()
    (w.path / "segments" / "00000000.h5").unlink()
    found = store.check(w.path)
    assert "scalar 'loss'" in found.findings[1].detail or "more" in (
        found.findings[1].detail
    )


def test_a_store_that_is_written_and_merged_meanwhile_is_sound(
    create, snapshot, monkeypatch
):
    monkeypatch.setattr(compact, "FAN", 2)
    w = create()
    w.append(snapshot(0))
    w.commit()
    real, steps = verify._segments, iter(range(1, 3))

    def slow(catalog, full):
        for step in steps:  # once: a merge removes what the first catalog names
            w.append(snapshot(step))
            w.commit()
        return real(catalog, full)

    monkeypatch.setattr(verify, "_segments", slow)
    assert not store.check(w.path, full=True).damaged
