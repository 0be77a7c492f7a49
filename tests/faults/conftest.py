"""The figures of the fault tests, printed at the end."""

from __future__ import annotations

import os
import platform

import h5py
import pytest
import torch

from repscope.store import compact, packing, segment, writer

_lines: list[tuple[str, str]] = []


@pytest.fixture(scope="module", autouse=True)
def _usual_sizes():
    """Put the store's sizes back: the workloads change them in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (writer, "SEGMENT_BYTES"),
            (segment, "CHUNK_BYTES"),
            (packing, "CHUNK_BYTES"),
            (compact, "FAN"),
        ):
            patch.setattr(module, name, getattr(module, name))
        yield


@pytest.fixture
def figures(request):
    """Return a function that notes the figures of a long run for the summary."""

    def note(what: str, **values: object) -> None:
        if request.node.get_closest_marker("faults"):
            text = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in values.items())
            _lines.append((what, text))

    return note


def pytest_terminal_summary(terminalreporter):
    if not _lines:
        return
    terminalreporter.section("faults")
    terminalreporter.line(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}, h5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}"
    )
    for what, text in _lines:
        terminalreporter.line(f"  {what:44} {text}")
