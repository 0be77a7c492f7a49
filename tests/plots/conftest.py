"""Axes to draw on."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from repscope import plots


@pytest.fixture(autouse=True)
def _no_open_figures():
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plots.figure()[1]
