"""Who else sees what is recorded, and the short way that most steps take."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import repscope as rs
from repscope.errors import RepScopeWarning
from repscope.recorder import recorder as module


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


class Sink:
    def __init__(self):
        self.seen, self.closed = [], 0

    def __call__(self, snapshot):
        self.seen.append(snapshot)

    def close(self):
        self.closed += 1


def train(path, *, steps=7, optimizer=True, pause=(), **options):
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"every": 3, "on_error": "raise"} | options
    if optimizer:
        options["optimizer"] = sgd
    with rs.Recorder(model, path, **options) as recorder:
        for i in range(steps):
            loss = nn.functional.cross_entropy(model(X), Y)
            loss.backward()
            if i not in pause:
                sgd.step()
                sgd.zero_grad()
            recorder.step(loss=loss, labels=Y, lr=0.1 * i)
    return rs.open(path)


def same(a, b):
    assert a.streams == b.streams
    assert a.steps == b.steps
    for target, layer in a.streams:
        for step in [s.step for s in a.snapshots(target=target, layers=[layer])]:
            one, two = (run.read(layer, step, target=target) for run in (a, b))
            assert torch.equal(one, two)
    assert a.scalars().equals(b.scalars())
    assert a.progress == b.progress


# -- sinks --------------------------------------------------------------------
def test_a_sink_sees_what_the_store_gets(tmp_path):
    sink = Sink()
    run = train(tmp_path / "run", sinks=[sink], capture=("outputs", "weights"))
    assert sink.closed == 1
    rows = {s.step: s for s in sink.seen if ("outputs", "0") in s.streams}
    assert sorted(rows) == [0, 3, 6]
    for step, snapshot in rows.items():
        assert torch.equal(snapshot.streams["outputs", "0"], run.read("0", step))
        assert snapshot.labels.tolist() == Y.tolist()
    losses = {s.step: s.scalars["loss"] for s in sink.seen if "loss" in s.scalars}
    assert losses == pytest.approx(run.scalars()["loss"].dropna().to_dict())


def test_what_a_sink_keeps_stays_as_it_was(tmp_path):
    sink = Sink()
    run = train(tmp_path / "run", sinks=[sink], every=1, steps=20, durability="append")
    rows = [s for s in sink.seen if ("outputs", "0") in s.streams]
    assert len(rows) == 20
    for snapshot in rows:
        kept = snapshot.streams["outputs", "0"]
        assert torch.equal(kept, run.read("0", snapshot.step))


def test_a_sink_that_fails_is_left_and_recording_goes_on(tmp_path):
    def fail(snapshot):
        raise ConnectionError("no network")

    sink = Sink()
    with pytest.warns(RepScopeWarning, match="ConnectionError: no network") as caught:
        run = train(tmp_path / "run", sinks=[fail, sink], durability="append")
    assert len(caught) == 1
    same(run, train(tmp_path / "other"))
    assert len(sink.seen) > 5


# -- the short way ------------------------------------------------------------
@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("probe", [None, (X, Y)])
@pytest.mark.parametrize("pause", [(), (0, 1, 4), (6,)])
def test_steps_at_which_nothing_is_due_leave_the_same(
    tmp_path, optimizer, probe, pause
):
    options = {"optimizer": optimizer, "probe": probe, "pause": pause, "steps": 11}
    short = train(tmp_path / "short", every=4, **options)
    # A function has to be asked at every step, so that each goes the long way.
    long = train(tmp_path / "long", every=lambda step: step % 4 == 0, **options)
    same(short, long)


def test_a_bad_scalar_is_an_error_on_the_short_way_too(tmp_path):
    model = net()
    for value in (torch.ones(2), "x", torch.tensor(1j)):
        path = tmp_path / repr(value)[:10].replace("/", "")
        recorder = rs.Recorder(model, path, every=100, probe=X, on_error="raise")
        recorder.step()
        with pytest.raises((TypeError, ValueError)):  # noqa: PT012 - late, at the latest
            recorder.step(loss=value)
            recorder.commit()
        with pytest.raises((TypeError, ValueError)):
            recorder.close()


def test_labels_are_not_asked_for_where_nothing_is_recorded(tmp_path):
    model = net()
    with rs.Recorder(model, tmp_path / "run", every=5, on_error="raise") as recorder:
        for i in range(6):
            model(X).sum().backward()
            recorder.step(labels=Y if i % 5 == 0 else None)
    assert rs.open(tmp_path / "run").labels(5).tolist() == Y.tolist()


def test_other_scalars_and_the_loss_of_one_step_are_one_record(tmp_path):
    model = net()
    with rs.Recorder(model, tmp_path / "run", every=100, probe=X) as recorder:
        for i in range(50):
            recorder.step(loss=float(i), lr=0.5 * i)
    table = rs.open(tmp_path / "run").scalars()
    assert table["loss"].dropna().tolist() == list(range(50))
    assert table["lr"].dropna().index.tolist() == list(range(1, 51))
    assert len(table) == 51


# -- how large it gets --------------------------------------------------------
def test_the_size_is_said_where_it_is_known(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="repscope"):
        run = train(tmp_path / "run", every=rs.at_steps([2, 4]), probe=(X, Y))
    assert [record.name for record in caplog.records] == ["repscope"]
    size = sum(run.read(layer).nbytes for layer in run.layers) * 3
    assert f"about {size / 1e6:.3g} MB at 3 steps" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="repscope"):
        train(tmp_path / "two", probe=(X, Y))
    assert "MB a captured step" in caplog.text


def test_a_disk_that_will_be_too_small_is_mentioned_before_the_run(
    tmp_path, monkeypatch
):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.warns(RepScopeWarning, match="recording 3 steps .* are free there"):
        recorder = rs.Recorder(
            net(), tmp_path / "run", every=rs.at_steps([2, 4]), probe=(X, Y)
        )
    assert recorder.bytes_per_capture == 12 * (5 + 5 + 3) * 4
    recorder.close()
