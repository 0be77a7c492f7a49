"""Kills, full disks and failing syncs: acknowledged rows outlive them all."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from repscope import store
from repscope.errors import StoreFull, StoreWriteError
from repscope.snapshot import Snapshot
from repscope.store import manifest as manifest_module
from repscope.store import segment as segment_module


class Disk:
    """Stands in for ``os.write``: takes ``room`` bytes, then fails half-way."""

    def __init__(self, monkeypatch, code=errno.ENOSPC):
        self.room = 10**12
        self._code = code
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd, data):
        taken = min(len(data), self.room)
        if not taken:
            raise OSError(self._code, os.strerror(self._code))
        self.room -= taken
        return self._write(fd, data[:taken])


def leftovers(path):
    """Return the files no reader would miss."""
    run = store.open(path)
    named = {p.path.name for b in run._catalog._batches for ps in b.parts.values()
             for p in ps}  # fmt: skip
    return {f.name for f in (path / "segments").iterdir()} - named


def check(path, snapshot, same, steps):
    run = store.open(path)
    seen = list(run.snapshots())
    assert [s.step for s in seen] == steps
    for each in seen:
        same(each, snapshot(each.step))


# -- full disks --------------------------------------------------------------
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(create, snapshot, same, monkeypatch, code):
    w = create()
    w.append(snapshot(0))
    w.commit()
    w.append(snapshot(1))
    disk = Disk(monkeypatch, code)
    disk.room = 1000
    with pytest.raises(StoreFull, match=r"no space left .*commit\(\) again") as caught:
        w.commit()
    assert caught.value.errno == code
    assert w.acked_rows("outputs", "fc1") == 6
    assert w.pending_bytes > 0
    assert not leftovers(w.path)
    check(w.path, snapshot, same, [0])
    with pytest.raises(StoreFull):
        w.close()  # what is not durable is not closed either
    w.append(snapshot(2))
    disk.room = 10**12
    w.close()
    assert w.acked_rows("outputs", "fc1") == 18
    check(w.path, snapshot, same, [0, 1, 2])


def test_a_disk_that_fills_after_any_number_of_bytes(create, tiny, same, monkeypatch):
    """Every place where a commit of several segments can run out of space."""

    def steps(step):
        g = torch.Generator().manual_seed(step)
        return Snapshot(step, {("outputs", "a"): torch.randn(60, 50, generator=g)})

    disk = Disk(monkeypatch)
    w = create()
    w.append(steps(0))
    w.commit()
    disk.room = 0
    with pytest.raises(StoreFull):  # larger than a segment: commits at once
        w.append(steps(1))
    room = failures = 0
    while True:
        disk.room = room
        try:
            w.commit()
        except StoreFull:
            failures += 1
            assert not leftovers(w.path)
            check(w.path, steps, same, [0])
            room += 331
        else:
            break
    assert failures > 30
    check(w.path, steps, same, [0, 1])
    disk.room = 10**12
    w.append(steps(2))
    w.close()
    assert not leftovers(w.path)
    check(w.path, steps, same, [0, 1, 2])


def test_a_full_disk_in_an_automatic_commit_keeps_the_snapshot(
    create, snapshot, same, tiny, monkeypatch
):
    w = create()
    disk = Disk(monkeypatch)
    disk.room = 0
    step = -1
    with pytest.raises(StoreFull):  # noqa: PT012 - which append commits is its affair
        for step in range(100):
            w.append(snapshot(step))
    disk.room = 10**12
    w.close()
    check(w.path, snapshot, same, list(range(step + 1)))


def test_no_space_for_the_closing_frame(create, snapshot, monkeypatch):
    w = create()
    w.append(snapshot(0))
    w.commit()
    disk = Disk(monkeypatch)
    disk.room = 5
    with pytest.raises(StoreFull):
        w.close()
    assert not store.open(w.path).closed
    disk.room = 10**12
    w.close()
    assert store.open(w.path).closed


def test_no_space_to_create_leaves_nothing(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    for room in range(0, 160, 9):
        disk.room = room
        with pytest.raises(StoreFull, match="nothing is left"):
            store.create(tmp_path / "run", meta={"note": "x" * 100})
        assert not (tmp_path / "run").exists()
    disk.room = 10**12
    store.create(tmp_path / "run", meta={}).close()


# -- other errors ------------------------------------------------------------
def failing(monkeypatch, owner, name, *, times=1):
    """Let a sync of the operating system fail ``times`` times."""
    real, left = getattr(owner, name), [times]

    def sync(fd):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    monkeypatch.setattr(owner, name, sync)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_segment_that_does_not_sync_is_written_anew(
    create, snapshot, same, monkeypatch, times
):
    w = create()
    w.append(snapshot(0))
    failing(monkeypatch, os, "fsync", times=times)
    for _ in range(times):
        with pytest.raises(StoreWriteError) as caught:
            w.commit()
        assert caught.value.errno == errno.EIO
        assert w.acked_rows("outputs", "fc1") == 0
        assert not leftovers(w.path)
    w.close()
    check(w.path, snapshot, same, [0])


def test_a_manifest_that_does_not_sync_is_replaced(create, snapshot, same, monkeypatch):
    w = create()
    w.append(snapshot(0))
    w.commit()
    file = w.path / "MANIFEST"
    before = file.stat().st_ino
    w.append(snapshot(1))
    failing(monkeypatch, manifest_module, "_sync_data")
    with pytest.raises(StoreWriteError):
        w.commit()
    assert w.acked_rows("outputs", "fc1") == 6
    # nobody knows whether the frame survives: what it names must
    assert store.open(w.path).read("fc1", 0).shape == (6, 5)
    w.append(snapshot(2))
    w.commit()
    assert file.stat().st_ino != before
    check(w.path, snapshot, same, [0, 1, 2])
    w.close()
    assert store.open(w.path).closed
    assert not list(w.path.glob(".tmp*"))


def test_the_directory_is_deleted_meanwhile(create, snapshot, tmp_path):
    w = create()
    w.append(snapshot(0))
    w.path.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreWriteError) as caught:
        w.commit()
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "elsewhere").rename(w.path)
    w.commit()
    assert store.open(w.path).steps == [0]


def test_an_image_that_does_not_read_back_is_not_written(
    create, snapshot, same, monkeypatch
):
    w = create()
    w.append(snapshot(0))
    real = segment_module._add

    def wrong(file, column):
        part = real(file, column)
        if part.chunks:
            part.chunks[0][0] += 64
        return part

    monkeypatch.setattr(segment_module, "_add", wrong)
    with pytest.raises(StoreWriteError, match="did not read back"):
        w.commit()
    assert not list((w.path / "segments").iterdir())
    monkeypatch.setattr(segment_module, "_add", real)
    w.close()
    check(w.path, snapshot, same, [0])


def test_an_interrupted_commit_can_be_repeated(create, snapshot, same, monkeypatch):
    w = create()
    w.append(snapshot(0))
    write = os.write

    def interrupted(fd, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        w.commit()
    monkeypatch.setattr(os, "write", write)
    assert not leftovers(w.path)
    w.close()
    check(w.path, snapshot, same, [0])


# -- the order that makes it durable -----------------------------------------
def test_a_frame_is_written_only_after_what_it_names_is_durable(
    create, snapshot, monkeypatch
):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("tells files by /proc")
    events = []

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(fd, *rest):
            file = (
                fd if isinstance(fd, Path) else Path(f"/proc/self/fd/{fd}").readlink()
            )
            acked = w.acked_rows("outputs", "fc1")
            events.append((name, re.sub(r"\d+-\d+", "N", file.name), acked))
            return real(fd, *rest)

        monkeypatch.setattr(owner, name, watched)

    w = create()
    w.append(snapshot(0))
    for name in ("write", "fsync"):
        watch(os, name)
    watch(manifest_module, "_sync_data")
    watch(Path, "rename")
    w.commit()
    assert events == [
        ("write", ".tmp-N", 0),
        ("fsync", ".tmp-N", 0),
        ("rename", ".tmp-N", 0),
        ("fsync", "segments", 0),
        ("write", "MANIFEST", 0),
        ("_sync_data", "MANIFEST", 0),
    ]
    assert w.acked_rows("outputs", "fc1") == 6


# -- kills -------------------------------------------------------------------
def rows(step):
    """Return what the killed process records at a step."""
    return torch.arange(4 * 8, dtype=torch.float32).reshape(4, 8) + 1000 * step


def record_until_killed(path, acks):
    w = store.create(path, meta={})
    step = 0
    while True:
        streams = {("outputs", "a"): rows(step), ("weights", "w"): rows(step)}
        w.append(Snapshot(step, streams, scalars={"loss": float(step)}))
        step += 1
        if step % 3 == 0:
            w.commit()
            acks.send(w.acked_rows("outputs", "a"))


@pytest.mark.parametrize("seed", range(6))
def test_no_acknowledged_row_is_lost_by_a_kill(tmp_path, same, seed):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    path = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python >= 3.12, threads
        child = context.Process(target=record_until_killed, args=(path, theirs))
        child.start()
    theirs.close()
    acked = 0
    while not acked:  # the kill comes once something was acknowledged
        acked = ours.recv()
    time.sleep(random.Random(seed).uniform(0, 0.3))
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    while True:
        try:
            acked = ours.recv()
        except EOFError:
            break
    run = store.open(path)
    assert 4 * len(run.steps) >= acked
    assert run.steps == list(range(len(run.steps)))
    for seen in run.snapshots():
        same.tensor(seen.streams["outputs", "a"], rows(seen.step))
        same.tensor(seen.streams["weights", "w"], rows(seen.step))
    assert run.scalars()["loss"].tolist() == run.steps
    assert not run.closed
