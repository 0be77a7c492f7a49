"""``runs/a.h5``: a directory while it is recorded, one file in the end."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import repscope as rs
from repscope import store
from repscope.errors import NotAStore, StoreExists, StoreFull, StoreLocked
from repscope.store import files, onefile, packing, recovery


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "a.h5"


def names(path):
    return sorted(f.name for f in path.parent.iterdir())


def record(path, snapshot, steps, **options):
    w = store.create(path, meta={"seed": 2}, **options)
    for step in steps:
        w.append(snapshot(step))
        w.progress = step
    return w


def check(path, snapshot, same, steps):
    seen = list(store.open(path).snapshots())
    assert [s.step for s in seen] == steps
    for each in seen:
        same(each, snapshot(each.step))


def test_whichever_is_there_is_found(path, snapshot, same):
    w = record(path, snapshot, range(3))
    w.commit()
    assert names(path) == ["a.h5.rscope"]
    run = store.open(path)
    assert (run.path, run.name, run.closed) == (path, "a.h5", False)
    check(path, snapshot, same, [0, 1, 2])
    w.append(snapshot(3))
    w.close()
    w.close()
    assert names(path) == ["a.h5"]
    check(path, snapshot, same, [0, 1, 2, 3])
    with pytest.raises(NotAStore, match=r"packed into one file.*refresh"):
        run.read("fc1", 0)
    assert run.refresh().closed
    assert run.meta["seed"] == 2


def test_after_a_kill_the_directory_is_the_run(path, snapshot, same):
    w = record(path, snapshot, range(3))
    w.commit()
    w.abort()
    check(path, snapshot, same, [0, 1, 2])
    with pytest.raises(StoreExists, match="left untouched"):
        store.create(path, meta={})
    store.pack(path, path)  # finishes it
    assert names(path) == ["a.h5"]
    check(path, snapshot, same, [0, 1, 2])
    with pytest.raises(StoreExists, match=r"a\.h5 exists"):
        store.create(path, meta={})


def test_a_living_run_is_not_finished_by_somebody_else(path, snapshot):
    w = record(path, snapshot, range(3))
    with pytest.raises(StoreLocked):
        store.pack(path, path)
    with pytest.raises(StoreLocked):
        store.remove(path)
    w.close()
    store.remove(path)
    assert not store.exists(path)
    with pytest.raises(FileNotFoundError):
        store.remove(path)


def test_go_on_with_a_packed_run(path, snapshot, same):
    record(path, snapshot, range(4)).close()
    w = store.reopen(path, at=2)
    assert w.progress == 2
    assert names(path) == ["a.h5", "a.h5.rscope"]
    check(path, snapshot, same, [0, 1, 2])  # the directory is the newer one
    w.append(snapshot(5))
    w.close()
    assert names(path) == ["a.h5"]
    check(path, snapshot, same, [0, 1, 2, 5])
    again = store.reopen(path)
    assert again.progress == 5
    again.abort()
    check(path, snapshot, same, [0, 1, 2, 5])


def test_a_kill_between_packing_and_removing(path, snapshot, same, monkeypatch):
    w = record(path, snapshot, range(3))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_compare", killed)
        with pytest.raises(KeyboardInterrupt):
            w.close()
    assert names(path) == ["a.h5.rscope"]
    check(path, snapshot, same, [0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        w.close()
    assert len(names(path)) == 2  # the file, and a directory with another name
    check(path, snapshot, same, [0, 1, 2])
    (path.parent / ".tmp-a.h5-123").write_text("half a file")
    (path.parent / ".tmp-a.h52").write_text("a stranger's")
    store.reopen(path).close()
    assert names(path) == [".tmp-a.h52", "a.h5"]
    check(path, snapshot, same, [0, 1, 2])


def test_a_folder_that_does_not_sync_after_the_last_rename(
    path, snapshot, same, monkeypatch
):
    """The file is complete by then: the run is closed, not half closed for ever."""
    w = record(path, snapshot, range(3))
    real = files.sync_directory

    def fails(folder):
        if folder == path.parent and not onefile.workplace(path).exists():
            raise OSError(5, "Input/output error")
        real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_directory", fails)
        w.close()
    assert w.closed
    assert names(path) == ["a.h5"]
    check(path, snapshot, same, [0, 1, 2])


def test_a_disk_too_full_to_pack_keeps_the_directory(path, snapshot, same, monkeypatch):
    w = record(path, snapshot, range(3))

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "pwrite", full)
        with pytest.raises(StoreFull, match="is as it was"):
            w.close()
    check(path, snapshot, same, [0, 1, 2])
    w.close()
    assert names(path) == ["a.h5"]


def test_an_unpacking_that_is_interrupted_leaves_the_file(path, snapshot, monkeypatch):
    record(path, snapshot, range(3)).close()
    before = path.read_bytes()

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.reopen(path)
    assert names(path) == ["a.h5"]
    assert path.read_bytes() == before


def test_somebody_goes_on_with_the_run_while_it_is_unpacked(
    path, snapshot, same, monkeypatch
):
    record(path, snapshot, range(2)).close()
    real, raced = recovery._copy_out, []

    def slow(file, temp):
        real(file, temp)
        if not raced:
            raced.append(True)
            other = store.reopen(path)  # in life, another process
            other.append(snapshot(2))
            other.close()
            real(file, temp) if not temp.exists() else None

    monkeypatch.setattr(recovery, "_copy_out", slow)
    store.reopen(path).close()
    check(path, snapshot, same, [0, 1, 2])


def test_a_directory_with_that_ending_stays_a_directory(tmp_path, snapshot, same):
    odd = tmp_path / "odd.h5"
    record(tmp_path / "run", snapshot, range(2)).close()
    (tmp_path / "run").rename(odd)
    check(odd, snapshot, same, [0, 1])
    store.reopen(odd).close()
    assert odd.is_dir()


def test_nothing_to_repair_in_a_file(path, snapshot):
    record(path, snapshot, range(2)).close()
    assert store.repair(path) == {}


def test_stillborn(path):
    assert not store.is_stillborn(path)
    onefile.workplace(path).mkdir(parents=True)
    (onefile.workplace(path) / "LOCK").touch()
    assert store.is_stillborn(path)


# -- the recorder ---------------------------------------------------------------
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())


def test_a_recorder_that_makes_one_file(path):
    net, x = model(), torch.randn(8, 4)
    with rs.Recorder(net, path, every=1, probe=x) as rec:
        rec.step(loss=1.0)
        rec.commit()
        assert rs.open(path).steps == [0, 1]
        assert rec.path == path
    assert names(path) == ["a.h5"]
    assert rs.open(path).steps == [0, 1]
    with pytest.raises(StoreExists):
        rs.Recorder(net, path, every=1, probe=x)
    with rs.Recorder(net, path, every=1, probe=x, resume=True) as rec:
        assert rec.step_number == 1
        rec.step(loss=0.5)
    assert rs.open(path).steps == [0, 1, 2]
    assert rs.measure(path, metrics=["effective_rank"])["run"].unique() == ["a.h5"]
    assert names(path) == ["a.h5"]


def test_resume_makes_the_file_if_nothing_is_there(path):
    net, x = model(), torch.randn(8, 4)
    with rs.Recorder(net, path, every=1, probe=x, resume=True) as rec:
        rec.step()
    assert names(path) == ["a.h5"]


def test_a_constructor_that_fails_leaves_nothing(path):
    with pytest.raises(Exception, match="nothing"):
        rs.Recorder(model(), path, layers="nothing", probe=torch.randn(2, 4))
    assert not path.parent.exists() or names(path) == []


def test_a_resumed_run_that_was_killed_is_finished_too(path, snapshot, same):
    record(path, snapshot, range(2)).close()
    w = store.reopen(path)
    w.append(snapshot(2))
    w.commit()
    w.abort()
    assert names(path) == ["a.h5", "a.h5.rscope"]
    store.pack(path, path)
    assert names(path) == ["a.h5"]
    check(path, snapshot, same, [0, 1, 2])


def test_nothing_else_is_packed_where_a_run_will_be(path, snapshot, tmp_path):
    record(tmp_path / "other", snapshot, range(2)).close()
    w = record(path, snapshot, range(3))
    with pytest.raises(StoreExists, match="a run that becomes"):
        store.pack(tmp_path / "other", path)
    w.close()
    assert store.open(path).steps == [0, 1, 2]
