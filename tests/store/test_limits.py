"""The size a store may have, disks that fill while training, and missing flock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

import repscope as rs
from repscope import store
from repscope.errors import RepScopeWarning, StoreFull, StoreLocked, UsageError
from repscope.snapshot import Snapshot
from repscope.store import files
from repscope.store.lock import Lock


def size_of(path):
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


@pytest.mark.parametrize("durability", ["batch", "append"])
@pytest.mark.parametrize("each", [1, 7])
def test_a_store_stays_below_its_limit(tmp_path, same, durability, each):
    limit = 400_000
    w = store.create(
        tmp_path / "run", meta={}, durability=durability, max_store_bytes=limit
    )
    rows = {i: torch.full((20, 50), float(i)) for i in range(200)}
    with pytest.raises(StoreFull, match="max_store_bytes=400000") as caught:  # noqa: PT012
        for i, tensor in rows.items():
            w.append(Snapshot(i, {("outputs", "a"): tensor}))
            if i % each == 0:
                w.commit()
            assert size_of(w.path) <= limit
    assert caught.value.errno == errno.EDQUOT
    w.close()
    assert size_of(w.path) <= limit
    run = store.open(w.path)
    assert len(run.steps) > 25
    assert run.steps == list(range(len(run.steps)))
    for step in run.steps:
        same.tensor(run.read("a", step), rows[step])
    again = store.reopen(w.path, max_store_bytes=limit)
    with pytest.raises(StoreFull):
        again.append(Snapshot(999, {("outputs", "a"): torch.ones(2000, 50)}))
    again.abort()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_positive(tmp_path, limit):
    with pytest.raises(UsageError, match="max_store_bytes is above 0"):
        store.create(tmp_path / "run", meta={}, max_store_bytes=limit)


# -- training goes on --------------------------------------------------------
def train(recorder, model, steps):
    for _ in range(steps):
        recorder.step(loss=model(torch.ones(2, 30)).sum())


def test_training_goes_on_at_the_limit_and_the_run_is_closed(tmp_path):
    model = nn.Sequential(nn.Linear(30, 40))
    recorder = rs.Recorder(model, tmp_path / "run", every=1, max_store_bytes=200_000,
                           probe=(torch.randn(50, 30), None))  # fmt: skip
    with pytest.warns(RepScopeWarning, match="max_store_bytes"):
        train(recorder, model, 100)
    assert isinstance(recorder.error, StoreFull)
    assert recorder.step_number == 100
    with pytest.raises(StoreFull):
        recorder.close()
    run = rs.open(tmp_path / "run")
    assert run.closed
    assert 5 < len(run.steps) < 100
    assert size_of(tmp_path / "run") <= 200_000


@pytest.mark.parametrize("end", ["commit", "close"])
def test_what_waited_for_space_is_written_when_it_returns(tmp_path, monkeypatch, end):
    model = nn.Sequential(nn.Linear(30, 40))
    recorder = rs.Recorder(model, tmp_path / "run", every=1, durability="append",
                           probe=(torch.randn(50, 30), None))  # fmt: skip
    train(recorder, model, 2)
    write = os.write

    def full(fd, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.warns(RepScopeWarning, match="no space left"):
        train(recorder, model, 3)
    assert isinstance(recorder.error, StoreFull)
    with pytest.raises(StoreFull):
        recorder.commit()
    assert rs.open(tmp_path / "run").steps == [0, 1, 2]
    monkeypatch.setattr(files.os, "write", write)
    with pytest.raises(StoreFull):  # the steps since then were not recorded
        getattr(recorder, end)()
    run = rs.open(tmp_path / "run")
    assert run.steps == [0, 1, 2]
    assert run.scalars().index.tolist() == [0, 1, 2]  # the loss that waited
    assert run.closed == (end == "close")
    recorder._closed or recorder._delivery.undo(new=False)


# -- no flock ----------------------------------------------------------------
@pytest.fixture
def no_flock(monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_flock_a_file_stands_for_it(tmp_path, no_flock):
    with pytest.warns(RepScopeWarning, match="has no flock"):
        first = Lock(tmp_path / "LOCK")
    with (
        pytest.warns(RepScopeWarning),
        pytest.raises(StoreLocked, match=f"process {os.getpid()} on"),
    ):
        Lock(tmp_path / "LOCK")
    first.release()
    assert not (tmp_path / "LOCK.excl").exists()
    with pytest.warns(RepScopeWarning):
        Lock(tmp_path / "LOCK").release()


def test_the_marker_of_a_dead_process_is_taken_over(tmp_path, no_flock):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    marker = tmp_path / "LOCK.excl"
    marker.write_text(f"{child.pid} {socket.gethostname()}")
    with pytest.warns(RepScopeWarning):
        Lock(tmp_path / "LOCK").release()
    for foreign in (f"{child.pid} elsewhere", "", f"1 {socket.gethostname()}"):
        marker.write_text(foreign)
        with pytest.warns(RepScopeWarning), pytest.raises(StoreLocked):
            Lock(tmp_path / "LOCK")
        assert marker.read_text() == foreign


def test_other_errors_of_flock_are_not_swallowed(tmp_path, monkeypatch):
    def broken(file, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="broken"):
        Lock(tmp_path / "LOCK")
