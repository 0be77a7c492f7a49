"""One torch thread, for every test: two busy cores make two threads far slower.

Thresholds that the developer measured would decide which routes the tests take.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["REPSCOPE_THRESHOLDS"] = "off"

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the file of measured thresholds, in a cache of the test's own."""
    from repscope.linalg import choice

    monkeypatch.delenv("REPSCOPE_THRESHOLDS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choice.tuned.cache_clear()
    yield tmp_path / "cache" / "repscope" / "thresholds.json"
    choice.tuned.cache_clear()
