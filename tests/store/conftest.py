"""Stores in a temporary directory, and no writer left open."""

from __future__ import annotations

import pytest
import torch

from repscope import store
from repscope.snapshot import Snapshot
from repscope.store import segment, writer


@pytest.fixture
def create(tmp_path):
    """Return a function that makes a store; what it made is closed afterwards."""
    made = []

    def make(name="run", **meta):
        made.append(store.create(tmp_path / name, meta=meta))
        return made[-1]

    yield make
    for each in made:
        each.abort()


@pytest.fixture
def tiny(monkeypatch):
    """Shrink segments to 8 KB and chunks to 512 bytes."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 8192)
    monkeypatch.setattr(segment, "CHUNK_BYTES", 512)


@pytest.fixture
def snapshot():
    """Return a function that makes the snapshot of a step, the same every time."""

    def make(step, *, rows=6, tags=()):
        g = torch.Generator().manual_seed(step)
        return Snapshot(
            step,
            {
                ("outputs", "fc1"): torch.randn(rows, 5, generator=g),
                ("outputs", "fc2"): torch.randn(rows, 3, generator=g),
                ("weights", "fc2.weight"): torch.randn(3, 5, generator=g),
            },
            labels=torch.arange(rows) % 3,
            scalars={"loss": 1 / (1 + step), "lr": torch.tensor(0.5)},
            tags=tags,
        )

    return make


@pytest.fixture
def same():
    """Return a function that asserts two snapshots equal bit for bit."""

    def check(a, b):
        assert (a.step, a.tags) == (b.step, b.tags)
        assert set(a.streams) == set(b.streams)
        for key, tensor in b.streams.items():
            identical(a.streams[key], tensor)
        assert (a.labels is None) == (b.labels is None)
        if b.labels is not None:
            identical(a.labels, b.labels)
        assert {k: float(v) for k, v in a.scalars.items()} == {
            k: float(v) for k, v in b.scalars.items()
        }

    def identical(x, y):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y)]
        assert torch.equal(*bits)

    check.tensor = identical
    return check
