"""Models as people train them: a recorder changes no bit of the run, and just works."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import repscope as rs
from repscope.optim import OPTIMIZERS, make

TARGETS = ("outputs", "inputs", "moments", "weights")
LIVE = (*TARGETS, "output_gradients", "weight_gradients", "updates", "optimizer_state")


class Conv(nn.Module):
    def __init__(self, reentrant=None, *, noise=True):
        super().__init__()
        self.noise = noise
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout2d(0.3))
        self.head = nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.act(self.norm(self.stem(x)))
        if self.reentrant is None:
            h = self.block(h)
        else:
            h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        # Noise from every global generator, as augmentation inside a model has it.
        if self.noise:  # which compilers do not read
            h = h + random.random() + np.random.rand()  # noqa: NPY002
        return self.head(h.mean((2, 3)))


def train(path, case, optimizer_name, *, recorded, probe):
    """Return everything that training leaves: losses, state, buffers, random states."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    reentrant = {"reentrant": True, "recompute": False}.get(case)
    model = Conv(reentrant, noise=case != "compile")
    optimizer = make(optimizer_name, model.parameters(), lr=0.05)
    run = torch.compile(model, backend="eager") if case == "compile" else model
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=case == "amp")
    context = contextlib.nullcontext()
    if recorded:
        batch = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(3))
        context = rs.Recorder(
            model,
            path,
            every=2,
            capture=TARGETS if probe else LIVE,
            optimizer=optimizer,
            probe=rs.Probe(batch, batch_size=4) if probe else None,
            max_rows=5,
            on_error="raise",
        )
    generator = torch.Generator().manual_seed(1)
    losses = []
    with context as recorder:
        for _ in range(5):
            x = torch.randn(8, 1, 5, 5, generator=generator)
            y = torch.randint(3, (8,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "amp"):
                loss = nn.functional.cross_entropy(run(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if recorder is not None:
                recorder.step(loss=loss, labels=y)
    state = [*losses, *model.state_dict().values(), torch.get_rng_state()]
    for each in optimizer.state.values():
        state += [value for value in each.values() if isinstance(value, torch.Tensor)]
    state.append(torch.tensor(np.random.get_state()[1].astype(np.int64)))  # noqa: NPY002
    return state, random.getstate(), [m.training for m in model.modules()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("probe", [False, True], ids=["live", "probe"])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        *(("plain", name) for name in ("sgd", "adamw", "shampoo")),
        *((case, "adamw") for case in ("amp", "compile", "recompute", "reentrant")),
    ],
)
def test_training_is_bit_identical(tmp_path, case, name, probe):
    assert name in OPTIMIZERS
    torch.compiler.reset()
    with_recorder = train(tmp_path / "run", case, name, recorded=True, probe=probe)
    without = train(tmp_path, case, name, recorded=False, probe=probe)
    assert len(with_recorder[0]) == len(without[0])
    assert all(map(torch.equal, with_recorder[0], without[0]))
    assert with_recorder[1:] == without[1:]
    assert rs.open(tmp_path / "run").read("head").shape[1] == 3


# -- transformers -------------------------------------------------------------
def encoder(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=batch_first, activation="gelu"
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("batch_first", "probe"), [(True, True), (True, False), (False, True)]
)
def test_every_layer_of_a_transformer(tmp_path, batch_first, padded, probe):
    model = encoder(batch_first)
    n, t = 6, 5
    x = torch.randn(n, t, 8)
    given = x if batch_first else x.transpose(0, 1)
    padding = torch.arange(t) >= torch.tensor([5, 3, 1, 5, 2, 4])[:, None]
    mask = {"src_key_padding_mask": padding} if padded else {}
    kept = (~padding).flatten() if padded else torch.ones(n * t, dtype=torch.bool)
    labels = torch.arange(n)
    options = {"layers": "*", "every": 1, "on_error": "raise"}

    def forward(model, chunk):
        src, *rest = chunk.values()
        src = src if batch_first else src.transpose(0, 1)
        return model(src, src_key_padding_mask=rest[0] if rest else None)

    if probe:
        inputs = {"src": x, **mask}
        batch = rs.Probe(inputs, labels=labels, batch_size=4, forward=forward)
        rs.Recorder(model, tmp_path / "run", probe=batch, **options).close()
    else:
        with rs.Recorder(model, tmp_path / "run", **options) as recorder:
            model(given, **mask).sum().backward()
            recorder.step(labels=labels)
    run = rs.open(tmp_path / "run")
    assert "never_fired" not in run.meta
    assert {name.partition(":")[0] for name in run.layers} == set(rs.layers(model))
    rows = run.read("layers.0.norm1", 0)
    layer = encoder(batch_first).layers[0]
    hidden, _ = layer.self_attn(
        given, given, given, key_padding_mask=padding if padded else None
    )
    hidden = layer.norm1(given + hidden).detach()
    hidden = (hidden if batch_first else hidden.transpose(0, 1)).reshape(n * t, 8)
    torch.testing.assert_close(rows, hidden[kept], atol=1e-5, rtol=1e-4)
    found = run.labels(0, layer="layers.0.norm1")
    assert found.tolist() == labels.repeat_interleave(t)[kept].tolist()


def test_a_model_that_takes_time_first_says_how_many_examples_were_seen(tmp_path):
    model = encoder(batch_first=False)
    recorder = rs.Recorder(model, tmp_path / "run", every=1, on_error="raise")
    model(torch.randn(5, 6, 8)).sum().backward()
    with pytest.raises(rs.errors.LabelMismatch, match=r"6 labels .* the 5 examples"):
        recorder.step(labels=torch.arange(6))
    with pytest.raises(rs.errors.LabelMismatch, match="is recorded with probe="):
        recorder.close()


def test_attention_counts_as_one_layer(tmp_path):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    assert rs.layers(model) == ["attention"]
    x = torch.randn(3, 4, 8)
    probe = rs.Probe((x,), forward=lambda m, c: m["attention"](c[0], c[0], c[0]))
    with rs.Recorder(model, tmp_path / "run", probe=probe):
        pass
    # The mixed values, a row a token, and the weights of the mix.
    assert rs.open(tmp_path / "run").layers == ["attention:[0]", "attention:[1]"]
    with pytest.raises(rs.errors.LayerNeverFired, match="its parent 'attention' did"):
        rs.Recorder(model, tmp_path / "two", layers="attention.out_proj", probe=probe)
    assert not (tmp_path / "two").exists()


# -- data loaders -------------------------------------------------------------
class Augmented(Dataset):
    def __init__(self, model):
        self.model = model  # a worker gets a copy of everything that hangs on it

    def __len__(self):
        return 8

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(torch.full((4,), float(i)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_record_nothing(tmp_path, context):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with rs.Recorder(model, tmp_path / "run", every=1, on_error="raise") as recorder:
        loader = DataLoader(
            Augmented(model),
            batch_size=4,
            num_workers=1,
            multiprocessing_context=context,
        )
        for x in loader:
            model(x).sum().backward()
            recorder.step()
    run = rs.open(tmp_path / "run")
    assert run.steps == [0, 1]
    assert [len(run.read("0", step)) for step in run.steps] == [4, 4]
    assert run.closed
