"""Trainings that Lightning runs, with and without the callback."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from stores import assert_resumed_like
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import repscope as rs
from repscope.errors import RepScopeWarning, StoreExists

pl = pytest.importorskip("lightning.pytorch")
from repscope.integrations.lightning import RecorderCallback  # noqa: E402

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]

N, BATCH = 24, 4


class Net(pl.LightningModule):
    """What people write: a loss module, dropout, a part called in training_step."""

    def __init__(self, how="self"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)
        self.loss = nn.CrossEntropyLoss()
        self.how = how
        self.losses = []

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x) if self.how == "self" else self.head(self.net(x))
        loss = self.loss(out, y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val", self.loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Manual(Net):
    """Two optimizers; the second makes two updates a batch, the first one in two."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        x, y = batch
        loss = self.loss(self(x), y)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        second.step()
        second.step()
        second.zero_grad()
        if batch_idx % 2:
            first.step()
            first.zero_grad()
        return loss

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net.parameters(), lr=0.1),
            torch.optim.SGD(self.head.parameters(), lr=0.1),
        ]


def loaders():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 6, generator=g), torch.randint(3, (N,), generator=g)
    data = TensorDataset(x, y)
    return DataLoader(data, batch_size=BATCH), DataLoader(data, batch_size=2 * BATCH)


def fit(folder, callbacks=(), *, model=Net, ckpt=None, validate=True, **options):
    pl.seed_everything(3, verbose=False)
    model = model()
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "enable_checkpointing": False} | options,
    )
    train, val = loaders()
    trainer.fit(model, train, val if validate else None, ckpt_path=ckpt)
    return model, trainer


def second_of(batch):
    return batch[1]


LIVE = {"labels": second_of, "every": 1, "layers": ["net.*", "head"]}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated", "bf16"],
)
def test_a_recorded_training_is_bit_identical(tmp_path, options):
    plain, _ = fit(tmp_path, **options)
    callback = RecorderCallback(
        tmp_path / "run",
        **LIVE,
        capture=("inputs", "outputs", "weights", "weight_gradients", "updates"),
    )
    recorded, trainer = fit(tmp_path, [callback], **options)
    assert same(plain.state_dict(), recorded.state_dict())
    assert plain.losses == recorded.losses
    run = rs.open(tmp_path / "run")
    assert run.closed
    assert callback.recorder.error is None
    assert run.steps[-1] == trainer.global_step == callback.recorder.step_number


@pytest.mark.parametrize("how", ["self", "parts"])
def test_what_is_recorded_is_the_training_batches_and_their_losses(tmp_path, how):
    model, _ = fit(
        tmp_path,
        [RecorderCallback(tmp_path / "run", **LIVE)],
        model=lambda: Net(how),
    )
    run = rs.open(tmp_path / "run")
    assert run.layers == ["net.0", "net.1", "net.2", "head"]
    steps = N // BATCH * 2
    assert run.scalars()["loss"].tolist() == pytest.approx(model.losses)
    y = torch.cat([batch[1] for batch in loaders()[0]])
    for step in range(steps):
        assert run.read("head", step=step).shape == (BATCH, 3)
        at = step * BATCH % N
        assert torch.equal(run.labels(step=step), y[at : at + BATCH])
    assert run.meta["recorder"]["optimizer"]["class"] == "AdamW"


def test_accumulated_batches_are_the_rows_of_one_step(tmp_path):
    callback = RecorderCallback(tmp_path / "run", **LIVE)
    model, _ = fit(tmp_path, [callback], accumulate_grad_batches=4, max_epochs=1)
    run = rs.open(tmp_path / "run")
    # 6 batches: an update after 4, and one at the end of the epoch
    assert [len(run.read("head", step=step)) for step in run.steps] == [16, 8]
    assert torch.equal(run.labels(step=0), loaders()[0].dataset.tensors[1][:16])
    expected = [sum(model.losses[:4]) / 4, sum(model.losses[4:]) / 2]
    assert run.scalars()["loss"].tolist() == pytest.approx(expected)


def test_accumulated_batches_of_a_model_called_by_its_parts(tmp_path):
    callback = RecorderCallback(tmp_path / "run", **LIVE)
    fit(tmp_path, [callback], model=lambda: Net("parts"), accumulate_grad_batches=4)
    run = rs.open(tmp_path / "run")
    assert run.layers == ["net.0", "net.1", "net.2", "head"]
    assert [len(run.read("head", step=step)) for step in run.steps] == [16, 8, 16, 8]


def test_a_loss_that_is_a_module_is_no_example(tmp_path):
    callback = RecorderCallback(tmp_path / "run", every=1, labels=second_of)
    fit(tmp_path, [callback])
    assert torch.equal(
        rs.open(tmp_path / "run").labels(step=0), next(iter(loaders()[0]))[1]
    )


