"""Attempts to make a recorder change a run, or record what is not so."""

from __future__ import annotations

import copy
import errno
import functools
import gc
import os
import threading
import time
import warnings
import weakref
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import repscope as rs
from repscope.capture import TARGETS
from repscope.errors import (
    DtypeChanged,
    LabelMismatch,
    QueueFull,
    RepScopeWarning,
    StoreFull,
    UsageError,
)
from repscope.recorder import recorder as recorder_module
from repscope.recorder import worker
from repscope.store import writer as writer_module


def linear(n_in=4, n_out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, n_out))


@pytest.fixture(name="model")
def _model():
    return linear()


def update(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def weights_after(make, x, tmp_path, *, probe=None, steps=4, **optimizer):
    """Train with or without a recorder; return what the model then is."""
    torch.manual_seed(0)
    model = make()
    recorder = None
    if probe is not None:
        recorder = rs.Recorder(model, tmp_path / "run", every=1, probe=probe)
    for step in range(steps):
        if step == 0:
            loss = model(x).square().mean()  # parameters may be made here
            sgd = torch.optim.SGD(model.parameters(), 0.1, **optimizer)
            loss.backward()
            sgd.step()
        else:
            loss = update(model, sgd, x.roll(step, 0)[: len(x) // 2])
        if recorder is not None:
            recorder.step(loss=loss)
    if recorder is not None:
        recorder.close()
    return model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- (a) does it change the run? ----------------------------------------------
def test_a_plain_run_is_the_same_with_a_probe(tmp_path):
    x = torch.randn(8, 4)
    make = lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3))  # noqa: E731
    assert same(
        weights_after(make, x, tmp_path), weights_after(make, x, tmp_path, probe=x)
    )


class Lora(nn.Linear):
    """As in loralib: ``eval()`` merges the low-rank part, ``train()`` takes it out."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.down = nn.Parameter(torch.randn(2, n_in))
        self.up = nn.Parameter(torch.randn(n_out, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            sign = -1 if mode else 1
            self.weight.data += sign * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x):
        plain = F.linear(x, self.weight, self.bias)
        return plain if self.merged else plain + x @ self.down.T @ self.up.T


def test_a_model_whose_eval_does_more_than_set_a_flag(tmp_path):
    x = torch.randn(8, 4)
    make = lambda: nn.Sequential(Lora(4, 5), nn.Linear(5, 3))  # noqa: E731
    assert same(
        weights_after(make, x, tmp_path), weights_after(make, x, tmp_path, probe=x)
    )


def test_an_embedding_that_bounds_its_norm_in_forward(tmp_path):
    x = torch.arange(8)
    make = lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=0.5))  # noqa: E731
    plain = weights_after(make, x[:4], tmp_path, momentum=0.9)
    recorded = weights_after(make, x[:4], tmp_path, momentum=0.9, probe=torch.arange(9))
    assert same(plain, recorded)


def test_a_lazy_model_is_refused_or_left_alone(tmp_path):
    x = torch.ones(8, 4)

    def make():
        return nn.Sequential(nn.LazyLinear(5), nn.Dropout(0.5), nn.LazyLinear(3))

    plain = weights_after(make, x, tmp_path)
    try:
        recorded = weights_after(make, x, tmp_path, probe=torch.ones(6, 4))
    except UsageError:
        return
    assert same(plain, recorded)


def test_the_sign_of_a_zero_in_a_buffer(tmp_path):
    class Flips(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.register_buffer("sign", torch.zeros(1))

        def forward(self, x):
            self.sign.neg_()
            return self.fc(x)

    model = Flips()
    with rs.Recorder(model, tmp_path / "run", probe=torch.randn(3, 4)):
        pass
    assert not torch.signbit(model.sign)


def test_a_moving_average_of_a_recorded_model_is_a_plain_one(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        average = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            loss = update(model, optimizer, torch.randn(8, 4))
            average.update_parameters(model)
            average(torch.randn(5, 4))  # in training mode, with gradients
            recorder.step(loss=loss)
    run = rs.open(tmp_path / "run")
    assert [len(run.read("0", step=s)) for s in (0, 1, 2)] == [8, 8, 8]
    assert int(average.n_averaged) == 3


# -- (b) is a number wrong, or in the wrong place? -----------------------------
def test_a_probe_inside_autocast_shows_the_weights_of_its_step(tmp_path):
    model, x = linear(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with rs.Recorder(model, tmp_path / "run", every=1, probe=x) as recorder:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = update(model, optimizer, x)
            recorder.step(loss=loss)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            now = model(x).float()
    assert torch.equal(rs.open(tmp_path / "run").read("0", step=1), now)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_a_buffer_of_labels_that_is_used_again(tmp_path, kind):
    model, buffer = linear(), kind([0] * 8)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        for step in range(3):
            buffer[:] = step
            model(torch.randn(8, 4))
            recorder.step(labels=buffer)
    run = rs.open(tmp_path / "run")
    assert [run.labels(step)[0].item() for step in (0, 1, 2)] == [0, 1, 2]


def test_a_buffer_of_labels_of_micro_batches(tmp_path):
    model, buffer = linear(), torch.zeros(4, dtype=torch.int32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, optimizer=optimizer) as recorder:
        for micro in range(2):
            buffer.fill_(micro)
            model(torch.randn(4, 4)).sum().backward()
            if micro:
                optimizer.step()
            recorder.step(labels=buffer)
    assert rs.open(path).labels(0).tolist() == [0] * 4 + [1] * 4


def test_labels_of_a_probe_stay_fixed(tmp_path):
    model, y = linear(), torch.arange(8)
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, probe=(torch.randn(8, 4), y)) as recorder:
        y.fill_(9)
        recorder.step()
    assert rs.open(path).labels(0).tolist() == [*range(8)]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, attention_mask=None):
        return self.fc(x)


@pytest.mark.parametrize("live", [True, False])
def test_a_mask_that_is_used_again(tmp_path, live):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, :2] = True
    x, model = torch.randn(2, 5, 4), Masked()
    probe = None if live else rs.Probe({"x": x, "attention_mask": mask})
    with rs.Recorder(model, tmp_path / "run", every=1, probe=probe) as recorder:
        if live:
            model(x, attention_mask=mask)
        mask.fill_(True)
        recorder.step()
    assert len(rs.open(tmp_path / "run").read("fc")) == 4


def test_a_part_that_is_also_called_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        model(torch.randn(4, 4))
        model[0](torch.randn(4, 4))
        recorder.step(labels=torch.arange(4))
    run = rs.open(tmp_path / "run")
    assert len(run.read("0")) == 8
    labels = run.labels(layer="0")
    assert labels is None or labels[:4].tolist() == [0, 1, 2, 3]


def test_micro_batches_of_unlike_length(tmp_path):
    model = linear()
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        model(torch.randn(2, 3, 4))
        model(torch.randn(2, 5, 4))
        recorder.step(labels=torch.arange(4))
    expected = [0] * 3 + [1] * 3 + [2] * 5 + [3] * 5
    assert rs.open(tmp_path / "run").labels(layer="0").tolist() == expected


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, skip=False):
        x = self.a(x)
        return x if skip else self.b(x)


def test_a_layer_that_one_micro_batch_skips(tmp_path):
    model = Skips()
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        model(torch.randn(2, 4, 4))
        model(torch.randn(2, 4, 4), skip=True)
        recorder.step(labels=torch.arange(4))
    labels = rs.open(tmp_path / "run").labels(layer="b")
    assert labels is None or labels.tolist() == [0] * 4 + [1] * 4


class MeanOverTime(nn.Module):
    def forward(self, flat, n):
        return flat.view(-1, n, 3).mean(0)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = MeanOverTime()

    def forward(self, x):
        return self.mean(x.transpose(0, 1).flatten(0, 1), len(x))


def test_inputs_in_another_order_than_the_examples(tmp_path):
    model = TimeFirst()
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, capture=("inputs", "outputs")) as recorder:
        model(torch.randn(2, 4, 3))
        recorder.step(labels=torch.tensor([7, 8]))
    run = rs.open(path)
    labels = run.labels(layer="mean:[0]", target="inputs")
    assert labels is None or labels.tolist() == [7, 8] * 4
    assert run.labels(layer="mean").tolist() == [7, 8]


def test_as_many_tokens_as_examples_time_first(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        out = model(torch.randn(3, 3, 8))
        recorder.step(labels=torch.arange(3))
    run = rs.open(tmp_path / "run")
    rows, labels = run.read("layers.0.norm2"), run.labels(layer="layers.0.norm2")
    for example in range(3):
        assert torch.equal(rows[labels == example], out[:, example])
    assert run.labels(layer="layers.0.linear1").tolist() == labels.tolist()


class Final(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.first = batch_first
        self.rnn = nn.LSTM(3, 3, num_layers=2, batch_first=batch_first)

    def forward(self, x):
        _, (self.h, _) = self.rnn(x if self.first else x.transpose(0, 1))
        return self.h[-1]


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("batch_first", [True, False])
def test_final_states_of_a_recurrent_layer(tmp_path, batch_first, n):
    model = Final(batch_first)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        model(torch.randn(n, 4, 3))
        recorder.step(labels=torch.arange(n))
    run = rs.open(tmp_path / "run")
    rows, labels = run.read("rnn:[1][0]"), run.labels(layer="rnn:[1][0]")
    assert torch.allclose(rows[labels == 1], model.h[:, 1])


def test_a_gradient_is_reduced_like_its_output(tmp_path):
    model = nn.Sequential(nn.Tanh(), nn.Conv1d(6, 6, 3, padding=1))
    path, targets = tmp_path / "run", ("outputs", "output_gradients")
    with rs.Recorder(model, path, every=1, capture=targets) as recorder:
        model(torch.randn(8, 6, 10, requires_grad=True)).square().sum().backward()
        recorder.step()
    run = rs.open(path)
    assert run.read("0", target="output_gradients").shape == run.read("0").shape


def test_a_step_that_a_fused_optimizer_skips_is_none(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, optimizer=optimizer) as recorder:
        for factor in (1.0, float("inf")):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 4)).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            recorder.step()
        assert recorder.step_number == 1


def test_gradients_of_a_fused_optimizer_are_unscaled(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    path, target = tmp_path / "run", "weight_gradients"
    options = {"every": 1, "optimizer": optimizer, "capture": target}
    with rs.Recorder(model, path, **options) as recorder:
        scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
        true = model[0].weight.grad / 1024
        scaler.step(optimizer)
        scaler.update()
        recorder.step()
    assert torch.allclose(rs.open(path).read("0.weight", step=0, target=target), true)


def test_an_optimizer_that_calls_the_step_of_its_parent(tmp_path):
    class Mine(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.Adam([nn.Parameter(torch.ones(1))])  # its step is hooked from here on
    model = linear()
    optimizer = Mine(model.parameters(), 0.1)
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, optimizer=optimizer) as recorder:
        update(model, optimizer, torch.randn(8, 4))
        recorder.step()
        assert recorder.step_number == 1


def test_parametrized_layers_are_layers():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert rs.layers(nn.Sequential(normed, nn.ReLU())) == ["0", "1"]


def test_a_compiled_part_keeps_its_name():
    model = nn.Sequential(nn.ReLU())
    model.add_module("fc", torch.compile(nn.Linear(4, 3)))
    assert rs.layers(model) == ["0", "fc"]


def test_what_is_no_tensor_goes_with_its_rows_or_is_refused():
    seen = []
    inputs = {"x": torch.arange(4), "text": ["a", "b", "c", "d"]}
    try:
        probe = rs.Probe(inputs, batch_size=2, forward=lambda m, c: seen.append(c))
    except UsageError:
        return
    probe.run(linear())
    assert [list(chunk["text"]) for chunk in seen] == [["a", "b"], ["c", "d"]]


def test_the_hash_knows_nested_inputs():
    x = torch.ones(3, 2)
    one, other = (rs.Probe((x, (torch.full((3,), v),))) for v in (0.0, 1.0))
    assert one.sha256 != other.sha256


@pytest.mark.parametrize("durability", ["batch", "append"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_memory_that_is_used_again_never_shows_in_the_store(
    tmp_path, durability, dtype
):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    path, targets = tmp_path / "run", tuple(TARGETS)
    outputs, y = [], torch.arange(8) % 3
    with rs.Recorder(
        model, path, every=1, optimizer=optimizer, capture=targets, dtype=dtype,
        durability=durability, max_rows=5,
    ) as recorder:  # fmt: skip
        for step in range(12):
            out = model(torch.randn(8, 4))
            outputs.append(out.detach().clone())
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            recorder.step(labels=y.clone())
            if step % 5 == 4:
                recorder.commit()
    run = rs.open(path)
    for step, expected in enumerate(outputs):
        rows, labels = run.read("2", step=step), run.labels(step, layer="2")
        assert len(rows) == 5
        for row, label in zip(rows, labels, strict=True):
            at = (expected.to(row.dtype) == row).all(1).nonzero().flatten()
            assert y[at].tolist() == [label]
    records = run.snapshots(target="moments")
    assert sum(run.moments("2", step=r.step).count for r in records) == 12 * 8


def test_two_views_before_one_backward(tmp_path):
    model = linear()
    path, targets = tmp_path / "run", ("outputs", "output_gradients")
    options = {"every": 1, "capture": targets, "max_rows": 6}
    with rs.Recorder(model, path, **options) as recorder:
        (model(torch.randn(4, 4)) * model(torch.randn(4, 4))).sum().backward()
        recorder.step(labels=range(8))
    run = rs.open(path)
    kept = run.labels(layer="0")
    assert len(kept) == 6
    assert torch.equal(kept, run.labels(layer="0", target="output_gradients"))


def test_two_models_and_two_optimizers(tmp_path):
    generator, critic = linear(2, 4), linear(4, 1)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (generator, critic)]
    with (
        rs.Recorder(generator, tmp_path / "g", every=1, optimizer=optimizers[0]) as g,
        rs.Recorder(critic, tmp_path / "c", every=1, optimizer=optimizers[1]) as c,
    ):
        for _ in range(3):
            fake = generator(torch.randn(8, 2))
            optimizers[1].zero_grad()
            (critic(torch.randn(8, 4)) - critic(fake.detach())).mean().backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            critic(fake).mean().backward()
            optimizers[0].step()
            g.step()
            c.step()
    assert [len(rs.open(tmp_path / "g").read("0", step=s)) for s in range(3)] == [8] * 3
    assert [len(rs.open(tmp_path / "c").read("0", step=s)) for s in range(3)] == [
        16
    ] * 3


def test_a_probe_of_the_whole_is_no_batch_of_a_part(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(6, 4)
    with (
        rs.Recorder(model, tmp_path / "whole", every=1, probe=x) as whole,
        rs.Recorder(model[0], tmp_path / "part", every=1) as part,
    ):
        for _ in range(3):
            update(model, optimizer, torch.randn(8, 4))
            whole.step()
            part.step(labels=torch.arange(8))
    run = rs.open(tmp_path / "part")
    assert [len(run.read("0", step=s)) for s in range(3)] == [8] * 3
    assert rs.open(tmp_path / "whole").read("0.1").shape == (6, 4)


def test_packed_sequences(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x, lengths):
            pack = nn.utils.rnn.pack_padded_sequence
            return self.rnn(pack(x, lengths, True, enforce_sorted=False))[1][0][-1]

    model = Net()
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        h = model(torch.randn(4, 5, 4), torch.tensor([2, 5, 1, 3]))
        recorder.step(labels=torch.arange(4))
    run = rs.open(tmp_path / "run")
    assert run.read("rnn:[0][0]").shape == (11, 3)  # packed: of no example alone
    assert run.labels(layer="rnn:[0][0]") is None
    assert torch.equal(run.read("rnn:[1][0]"), h)
    assert run.labels(layer="rnn:[1][0]").tolist() == [0, 1, 2, 3]


def test_batches_without_rows(tmp_path):
    model = linear()
    path, targets = tmp_path / "run", ("outputs", "moments")
    options = {"every": 1, "capture": targets, "max_rows": 3}
    with rs.Recorder(model, path, **options) as recorder:
        for n in (0, 5):
            model(torch.randn(n, 4))
            recorder.step(labels=[0] * n)
    run = rs.open(path)
    assert [len(run.read("0", step=s)) for s in (0, 1)] == [0, 3]
    assert run.moments("0").count == 5


def test_autocast_that_is_switched_on_is_named(tmp_path):
    model = linear()
    recorder = rs.Recorder(model, tmp_path / "run", every=1, dtype=None)
    model(torch.randn(2, 4))
    recorder.step()
    recorder.commit()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RepScopeWarning)
        recorder.step()
    with pytest.raises(DtypeChanged):
        recorder.close()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(1.5), 1.5),
        (True, 1.0),
        (Decimal("1.5"), 1.5),
        (Fraction(1, 2), 0.5),
        (torch.tensor([2.0]), 2.0),
        (torch.tensor(True), 1.0),
        (torch.tensor(3, dtype=torch.int8), 3.0),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor(1.0, requires_grad=True), 1.0),
    ],
)
def test_scalars_of_every_kind(model, tmp_path, value, expected):
    with rs.Recorder(model, tmp_path / "run", probe=torch.randn(3, 4)) as recorder:
        recorder.step(loss=value, **{"a/..": value, "": value})
    table = rs.open(tmp_path / "run").scalars()
    assert table["loss"].dropna().tolist() == [expected]
    assert table["a/.."].dropna().tolist() == table[""].dropna().tolist() == [expected]


# -- (c) is something lost without a word? --------------------------------------
def layers_at(path):
    run = rs.open(path)
    return {s.step: sorted(name for _, name in s.streams)
            for s in run.snapshots(target="outputs")}  # fmt: skip


@pytest.mark.parametrize("live", [True, False])
def test_a_head_that_is_replaced(tmp_path, live):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    probe = None if live else torch.randn(8, 4)
    told = []
    with rs.Recorder(model, tmp_path / "run", every=1, probe=probe) as recorder:
        for step in range(3):
            if step == 1:
                model[1] = nn.Linear(3, 2)
            model(torch.randn(8, 4))
            with warnings.catch_warnings(record=True) as told_now:
                warnings.simplefilter("always")
                recorder.step()
            told += told_now
    assert told or layers_at(tmp_path / "run")[2] == ["0", "1"]


def test_a_model_that_was_left_in_eval_mode(tmp_path):
    model, told = linear(), []
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        for _ in range(3):
            model(torch.randn(8, 4))
            with warnings.catch_warnings(record=True) as told_now:
                warnings.simplefilter("always")
                recorder.step()
            told += told_now
            model.eval()
    assert told


def test_the_next_forward_before_the_call_of_step(tmp_path):
    model, told = linear(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, optimizer=optimizer) as recorder:
        out = model(torch.randn(4, 4))
        for _ in range(3):
            out.sum().backward()
            optimizer.step()
            out = model(torch.randn(4, 4))
            with warnings.catch_warnings(record=True) as told_now:
                warnings.simplefilter("always")
                recorder.step()
            told += told_now
    assert told or sorted(layers_at(path)) == [0, 1, 2]


def test_micro_batches_after_an_update_that_raised(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, optimizer=optimizer) as recorder:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        recorder.step()
    assert len(rs.open(path).read("0", step=0)) == 6


class Calls(nn.Module):
    """Calls a function in the middle of its forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)
        self.between = None

    def forward(self, x):
        x, call = self.a(x), self.between
        self.between = None
        if call is not None:
            call()
        return self.b(x)


