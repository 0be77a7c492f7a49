"""Sinks: which numbers of a snapshot become points, and when they are written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import repscope as rs
from repscope import errors
from repscope.integrations.extras import load
from repscope.integrations.scalars import ScalarSink, scalars
from repscope.integrations.tensorboard import TensorBoardSink
from repscope.integrations.wandb import WandbSink
from repscope.snapshot import Snapshot

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).relu()
Y = torch.arange(40) % 4


class Points(ScalarSink):
    """Keeps what it is given."""

    def __init__(self, **options):
        super().__init__(**options)
        self.points, self.closed = [], 0

    def close(self):
        self.closed += 1

    def write(self, points, step):
        self.points.append((step, dict(points)))


# -- which numbers -----------------------------------------------------------
def test_points_are_what_the_functions_say():
    streams = {
        ("outputs", "hidden1"): X,
        ("inputs", "hidden1"): 2 * X[:, :3],
        ("weights", "hidden1.weight"): X,
    }
    found = scalars(Snapshot(7, streams, Y, {"loss": torch.tensor(0.5), "lr": 0.1}))
    spectrum, given = rs.spectrum(X), rs.spectrum(X[:, :3])
    assert found == pytest.approx(
        {
            "repscope/loss": 0.5,
            "repscope/lr": 0.1,
            "repscope/effective_rank/hidden1": rs.effective_rank(spectrum).item(),
            "repscope/participation_ratio/hidden1": rs.participation_ratio(
                spectrum
            ).item(),
            "repscope/class_cosine/hidden1": rs.cross_class_cosine(X, Y).item(),
            "repscope/effective_rank/inputs/hidden1": rs.effective_rank(given).item(),
            "repscope/participation_ratio/inputs/hidden1": rs.participation_ratio(
                given
            ).item(),
        }
    )
    assert all(type(value) is float for value in found.values())


def test_metrics_of_parameters_are_there_for_who_asks():
    seen = Snapshot(0, {("weights", "fc.weight"): X, ("optimizer_state", "fc"): X})
    found = scalars(seen, metrics="hoyer_sparsity")
    assert found == {
        "repscope/hoyer_sparsity/weights/fc.weight": rs.hoyer_sparsity(X).item()
    }


@pytest.mark.parametrize(
    "snapshot",
    [
        Snapshot(0, {("outputs", "one sample"): X[:1]}, Y[:1]),
        Snapshot(0, {("outputs", "not finite"): X / 0}, Y),
        Snapshot(0, {("outputs", "nothing"): X[:0]}, Y[:0]),
        Snapshot(0, {}),
    ],
    ids=lambda snapshot: next(iter(snapshot.streams), ("", "no stream"))[1],
)
def test_what_cannot_be_measured_gives_no_point(snapshot):
    assert scalars(snapshot) == {}


@pytest.mark.parametrize(
    ("y", "unlabelled"),
    [
        (None, ()),
        (torch.zeros(40, dtype=torch.int64), ()),
        (Y[:7], ()),
        (Y, ("fc",)),
    ],
    ids=["none", "one class", "other length", "other order"],
)
def test_without_labels_for_its_rows_a_stream_has_ranks_only(y, unlabelled):
    seen = Snapshot(0, {("outputs", "fc"): X}, y, unlabelled=frozenset(unlabelled))
    assert scalars(seen).keys() == {
        "repscope/effective_rank/fc",
        "repscope/participation_ratio/fc",
    }


def test_tokens_take_the_label_of_their_example():
    found = scalars(Snapshot(0, {("outputs", "fc"): X}, Y[:8]), metrics="class_cosine")
    expected = rs.cross_class_cosine(X, Y[:8].repeat_interleave(5))
    assert found == {"repscope/class_cosine/fc": expected.item()}


def test_the_loss_of_a_diverged_run_is_a_point():
    found = scalars(Snapshot(0, {}, scalars={"loss": math.nan}))
    assert math.isnan(found["repscope/loss"])


@pytest.mark.parametrize("make", [Points, lambda **k: TensorBoardSink(None, **k)])
@pytest.mark.parametrize("name", ["efective_rank", "forgetting"])
def test_unknown_metrics_are_refused_with_the_nearest_names(make, name):
    with pytest.raises(errors.UnknownName, match="did you mean 'effective_rank'"):
        make(metrics=["efective_rank"])
    with pytest.raises(errors.UnknownName, match="unknown metric 'forgetting'"):
        make(metrics=["forgetting"])  # of a whole run


# -- when --------------------------------------------------------------------
def test_every_thins_what_is_recorded():
    sink = Points(every=4)
    for step in range(10):
        sink(Snapshot(step, {}, scalars={"loss": 0.0}))
    assert [step for step, _ in sink.points] == [0, 4, 8]
    with pytest.raises(errors.UsageError, match="positive number of steps"):
        Points(every=0)


def test_a_sink_says_where_points_go():
    with pytest.raises(NotImplementedError):
        ScalarSink()(Snapshot(0, {}, scalars={"loss": 1.0}))


# -- packages ----------------------------------------------------------------
def test_what_is_not_installed_is_named_with_the_line_that_installs_it():
    with pytest.raises(
        errors.MissingExtra,
        match=r"cannot import nowhere \(.*\): pip install 'repscope\[lightning\]'",
    ):
        load("nowhere", "nowhere.else", extra="lightning")


@pytest.mark.parametrize(
    ("module", "extra", "make"),
    [
        ("torch.utils.tensorboard", "tensorboard", lambda to: TensorBoardSink(to)),
        ("wandb", "wandb", lambda to: WandbSink()),
    ],
)
def test_sinks_name_their_extra(monkeypatch, tmp_path, module, extra, make):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(errors.MissingExtra, match=rf"'repscope\[{extra}\]'"):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Writer:
    def __init__(self):
        self.points, self.flushed, self.closed = [], 0, False

    def add_scalar(self, name, value, step):
        self.points.append((name, value, step))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.closed = True


def test_a_writer_of_the_user_needs_no_package_and_stays_open():
    writer = Writer()
    sink = TensorBoardSink(writer, metrics="effective_rank")
    sink(Snapshot(3, {}, scalars={"loss": 0.5}))
    sink(Snapshot(4, {}, scalars={"loss": torch.tensor(0.25)}))
    sink.close()
    assert writer.points == [("repscope/loss", 0.5, 3), ("repscope/loss", 0.25, 4)]
    assert writer.flushed
    assert not writer.closed


class Run:
    def __init__(self):
        self.axes, self.rows = [], []

    def define_metric(self, name, **options):
        self.axes.append((name, options.get("step_metric")))

    def log(self, row):
        self.rows.append(row)


def test_curves_of_wandb_have_their_own_axis():
    run = Run()
    sink = WandbSink(run)
    sink(Snapshot(3, {}, scalars={"loss": 0.5}))
    sink(Snapshot(2, {}))
    assert ("repscope/*", "repscope/step") in run.axes
    assert run.rows == [{"repscope/loss": 0.5, "repscope/step": 3}]


# -- from a recorder ---------------------------------------------------------
@pytest.mark.parametrize("probe", [True, False])
def test_a_recorder_hands_its_sinks_what_its_store_gets(tmp_path, probe):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = Points()
    with rs.Recorder(
        model,
        tmp_path / "run",
        layers="1",
        every=2,
        probe=(X, Y) if probe else None,
        optimizer=optimizer,
        sinks=[sink],
    ) as rec:
        for _ in range(5):
            loss = model(X).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(loss=loss, labels=None if probe else Y)
    run = rs.open(tmp_path / "run")
    table = rs.measure(run, metrics=["effective_rank", "class_cosine"])
    for metric in ("effective_rank", "class_cosine"):
        stored = table[table.metric == metric].set_index("step").value.to_dict()
        drawn = {
            step: points[f"repscope/{metric}/1"]
            for step, points in sink.points
            if f"repscope/{metric}/1" in points
        }
        assert drawn == pytest.approx(stored)
        assert list(drawn) == [0, 2, 4]
    losses = {s: p["repscope/loss"] for s, p in sink.points if "repscope/loss" in p}
    assert losses == pytest.approx(run.scalars()["loss"].dropna().to_dict())
    assert len(losses) == 5
    assert sink.closed == 1


class OverExamples(nn.Module):
    def forward(self, h):
        return h.sum(0)  # (time, features): rows are no examples


def test_rows_that_are_no_examples_get_no_class_cosine(tmp_path):
    model, sink = nn.Sequential(nn.Linear(3, 3), OverExamples()), Points()
    x, y = torch.randn(4, 8, 3), torch.arange(4) % 2
    with rs.Recorder(model, tmp_path / "run", probe=(x, y), sinks=[sink]):
        pass
    run = rs.open(tmp_path / "run")
    assert run.meta["unlabelled"] == ["1"]
    stored = rs.measure(run, metrics=["class_cosine"])
    assert stored.layer.tolist() == ["0"]
    ((_, points),) = sink.points
    assert "repscope/class_cosine/0" in points
    assert "repscope/class_cosine/1" not in points
