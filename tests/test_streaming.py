"""Streaming moments: they equal those of the rows, which nobody had to keep."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import repscope as rs

N, D = 48, 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, D, 3)
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean(-1))


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, 2, 9, generator=generator) for _ in range(steps)]


def train(path, capture, *, steps=7, at=(), **options):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.Recorder(model, path, capture=capture, on_error="raise", **options) as rec:
        for i, x in enumerate(batches(steps)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.step()
            if i + 1 in at:
                rec.capture_now(f"at-{i + 1}")
    return rs.open(path)


def check(moments, rows):
    """Compare with numpy's covariance in float64."""
    rows = torch.cat(rows).double().numpy()
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    covariance = np.cov(rows, rowvar=False)
    np.testing.assert_allclose(moments.covariance(), covariance, rtol=1e-11, atol=1e-18)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("both", [False, True])
def test_a_record_holds_the_steps_since_the_one_before(tmp_path, every, both):
    rows = train(tmp_path / "rows", "outputs", every=every)
    capture = ("outputs", "moments") if both else "moments"
    run = train(tmp_path / "run", capture, every=every, at=(2, 5))
    due = range(0, 7, every)
    for step, first, stop in ((2, 0, 2), (5, 2, 5), (7, 5, 7)):
        steps = [s for s in due if first <= s < stop]
        for layer in ("conv", "head"):
            if steps:
                wanted = [rows.read(layer, s) for s in steps]
                check(run.moments(layer, step), wanted)
    assert run.moments("conv", tag="at-5").count == run.moments("conv", 5).count
    assert ("outputs", "conv") in run.streams or not both


def test_commit_records_what_there_is_and_nothing_is_lost_by_a_kill(tmp_path):
    path = tmp_path / "run"
    rows = train(tmp_path / "rows", "outputs", every=1, steps=4)
    model = Net()
    rec = rs.Recorder(model, path, capture="moments", every=1, on_error="raise")
    for i, x in enumerate(batches(6)):
        model(x).sum()
        rec.step()
        if i == 3:
            rec.commit()
    run = rs.open(path)
    assert run.moments("conv").count == 4 * N
    check(run.moments("conv", 4), [rows.read("conv", 0)] + [
        Net().conv(x).mean(-1).detach() for x in batches(4)[1:]
    ])  # fmt: skip
    rec.close()
    assert rs.open(path).moments("conv", 6).count == 2 * N


def test_moments_of_a_probe_are_those_of_its_rows_at_every_step(tmp_path):
    x = batches(1)[0]
    run = train(
        tmp_path / "run",
        ("outputs", "moments"),
        every=2,
        probe=rs.Probe(x, batch_size=7),
    )
    wanted = [run.read("conv", step) for step in (0, 2, 4, 6)]
    check(run.moments("conv", 7), wanted)


def test_all_rows_count_whatever_is_kept(tmp_path):
    rows = train(tmp_path / "rows", "outputs", every=1)
    run = train(
        tmp_path / "run",
        ("outputs", "moments"),
        every=1,
        max_rows=3,
        dtype="float16",
    )
    assert run.read("conv").shape == (3, D)
    check(run.moments("conv"), [rows.read("conv", s) for s in rows.steps])


def test_padding_does_not_count(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    x = torch.randn(6, 5, 4)
    mask = torch.rand(6, 5) > 0.4
    with rs.Recorder(model, tmp_path / "run", capture="moments", every=1) as rec:
        out = model(x)
        rec.step(mask=mask)
    check(rs.open(tmp_path / "run").moments("1"), [out[mask].detach()])


def test_more_rows_than_are_gathered_at_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    sizes = (1500, 1500, 5000, 1, 2048)
    with rs.Recorder(model, tmp_path / "run", capture="moments", every=1) as rec:
        outs = []
        for n in sizes:
            outs.append(model(1000 + torch.randn(n, 4)).detach())
            model(torch.zeros(0, 4))
            rec.step()
    run = rs.open(tmp_path / "run")
    assert run.moments("0").count == sum(sizes)


def test_a_dtype_that_changes_loses_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    outs = []
    with rs.Recorder(model, tmp_path / "run", capture="moments", every=1) as rec:
        for on in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                outs.append(model(torch.randn(40, 4)).detach())
            rec.step()
    assert {out.dtype for out in outs} == {torch.bfloat16, torch.float32}
    check(rs.open(tmp_path / "run").moments("0"), [out.double() for out in outs])


def test_a_run_that_diverged_has_moments_that_say_so(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    with rs.Recorder(
        model, tmp_path / "run", capture=("outputs", "moments"), every=1
    ) as rec:
        model(torch.full((8, 4), float("nan")))
        rec.step()
        rec.capture_now("diverged")
        model(torch.randn(8, 4))
        rec.step()
    run = rs.open(tmp_path / "run")
    table = rs.measure(run, metrics=["effective_rank"])
    row = table[(table["target"] == "moments") & (table["step"] == 1)].iloc[0]
    assert np.isnan(row["value"])
    assert "finite" in row["note"]
    assert run.moments("0", 2).count == 8


def test_spectra_of_moments_are_those_of_the_rows(tmp_path):
    run = train(tmp_path / "run", ("outputs", "moments"), every=7)
    table = rs.measure(run, metrics=["effective_rank", "participation_ratio"])
    rows = table[table["target"] == "outputs"].set_index(["layer", "metric"])["value"]
    kept = table[table["target"] == "moments"].set_index(["layer", "metric"])["value"]
    assert len(kept) == 4
    # Rows of float32 are multiplied in float32 where only ranks are asked for.
    assert (kept / rows.loc[kept.index] - 1).abs().max() < 1e-5
    table = rs.measure(run, metrics=["effective_rank", "effective_rank_sigma"])
    values = table.set_index(["target", "layer", "metric"])["value"]
    assert (values["moments"] - values["outputs"]).abs().max() < 1e-10


def test_memory_does_not_grow_with_the_rows(tmp_path):
    code = """
import resource, sys, torch, repscope as rs
from torch import nn
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU())
x = torch.randn(256, 64)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = {"capture": "moments", "every": 1, "queue_bytes": 2**20}
with rs.Recorder(model, sys.argv[1], **options) as rec:
    for step in range(500):
        with torch.enable_grad():
            model(x)
        rec.step(loss=0.0)
        if step == 100:
            before = peak()
print(peak() - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # 400 steps of 256 rows are 200 MB; what is gathered is 2 layers x 2 MB.
    assert int(out) < 16_000