@pytest.mark.parametrize("thread", [True, False])
def test_a_forward_inside_a_forward(tmp_path, thread):
    model = Calls()

    def act():
        with torch.no_grad():
            model(torch.randn(1, 4))

    def beside():
        other = threading.Thread(target=act)
        other.start()
        other.join()

    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        model.between = beside if thread else act
        model(torch.randn(8, 4))
        recorder.step(labels=torch.arange(8))
    assert layers_at(tmp_path / "run") == {0: ["a", "b"]}


class Gate:
    """Holds back every append until it is opened."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        append = writer_module.Writer.append

        def held(writer, snapshot):
            assert self.open.wait(20)
            append(writer, snapshot)

        monkeypatch.setattr(worker, "has_spare_core", lambda: True)
        monkeypatch.setattr(writer_module.Writer, "append", held)


def test_a_dropped_step_takes_no_other_with_it(model, tmp_path, monkeypatch):
    gate, path = Gate(monkeypatch), tmp_path / "run"
    options = {"policy": "drop_step", "queue_bytes": 1000, "every": 10}
    with rs.Recorder(model, path, probe=torch.randn(50, 4), **options) as rec:
        for step in range(35):
            rec.step(loss=float(step))
        gate.open.set()
    run = rs.open(path)
    dropped = {*run.meta["dropped_steps"]}
    losses = {*run.scalars()["loss"].dropna().index}
    assert {*range(35)} - losses <= dropped


def test_steps_that_were_dropped_are_counted_whatever_waits(
    model, tmp_path, monkeypatch
):
    gate, path = Gate(monkeypatch), tmp_path / "run"
    options = {"policy": "drop_step", "queue_bytes": 100, "every": 1}
    with rs.Recorder(model, path, probe=torch.randn(50, 4), **options) as recorder:
        for _ in range(3):
            recorder.step()
        gate.open.set()
    run = rs.open(path)
    assert run.steps == [0]
    assert run.meta.get("dropped_steps") == [1, 2, 3]


def test_a_note_about_labels_is_not_dropped(tmp_path, monkeypatch):
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x.transpose(0, 1).flatten(0, 1) if x.ndim == 3 else x)

    gate, path, model = Gate(monkeypatch), tmp_path / "run", Turns()
    y = torch.tensor([7, 8, 9])
    options = {"policy": "drop_step", "queue_bytes": 10, "every": 1}
    with rs.Recorder(model, path, **options) as recorder:
        for shape in ((3, 4), (3, 2, 4)):
            model(torch.randn(shape))
            recorder.step(labels=y)
        gate.open.set()
        recorder.commit()
        model(torch.randn(3, 2, 4))
        recorder.step(labels=y)
    labels = rs.open(path).labels(step=2, layer="fc")
    assert labels is None or labels.tolist() == [7, 8, 9] * 2


def full_disk(monkeypatch):
    def commit(writer):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(writer_module.Writer, "_commit", commit)
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 0.0)


def test_close_again_after_a_full_disk_writes_all_that_waited(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "has_spare_core", lambda: False)
    model, path = linear(), tmp_path / "run"
    recorder = rs.Recorder(model, path, every=100, capture="moments")
    model(torch.randn(7, 4))
    recorder.step(loss=0.0)
    for step in range(1, 6):
        recorder.step(loss=float(step))
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(StoreFull):
            recorder.close()
    recorder.close()
    run = rs.open(path)
    assert run.scalars()["loss"].dropna().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert run.moments("0").count == 7


def test_nothing_is_recorded_after_the_first_error(model, tmp_path, monkeypatch):
    path, gate = tmp_path / "run", Gate(monkeypatch)
    append = writer_module.Writer.append

    def fails_once(writer, snapshot):
        append(writer, snapshot)
        if snapshot.step == 1 and snapshot.streams:
            raise ValueError("no")

    gate.open.set()
    recorder = rs.Recorder(model, path, every=1, probe=torch.randn(3, 4))
    gate.open.clear()
    monkeypatch.setattr(writer_module.Writer, "append", fails_once)
    for _ in range(4):
        recorder.step()
    gate.open.set()
    with pytest.raises(ValueError, match="no"):
        recorder.close()
    assert rs.open(path).steps == [0, 1]


def test_an_interrupt_inside_a_probe_leaves_a_recorder_that_goes_on(tmp_path):
    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.stop = nn.BatchNorm1d(4), False

        def forward(self, x):
            if self.stop:
                raise KeyboardInterrupt
            return self.norm(x)

    model = Stops()
    before = copy.deepcopy(model.state_dict())
    with rs.Recorder(model, tmp_path / "run", every=1, probe=torch.randn(3, 4)) as rec:
        model.stop = True
        with pytest.raises(KeyboardInterrupt):
            rec.step(loss=0.0)
        model.stop = False
        assert model.training
        assert model.norm.training
        assert same(model.state_dict(), before)
        assert not any(m._forward_hooks for m in model.modules())
        rec.step(loss=1.0)
    run = rs.open(tmp_path / "run")
    assert run.steps == [0, 2]
    assert run.scalars()["loss"].dropna().to_dict() == {0: 0.0, 1: 1.0}


# -- (d) does it hang, leak or crash? -------------------------------------------
def test_a_schedule_that_raises_does_not_break_training(model, tmp_path):
    def due(step):
        return step < 2 or 1 / 0

    recorder = rs.Recorder(model, tmp_path / "run", every=due, probe=torch.ones(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RepScopeWarning)
        for _ in range(4):
            recorder.step(loss=0.0)
    with pytest.raises(ZeroDivisionError):
        recorder.close()


def test_a_full_queue_does_not_break_training(tmp_path, monkeypatch):
    class Nothing(nn.Module):
        def forward(self, x):
            return None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.nothing = nn.Linear(4, 3), Nothing()

        def forward(self, x):
            self.nothing(x)
            return self.fc(x)

    gate, model = Gate(monkeypatch), Net()
    options = {"policy": "raise", "queue_bytes": 10, "every": 1}
    recorder = rs.Recorder(model, tmp_path / "run", **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RepScopeWarning)
            for _ in range(3):
                model(torch.randn(3, 4))
                recorder.step()
    finally:
        gate.open.set()
        time.sleep(0.2)
        with pytest.raises(QueueFull):
            recorder.close()


def test_updates_are_counted_after_an_error_too(tmp_path):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = rs.Recorder(model, tmp_path / "run", every=3, optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RepScopeWarning)
        for step in range(7):
            update(model, optimizer, torch.randn(4, 4))
            recorder.step(labels=range(4 + step // 3))
    with pytest.raises(LabelMismatch):
        recorder.close()
    assert recorder.step_number == 7


def test_memory_does_not_grow_with_the_number_of_shapes(tmp_path):
    model = linear(4, 16)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        for length in range(100):
            model(torch.randn(4, 50 + length, 4))
            recorder.step()
            recorder.commit()
        free = recorder._plan.settings.pool._free
        kept = sum(tensor.nbytes for each in free.values() for tensor in each)
        assert kept <= 10 * 4 * 150 * 16 * 4  # ten of the largest


@pytest.mark.filterwarnings("ignore::repscope.errors.RepScopeWarning")
def test_a_recorder_that_is_collected_in_its_own_thread(model, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    monkeypatch.setattr(recorder_module, "_EXIT_SECONDS", 4.0)
    dropped, done, took = threading.Event(), threading.Event(), []

    def collects(snapshot):
        if snapshot.step and dropped.wait(20):
            start = time.monotonic()
            gc.collect()
            took.append(time.monotonic() - start)
            done.set()

    gc.collect()
    gc.disable()
    try:
        path, x = tmp_path / "run", torch.randn(3, 4)
        recorder = rs.Recorder(model, path, every=1, probe=x, sinks=[collects])
        recorder.step()
        recorder.me = recorder
        del recorder
        dropped.set()
        assert done.wait(20)
    finally:
        gc.enable()
    assert took[0] < 3.5  # or it has waited for itself; a busy machine needs one


def test_a_job_that_asks_for_another_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    thread = worker.Worker(policy="block", queue_bytes=100, waits=False)
    seen = []
    inner = functools.partial(thread.call, lambda: seen.append("inner"), timeout=0.2)
    thread.put(inner, nbytes=0)
    thread.call(lambda: None)
    thread.stop()
    assert thread.error is None


def test_a_capture_inside_inference_mode(tmp_path):
    model, x = linear(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"every": 1, "probe": x, "on_error": "raise"}
    with rs.Recorder(model, tmp_path / "run", **options) as recorder:
        for _ in range(3):
            update(model, optimizer, x)
            recorder.step()
            with torch.inference_mode():
                recorder.capture_now("evaluated", accuracy=0.5)
            recorder.commit()


@pytest.mark.parametrize("options", [{}, {"max_rows": 3}])
def test_a_default_device_is_not_that_of_the_store(tmp_path, options):
    model, x = linear(), torch.randn(8, 4)
    with torch.device("meta"):  # as set_default_device, for "cuda"
        recorder = rs.Recorder(
            model, tmp_path / "run", every=1, on_error="raise", **options
        )
        try:
            model(x)
            recorder.step()
        finally:
            recorder.close()
    assert len(rs.open(tmp_path / "run").read("0")) == options.get("max_rows", 8)


@pytest.mark.parametrize(
    "buffer", [torch.eye(3).to_sparse(), torch.eye(3).to(torch.float8_e4m3fn)]
)
def test_buffers_of_other_kinds(tmp_path, buffer):
    model = linear()
    model.register_buffer("other", buffer)
    with rs.Recorder(model, tmp_path / "run", probe=torch.randn(3, 4)):
        pass


def test_a_nested_tensor_of_vectors(tmp_path):
    class Cuts(nn.Module):
        def forward(self, x):
            return torch.nested.nested_tensor([x[0, :2], x[1, :1]], layout=torch.jagged)

    model = nn.Sequential(Cuts())
    with rs.Recorder(model, tmp_path / "run", every=1, on_error="raise") as recorder:
        model(torch.randn(2, 4))
        recorder.step()
    assert rs.open(tmp_path / "run").read("0").shape == (3, 1)


def test_many_steps_with_a_loss_only(tmp_path):
    model, loss, path = linear(), torch.tensor(1.5), tmp_path / "run"
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no Path is needed
    with rs.Recorder(model, path, every=10**9, probe=torch.randn(3, 4)) as recorder:
        start = time.monotonic()
        for _ in range(20_000):
            recorder.step(loss=loss)
        assert (time.monotonic() - start) / 20_000 < 1e-3
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # noqa: PTH208
    assert len(rs.open(path).scalars()) == 20_000
    assert sum(file.stat().st_size for file in path.rglob("*")) < 500_000


def test_many_commits_leave_few_files_and_no_descriptors(model, tmp_path):
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=1, probe=torch.randn(3, 4)) as recorder:
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(40):
            recorder.step(loss=1.0)
            recorder.commit()
        assert len(os.listdir("/proc/self/fd")) <= descriptors  # noqa: PTH208
    assert len([*path.rglob("*")]) < 40


def test_steps_from_two_threads_are_all_counted(model, tmp_path):
    path = tmp_path / "run"
    with rs.Recorder(model, path, every=10**9, probe=torch.randn(3, 4)) as recorder:

        def steps(name):
            for _ in range(200):
                recorder.step(**{name: 1.0})

        threads = [threading.Thread(target=steps, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert recorder.step_number == 400
    table = rs.open(path).scalars()
    assert table["a"].notna().sum() == table["b"].notna().sum() == 200


# -- (e) is something said that is not so? --------------------------------------
def test_a_layer_that_runs_later_is_not_said_to_be_unrecorded(tmp_path):
    model = Skips()
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        model(torch.randn(2, 4), skip=True)
        with pytest.warns(RepScopeWarning) as told:
            recorder.step()
        model(torch.randn(2, 4))
        recorder.step()
    run = rs.open(tmp_path / "run")
    said = "are not recorded" in str(told[0].message)
    assert ("b" in run.layers) != said
    assert ("b" in run.layers) != ("b" in run.meta.get("never_fired", ()))


def test_a_model_is_only_weakly_referenced(tmp_path):
    model = linear()
    layer = weakref.ref(model[0])
    recorder = rs.Recorder(model, tmp_path / "run", probe=torch.randn(3, 4))
    del model
    gc.collect()
    gone = layer() is None
    recorder.close()
    assert gone


def test_steps_that_numpy_made():
    due = rs.at_steps(np.unique(np.logspace(0, 2, 5).astype(int)))
    assert due(100)
    assert rs.every(np.int64(5))(10)


def test_a_number_beside_the_batch():
    inputs = {"x": torch.ones(3, 2), "temperature": torch.tensor(0.5)}
    assert rs.Probe(inputs).n_samples == 3


def test_inputs_that_cannot_be_read_are_named_as_inputs(tmp_path):
    class Odd(nn.Module):
        def forward(self, x, config):
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            return self.odd(x, config=object())

    with pytest.raises(rs.errors.UnsupportedOutput) as error:
        rs.Recorder(Net(), tmp_path / "run", capture="inputs", probe=torch.ones(2, 4))
    assert "returned" not in str(error.value)


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_made_an_error_stops_no_recording(tmp_path):
    model, path = Skips(), tmp_path / "run"
    recorder = rs.Recorder(model, path, every=1)
    model(torch.randn(2, 4), skip=True)
    with pytest.raises(RepScopeWarning, match="did not run"):
        recorder.step()
    model(torch.randn(2, 4))
    recorder.step()
    recorder.close()
    assert layers_at(path) == {0: ["a"], 1: ["a", "b"]}
