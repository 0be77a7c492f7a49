"""Rows of the table of bad inputs that no other file has."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from repscope import store
from repscope.snapshot import Snapshot
from repscope.store.index import from_spans, to_spans


def test_the_clock_jumps_back(create, snapshot, monkeypatch):
    """The order is that of the frames, and commits by time go on."""
    w = create()
    w.append(snapshot(5))
    w.commit()
    past = time.time() - 1e6
    monkeypatch.setattr(time, "time", lambda: past)
    w.append(snapshot(5, rows=9))
    w.close()
    assert store.open(w.path).read("fc1", 5).shape == (9, 5)


def test_a_step_without_rows(create):
    w = create()
    w.append(Snapshot(0, {("outputs", "a"): torch.ones(2, 3)}))
    w.append(Snapshot(1, {("outputs", "a"): torch.ones(0, 3)}))
    w.close()
    run = store.open(w.path)
    assert run.steps == [0, 1]
    assert run.read("a", 1).shape == (0, 3)
    again = store.reopen(w.path)
    again.append(Snapshot(2, {("outputs", "a"): torch.ones(1, 3)}))
    again.close()
    assert store.open(w.path).read("a").shape == (1, 3)


def test_counters_have_64_bits(create):
    big = 2**31 + 7
    assert from_spans(to_spans([big * 4, big * 4 + 3])).tolist() == [
        big * 4, big * 4 + 3]  # fmt: skip
    w = create()
    w.append(Snapshot(big * 1000, {("outputs", "a"): torch.ones(1, 1)}))
    w.close()
    again = store.reopen(w.path)
    assert again.progress == big * 1000
    again.close()


@pytest.fixture
def as_nobody():
    """Return a function that runs another without the right to write everywhere."""

    def run(function):
        def work():
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                function()
            except OSError as error:
                queue.put((type(error).__name__, isinstance(error, PermissionError)))
            else:
                queue.put(("nothing", False))

        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python >= 3.12
            child = context.Process(target=work)
            child.start()
        child.join(30)
        return queue.get()

    return run


def test_where_nothing_may_be_written_is_said_at_open(snapshot, as_nobody):
    """Not at step 1,000; reading still works."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is private to its user
        folder = Path(name)
        w = store.create(folder / "run", meta={})
        w.append(snapshot(0))
        w.close()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        for use in (
            lambda: store.reopen(folder / "run"),
            lambda: store.repair(folder / "run"),
            lambda: store.create(folder / "new", meta={}),
            lambda: store.create(folder / "new.h5", meta={}),
            lambda: store.pack(folder / "run", folder / "out.h5"),
        ):
            kind, permission = as_nobody(use)
            assert permission or kind == "StoreWriteError", kind
        assert as_nobody(lambda: store.open(folder / "run").read("fc1")) == (
            "nothing", False)  # fmt: skip
        assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
