"""Rows of the table of bad inputs that no other file has."""

from __future__ import annotations

import os
import time

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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_may_not_be_written_is_refused_at_open(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.close()
    (w.path / "LOCK").chmod(0o444)
    with pytest.raises(PermissionError):
        store.reopen(w.path)
