"""What layers return when they do not return one plain tensor, and who runs them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import repscope as rs
from repscope.errors import (
    InsideTransform,
    RepScopeWarning,
    UnsupportedLayout,
    UnsupportedModule,
    UnsupportedOutput,
)


class Returns(nn.Module):
    """Two linear layers, and between them one that returns what it is told to."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.odd = Odd(make)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x)
        self.odd(h)
        return self.last(h)


class Odd(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, h):
        return self.make(h)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    cache: object = None


def record(path, model, x, *, steps=2, **options):
    """Train a few steps under a recorder; return the store."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.Recorder(model, path, **({"every": 1} | options)) as recorder:
        for _ in range(steps):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    return rs.open(path)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("probe", [None, X])
def test_none_is_passed_over_and_counted(tmp_path, probe):
    run = record(tmp_path / "run", Returns(lambda h: None), X, probe=probe)
    assert run.layers == ["first", "last"]
    counted = run.meta["passed_over"]["without values"]
    assert counted == {"odd": 2 if probe is None else 3}


def test_of_several_tensors_each_is_a_stream(tmp_path):
    def make(h):
        return Output(hidden=h, cache={"past": (h + 1, None), "n": 3})

    model = Returns(make)
    run = record(tmp_path / "run", model, X)
    assert run.layers == ["first", "odd:hidden", "odd:cache.past[0]", "last"]
    first = run.read("first", step=0)
    assert torch.equal(run.read("odd:cache.past[0]", step=0), first + 1)


def test_of_a_complex_tensor_both_parts(tmp_path):
    model = Returns(lambda h: torch.complex(h, 2 * h))
    run = record(tmp_path / "run", model, X)
    assert run.layers == ["first", "odd:real", "odd:imag", "last"]
    first = run.read("first", step=0)
    assert torch.equal(run.read("odd:real", step=0), first)
    assert torch.equal(run.read("odd:imag", step=0), 2 * first)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_of_a_quantized_tensor_the_values_it_stands_for(tmp_path):
    def make(h):
        return torch.quantize_per_tensor(h.detach(), 0.05, 3, torch.qint8)

    run = record(tmp_path / "run", Returns(make), X)
    first = run.read("first", step=0)
    whole = ((first / 0.05).round() + 3).clamp(-128, 127)
    got = run.read("odd", step=0)
    assert torch.equal((got / 0.05).round() + 3, whole)  # every integer comes back


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("small", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_recorded_without_loss(tmp_path, dtype, small):
    run = record(tmp_path / "run", Returns(lambda h: h.to(small)), X, dtype=dtype)
    first = run.read("first", step=0)
    assert torch.equal(run.read("odd", step=0), first.to(small).float())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_of_a_nested_tensor_the_rows_there_are(tmp_path, layout):
    def make(h):
        parts = [h[i : i + 1].expand(1 + i % 3, -1).detach() for i in range(len(h))]
        return torch.nested.nested_tensor(parts, layout=layout)

    model = Returns(make)
    y = torch.arange(5)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        loss = model(X).sum()
        loss.backward()
        recorder.step(labels=y)
    run = rs.open(tmp_path / "run")
    lengths = torch.tensor([1, 2, 3, 1, 2])
    rows = run.read("first").repeat_interleave(lengths, 0)
    assert torch.equal(run.read("odd"), rows)
    assert run.labels(layer="odd").tolist() == y.repeat_interleave(lengths).tolist()
    assert ("examples", "outputs:odd") not in run.streams


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda h: h.to_sparse(), UnsupportedLayout, "'odd' has a tensor of layout"),
        (lambda h: {1, 2}, UnsupportedOutput, "'odd' returned a set"),
    ],
)
def test_what_cannot_be_recorded_is_named_and_training_goes_on(
    tmp_path, make, error, text
):
    model = Returns(make)
    recorder = rs.Recorder(model, tmp_path / "run", every=1)
    for _ in range(3):
        loss = model(X).sum()
        loss.backward()
        if recorder.error is None:
            with pytest.warns(RepScopeWarning, match="stopped at step 1"):
                recorder.step(loss=loss)
        else:
            recorder.step(loss=loss)
    assert recorder.step_number == 3
    with pytest.raises(error, match=text):
        recorder.close()
    assert isinstance(recorder.error, TypeError)
    assert rs.open(tmp_path / "run").closed


def test_tensors_without_data_are_passed_over(tmp_path):
    model = Returns(lambda h: h.to("meta"))
    run = record(tmp_path / "run", model, X)
    assert run.layers == ["first", "last"]
    assert run.meta["passed_over"]["without values"] == {"odd": 2}


def test_an_export_in_the_middle_of_training_leaves_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    with rs.Recorder(model, tmp_path / "run", every=1, on_error="raise") as recorder:
        for step in range(3):
            if step == 1:
                torch.export.export(model, (X,))
            model(X).sum().backward()
            recorder.step(labels=torch.zeros(5, dtype=torch.int64))
    run = rs.open(tmp_path / "run")
    assert [len(run.read("0", step)) for step in run.steps] == [5, 5, 5]


def test_a_trace_in_the_middle_of_training_leaves_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    with rs.Recorder(model, tmp_path / "run", every=1, on_error="raise") as recorder:
        for step in range(3):
            if step == 1:
                with pytest.warns(DeprecationWarning, match="torch.jit"):
                    traced = torch.jit.trace(model, X)
                assert torch.equal(traced(X), model.forward(X))
            model(X).sum().backward()
            recorder.step()
    assert rs.open(tmp_path / "run").steps == [0, 1, 2]


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_function_transforms_are_named(tmp_path, transform):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (X,)).sum()

    recorder = rs.Recorder(model, tmp_path / "run", every=1)
    if transform == "vmap":
        torch.func.vmap(model)(torch.randn(2, 5, 4))
    elif transform == "grad":
        torch.func.grad(loss)(parameters)
    else:
        torch.func.jvp(loss, (parameters,), (parameters,))
    with pytest.warns(RepScopeWarning, match="'0' ran inside torch.func"):
        recorder.step()
    with pytest.raises(InsideTransform, match="give it probe="):
        recorder.close()


def test_modules_without_working_hooks_are_refused(tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModule, match="the model is a ScriptModule"):
        rs.Recorder(script, tmp_path / "run")
    with pytest.raises(UnsupportedModule, match="layer '1' is a ScriptModule"):
        rs.Recorder(nn.Sequential(nn.Tanh(), script), tmp_path / "run", layers="1")
    parallel = nn.DataParallel(nn.Linear(2, 2))
    parallel.device_ids = [0, 1]
    with pytest.raises(UnsupportedModule, match="DataParallel over 2 devices"):
        rs.Recorder(parallel, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_parallel_on_one_device_is_the_module_inside(tmp_path):
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    assert record(tmp_path / "run", model, X).layers == ["0", "1"]


# -- activation checkpointing -------------------------------------------------
class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(8, 2)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.stem(x)
        if self.reentrant is None:
            h = self.block(h)
        else:
            h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.head(h)


def run_checkpointed(path, reentrant, *, micro=1, **options):
    model = Checkpointed(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(7)
    recorder = rs.Recorder(
        model,
        path,
        every=1,
        capture=("outputs", "inputs", "output_gradients"),
        optimizer=optimizer,
        on_error="raise",
        **options,
    )
    with recorder:
        for _ in range(3):
            for part in x.chunk(micro):
                model(part).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    return rs.open(path), model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_checkpointed_forward_counts_once(tmp_path, reentrant, micro):
    plain, model = run_checkpointed(tmp_path / "plain", None, micro=micro)
    run, other = run_checkpointed(tmp_path / "run", reentrant, micro=micro)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sorted(run.streams) == sorted(plain.streams)
    for target, layer in plain.streams:
        for step in range(3):
            a, b = (r.read(layer, step, target=target) for r in (plain, run))
            assert torch.equal(a, b), (target, layer, step)
    assert run.meta["passed_over"]["recomputed in the backward pass"]["block.0"]


def test_gradients_that_cannot_be_told_apart_are_refused(tmp_path):
    model = Checkpointed(reentrant=True)
    with rs.Recorder(
        model, tmp_path / "run", every=1, capture="output_gradients"
    ) as recorder:
        x = torch.randn(6, 4)
        losses = [model(part).square().sum() for part in x.chunk(2)]
        for loss in losses:
            loss.backward()
        with pytest.warns(RepScopeWarning, match="use_reentrant=False records all"):
            recorder.step()
        recorder.error = None  # the rest of the run is of no interest here


def test_an_evaluation_after_a_forward_that_raised_is_not_recorded(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with rs.Recorder(model, tmp_path / "run", every=1, on_error="raise") as recorder:
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4, 1).squeeze(2)[:, :3])
        model.eval()
        with torch.no_grad():
            model(torch.randn(9, 4))
        model.train()
        model(X).sum().backward()
        recorder.step()
    assert len(rs.open(tmp_path / "run").read("0")) == 5
