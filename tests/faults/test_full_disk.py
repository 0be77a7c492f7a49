"""A disk that is really full: a small tmpfs, filled, emptied and filled again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.workload import sizes

import repscope

PROGRAM = Path(__file__).with_name("full_disk_writer.py")


@pytest.fixture
def own_mounts():
    """The command that runs another where mounting a tmpfs is allowed and private."""
    command = ["unshare", "--mount"]
    if os.geteuid():
        command.append("--map-root-user")
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    ):
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace of its own")
    return command


@sizes(short=2, long=60)
def test_a_full_disk(n, own_mounts, tmp_path, figures):
    roots = [PROGRAM.parents[1], Path(repscope.__file__).parents[1]]
    done = subprocess.run(
        [*own_mounts, sys.executable, PROGRAM, tmp_path, str(n)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))},
        capture_output=True,
        text=True,
        timeout=30 + 10 * n,
    )
    assert done.returncode == 0, done.stderr  # the process lives to the end
    found = json.loads(done.stdout)
    figures("full disk", processes_died=0, **found)
    assert found["StoreFull"] == found["errno 28"] == 2 * n
    assert found["steps"] > 20 * n  # recording went on once there was room
    for fault in ("do not open", "acked rows lost", "rows wrong", "steps torn"):
        assert found[fault] == 0, fault