def test_manual_optimization_counts_the_first_optimizer(tmp_path):
    callback = RecorderCallback(tmp_path / "run", **LIVE)
    model, trainer = fit(tmp_path, [callback], model=Manual, max_epochs=1)
    run = rs.open(tmp_path / "run")
    assert callback.recorder.step_number == 3
    assert trainer.global_step == 15  # Lightning counts every update
    assert [len(run.read("head", step=step)) for step in run.steps] == [8, 8, 8]
    pairs = [sum(model.losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert run.scalars()["loss"].tolist() == pytest.approx(pairs)


def test_a_probe_is_recorded_at_the_start_and_at_every_capture(tmp_path):
    x, y = loaders()[0].dataset.tensors
    callback = RecorderCallback(tmp_path / "run", every=5, probe=(x, y), layers="net.1")
    fit(tmp_path, [callback])
    run = rs.open(tmp_path / "run")
    assert run.steps == [0, 5, 10]
    assert run.read("net.1", step=10).shape == (N, 8)


# -- checkpoints -------------------------------------------------------------
def saving(folder, **when):
    when = when or {"every_n_train_steps": 4}
    return pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, **when)


def record(folder):
    return RecorderCallback(folder / "run", **LIVE, capture=("outputs", "weights"))


class Stop(pl.Callback):
    def __init__(self, error, *, epoch=0, batch):
        self.error, self.at = error, (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise self.error


# Lightning restores neither the place in the data nor the random numbers of dropout.
@pytest.mark.parametrize("kind", [Net, Manual])
def test_a_resumed_training_goes_on_in_the_store(tmp_path, kind):
    def model():
        made = kind()
        made.net[2].p = 0.0
        return made

    def callbacks(folder):
        return [record(folder), saving(folder, every_n_epochs=1)]

    whole, again = tmp_path / "whole", tmp_path / "again"
    on = {"validate": False, "enable_checkpointing": True}
    fit(whole, callbacks(whole), model=model, **on)
    stop = Stop(ValueError("stop"), epoch=1, batch=2)
    with pytest.raises(ValueError, match="stop"):
        fit(again, [*callbacks(again), stop], model=model, **on)
    at = rs.open(again / "run").progress
    assert at == (8 if kind is Net else 4)
    (ckpt,) = again.glob("*.ckpt")
    resumed = callbacks(again)
    fit(again, resumed, model=model, ckpt=ckpt, **on)
    assert resumed[0].recorder.step_number == (12 if kind is Net else 6)

    assert_resumed_like(rs.open(again / "run"), rs.open(whole / "run"))


def test_a_checkpoint_finds_its_step_in_the_store(tmp_path):
    callback, committed = record(tmp_path), []

    class Watch(pl.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            committed.append(rs.open(tmp_path / "run").progress)

    fit(tmp_path, [callback, saving(tmp_path), Watch()], enable_checkpointing=True)
    assert committed == [4, 8, 12]


def test_a_fit_that_goes_on_in_memory_goes_on_in_the_store(tmp_path):
    callback = record(tmp_path)
    model, trainer = fit(tmp_path, [callback])
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, *loaders())
    assert rs.open(tmp_path / "run").steps == list(range(N // BATCH * 3 + 1))
    with pytest.raises(StoreExists):  # another training is another run
        fit(tmp_path, [callback])
    assert fit(tmp_path, [RecorderCallback(tmp_path / "other", every=4)])


def test_what_cannot_be_made_durable_does_not_stop_the_training(tmp_path, monkeypatch):
    def full(self):
        raise OSError("no room")

    callback = record(tmp_path)
    monkeypatch.setattr(rs.Recorder, "commit", full)
    with pytest.warns(RepScopeWarning, match=r"at step \d+: OSError: no room\. Tr"):
        fit(tmp_path, [callback, saving(tmp_path)], enable_checkpointing=True)
    assert callback.recorder.step_number == N // BATCH * 2

    strict = RecorderCallback(tmp_path / "strict", on_error="raise")
    with pytest.raises(OSError, match="no room"):
        fit(tmp_path, [strict, saving(tmp_path)], enable_checkpointing=True)


def test_a_recording_that_failed_is_told_at_the_end(tmp_path):
    callback = RecorderCallback(tmp_path / "run", labels=lambda batch: [1])
    ended = []

    class End(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            ended.append(trainer.global_step)

    with (
        pytest.warns(RepScopeWarning, match="stopped at step 1") as warned,
        pytest.raises(rs.errors.LabelMismatch),
    ):
        fit(
            tmp_path,
            [callback, saving(tmp_path), End()],
            enable_checkpointing=True,
        )
    assert len([w for w in warned if w.category is RepScopeWarning]) == 1
    assert ended == [N // BATCH * 2]


# -- exceptions --------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "raised"),
    [(ValueError("stop"), ValueError), (KeyboardInterrupt(), SystemExit)],
    ids=["error", "ctrl-c"],
)
def test_an_exception_passes_through_and_the_store_is_closed(tmp_path, error, raised):
    import signal

    handler = signal.getsignal(signal.SIGINT)
    callback = record(tmp_path)
    try:
        # Lightning itself turns the interrupt of a user into an exit.
        with pytest.raises(raised) as caught:
            fit(tmp_path, [callback, Stop(error, batch=3)])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert error in (caught.value, caught.value.__context__)
    run = rs.open(tmp_path / "run")
    assert run.closed
    assert run.meta["interrupted"] == type(error).__name__
    assert run.steps == [0, 1, 2, 3]


def test_an_exception_before_the_training_starts(tmp_path):
    class Early(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            raise ValueError("early")

    callback = record(tmp_path)
    with pytest.raises(ValueError, match="early"):
        fit(tmp_path, [Early(), callback])
    assert callback.recorder is None
    assert callback.state_dict() == {}


# -- which Lightning ---------------------------------------------------------
def test_the_older_package_serves_alone():
    pytest.importorskip("pytorch_lightning")
    code = (
        "import sys, warnings; warnings.simplefilter('ignore');"
        "sys.modules['lightning'] = None; import pytorch_lightning as pl;"
        "from repscope.integrations.lightning import RecorderCallback;"
        "print(issubclass(RecorderCallback, pl.Callback))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_without_lightning_the_install_line_is_named():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['lightning', 'pytorch_lightning']);"
        "import repscope.integrations.lightning"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "MissingExtra" in done.stderr
    assert "pip install 'repscope[lightning]'" in done.stderr
