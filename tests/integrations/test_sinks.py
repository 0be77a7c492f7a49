"""What TensorBoard and W&B read back of what the sinks wrote."""

from __future__ import annotations

import math

import pytest
import torch

from repscope.errors import UsageError
from repscope.integrations.scalars import scalars
from repscope.integrations.tensorboard import TensorBoardSink
from repscope.integrations.wandb import WandbSink
from repscope.snapshot import Snapshot

pytestmark = pytest.mark.integrations

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).relu()
Y = torch.arange(40) % 4
SEEN = [
    Snapshot(0, {("outputs", "lstm:h[0]"): X, ("inputs", "fc"): X}, Y),
    Snapshot(10, {("outputs", "lstm:h[0]"): 2 * X - 1}, Y, {"loss": torch.tensor(0.5)}),
    Snapshot(9, {}, scalars={"loss": math.nan}),
]
EXPECTED = {
    (name, seen.step): value for seen in SEEN for name, value in scalars(seen).items()
}


# -- TensorBoard -------------------------------------------------------------
@pytest.mark.parametrize("own", [True, False], ids=["folder", "writer"])
def test_tensorboard_reads_the_points_back(tmp_path, own):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = None if own else SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(tmp_path if own else writer)
    for snapshot in SEEN:
        sink(snapshot)
    sink.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    found = {
        (tag, event.step): event.value
        for tag in read.Tags()["scalars"]
        for event in read.Scalars(tag)
    }
    assert found == pytest.approx(EXPECTED, nan_ok=True)
    if writer is not None:
        writer.add_scalar("mine", 1.0, 0)
        writer.close()


# -- Weights & Biases --------------------------------------------------------
@pytest.fixture
def wandb(tmp_path, monkeypatch):
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield package
    package.teardown()


def records_of(path):
    """Read the log of an offline run: LevelDB's format behind a header of 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def rows_of(path):
    from wandb.proto.wandb_internal_pb2 import Record

    rows, axes = [], {}
    for data in records_of(path):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or i.nested_key[0]: i.value_json for i in items})
        if record.HasField("metric"):
            metric = record.metric
            axes[metric.name or metric.glob_name] = metric.step_metric
    return rows, axes


def test_wandb_reads_the_points_back(tmp_path, wandb):
    with wandb.init(mode="offline", dir=tmp_path, project="test") as run:
        run.log({"mine": 1.0})
        sink = WandbSink()  # the active run
        assert sink.run is run
        for snapshot in SEEN:
            sink(snapshot)
        run.log({"mine": 2.0})
    wandb.teardown()  # ends the process that writes
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows, axes = rows_of(log)
    assert axes["repscope/*"] == "repscope/step"
    found = {
        (name, int(row["repscope/step"])): float(value)
        for row in rows
        if "repscope/step" in row
        for name, value in row.items()
        if name.startswith("repscope/") and name != "repscope/step"
    }
    assert found == pytest.approx(EXPECTED, nan_ok=True)
    assert [row["mine"] for row in rows if "mine" in row] == ["1", "2"]


def test_a_disabled_run_costs_nothing_and_fails_nothing(tmp_path, wandb):
    with wandb.init(mode="disabled", dir=tmp_path) as run:
        sink = WandbSink(run)
        for snapshot in SEEN:
            sink(snapshot)


def test_without_an_active_run_one_has_to_be_given(wandb, monkeypatch):
    monkeypatch.setattr(wandb, "run", None)
    with pytest.raises(UsageError, match=r"wandb\.init\(\)"):
        WandbSink()
