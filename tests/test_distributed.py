"""DDP and sharded parameters, in real processes started by torchrun.

What they do, and check, is in ``one_of_many.py``. Each start has a limit of time, so
that ranks that wait for each other are a failed test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_of_many import SCENARIOS
from torch import nn

import repscope as rs
from repscope.recorder.ranks import connect, rank_and_world

LIMIT = 90.0


def torchrun(group, folder, *, processes=2, limit=LIMIT):
    """Run a group of scenarios; return the exit status and what was printed."""
    script = Path(__file__).with_name("one_of_many.py")
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        str(script), group, str(folder), str(limit - 15),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            printed, _ = job.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            job.terminate()  # torchrun then ends its processes
            printed, _ = job.communicate(timeout=60)
            pytest.fail(f"no end within {limit} s:\n{printed}")
    return job.returncode, printed


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Return what a scenario found wrong on each rank; a group runs once."""
    done = {}

    def run(group, name, processes=2):
        if group not in done:
            folder = tmp_path_factory.mktemp(group)
            done[group] = folder, *torchrun(group, folder, processes=processes)
        folder, status, printed = done[group]
        found = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
        if not all(name in each for each in found):
            pytest.fail(f"exit status {status}; did not come to it:\n{printed}")
        return "".join(each[name] for each in found)

    return run


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, function.__name__)
        for group in ("ddp", "shards", "fsdp", "errors")
        for function in SCENARIOS[group]
    ],
)
def test_two_processes(outcome, group, name):
    wrong = outcome(group, name)
    assert not wrong, wrong


def test_one_process_under_torchrun_is_like_no_job(outcome):
    wrong = outcome("alone", "one_process_is_like_no_job", processes=1)
    assert not wrong, wrong


def test_a_rank_that_dies_ends_the_job_and_closes_its_store(tmp_path):
    status, printed = torchrun("dies", tmp_path)
    assert status != 0
    assert "ZeroDivisionError" in printed
    run = rs.open(tmp_path / "an_exception_ends_the_job" / "run" / "rank-1")
    assert run.closed
    assert run.meta["interrupted"] == "ZeroDivisionError"
    assert run.moments("fc1").count == 3 * 16


def test_without_a_job_there_is_nobody_to_connect_to():
    model = nn.Linear(2, 2)
    assert rank_and_world() == (0, 1)
    assert connect("shards", model, ("outputs", "moments")) is None
