"""Compiled models: what is recorded is what a plain run records, or it is named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import repscope as rs
from repscope.errors import CompiledFullgraph, RepScopeWarning

dynamo = pytest.importorskip("torch._dynamo")

# Torch's own, from the frames between two graphs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that")

TARGETS = ("outputs", "inputs", "output_gradients", "weights", "updates")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.act = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        h = self.act(self.first(x))
        h = self.block(self.block(h))
        return self.head(h)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def compiled(model, how, **options):
    if how == "function":
        return torch.compile(model, backend="eager", **options)
    if how == "method":
        model.compile(backend="eager", **options)
    return model


def train(model, recorder, steps, *, optimizer):
    for _ in range(steps):
        loss = model(X).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if recorder is not None:
            recorder.step(loss=loss)


def run(path, how, *, when="early", steps=10, every=3, inner=False, **options):
    """Train with a recorder attached before or after the model was compiled and ran."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    warm = Net()
    torch.manual_seed(5)
    options = {"capture": TARGETS, "on_error": "raise"} | options
    options |= {"every": every, "optimizer": optimizer}
    if when == "early":
        recorder = rs.Recorder(net, path, **options)
        model = compiled(net, how)
    else:
        model = compiled(net, how)
        state = torch.get_rng_state()
        model(X)  # compiles; changes nothing but the random state
        torch.set_rng_state(state)
        recorder = rs.Recorder(net if inner else model, path, **options)
    del warm
    with recorder:
        train(model, recorder, steps, optimizer=optimizer)
    return net, rs.open(path)


def assert_same(a, b):
    pairs = zip(a[0].parameters(), b[0].parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    assert a[1].streams == b[1].streams
    assert a[1].steps == b[1].steps
    for target, layer in a[1].streams:
        one, two = (run.series(layer, target=target) for _, run in (a, b))
        assert torch.equal(one, two), (target, layer)


@pytest.mark.parametrize("how", ["function", "method"])
def test_attached_before_it_is_compiled(tmp_path, how):
    plain = run(tmp_path / "plain", None)
    assert_same(run(tmp_path / "run", how), plain)
    assert not dynamo.utils.counters["recompiles"]
    # No graph was made again because the recorder was on at some steps and off at
    # others: as many as the layers and what is between them.
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 12


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("how", ["function", "method"])
def test_attached_after_it_ran_compiled(tmp_path, how, inner):
    plain = run(tmp_path / "plain", None)
    if how == "function" and inner:
        late = run(tmp_path / "run", how, when="late", inner=True)
    else:
        with pytest.warns(RepScopeWarning, match="compiled anew at the next forward"):
            late = run(tmp_path / "run", how, when="late", inner=inner)
    assert_same(late, plain)


def test_attached_again_after_a_first_recorder_was_closed(tmp_path):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    model = compiled(net, "function")
    for name in ("one", "two"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RepScopeWarning)
            recorder = rs.Recorder(model, tmp_path / name, every=1, on_error="raise")
        with recorder:
            train(model, recorder, 2, optimizer=optimizer)
        train(model, None, 1, optimizer=optimizer)
        assert rs.open(tmp_path / name).layers == [
            "first", "act", "block.0", "block.1", "block.0@1", "block.1@1", "head",
        ]  # fmt: skip


@pytest.mark.parametrize("how", ["function", "method"])
def test_a_full_graph_is_refused_for_training_batches(tmp_path, how):
    model = compiled(Net(), how, fullgraph=True)
    with pytest.raises(CompiledFullgraph, match="or give the recorder probe="):
        rs.Recorder(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model(X)  # and nothing is left on it


def test_a_layer_that_is_a_full_graph_is_refused_by_name(tmp_path):
    net = Net()
    net.block.compile(backend="eager", fullgraph=True)
    with pytest.raises(CompiledFullgraph, match="layer 'block' is compiled"):
        rs.Recorder(net, tmp_path / "run")
    rs.Recorder(net, tmp_path / "run", layers=["first", "head"]).close()


def test_a_graph_compiled_full_afterwards_says_why_it_breaks(tmp_path):
    net = Net()
    with rs.Recorder(net, tmp_path / "run"):
        model = compiled(net, "function", fullgraph=True)
        with pytest.raises(dynamo.exc.Unsupported, match="give the recorder probe="):
            model(X)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("how", ["function", "method"])
def test_a_probe_sees_all_layers_and_compiles_nothing(tmp_path, how, when, fullgraph):
    runs = []
    for name, way in (("plain", None), ("run", how)):
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        torch.manual_seed(5)
        options = {"every": 2, "probe": X, "on_error": "raise", "optimizer": optimizer}
        if when == "early":
            recorder = rs.Recorder(net, tmp_path / name, **options)
            model = compiled(net, way, fullgraph=fullgraph) if way else net
        else:
            model = compiled(net, way, fullgraph=fullgraph) if way else net
            state = torch.get_rng_state()
            model(X)
            torch.set_rng_state(state)
            recorder = rs.Recorder(model, tmp_path / name, **options)
        with recorder:
            train(model, recorder, 1, optimizer=optimizer)
            made = dynamo.utils.counters["stats"]["unique_graphs"]
            train(model, recorder, 5, optimizer=optimizer)
        assert dynamo.utils.counters["stats"]["unique_graphs"] == made
        runs.append((net, rs.open(tmp_path / name)))
    assert_same(*reversed(runs))


def test_a_compiled_part_of_a_model(tmp_path):
    def make(part):
        net = Net()
        if part:
            net.block = torch.compile(net.block, backend="eager")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        torch.manual_seed(5)
        path = tmp_path / str(part)
        with rs.Recorder(net, path, every=1, on_error="raise") as recorder:
            train(net, recorder, 3, optimizer=optimizer)
        return net, rs.open(path)

    assert_same(make(True), make(False))
