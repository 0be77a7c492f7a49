"""Trainings of tiny random models by the Trainer, with and without the callback."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from stores import assert_resumed_like

import repscope as rs

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from repscope.integrations.transformers import RecorderCallback  # noqa: E402

pytestmark = [
    pytest.mark.integrations,
    # Fused attention does not call these; a test looks at the warning.
    pytest.mark.filterwarnings("ignore:.*selected by a pattern did not run.*attn_drop"),
    pytest.mark.filterwarnings("ignore:.*selected by a pattern did not run.*self.drop"),
]

N, BATCH, T = 24, 4, 5


class Data(torch.utils.data.Dataset):
    def __init__(self, kind):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (N, T), generator=g)
        self.y = torch.randint(3, (N,), generator=g)
        self.kind = kind

    def __len__(self):
        return N

    def __getitem__(self, i):
        labels = self.y[i] if self.kind == "bert" else self.ids[i]
        return {"input_ids": self.ids[i], "labels": labels}


def make(kind):
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
            num_labels=3,
        )
        return transformers.BertForSequenceClassification(config)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=32, n_layer=2, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


class Losses(transformers.TrainerCallback):
    """What the Trainer itself logs at every step."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **known):
        if "loss" in logs:
            self.logged.append(logs["loss"])


def train(folder, callbacks=(), *, kind="bert", resume=None, trainer=None, **options):
    transformers.set_seed(3)
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=BATCH,
        **{"num_train_epochs": 1, "save_strategy": "no"} | options,
    )
    losses = Losses()
    trainer = (trainer or transformers.Trainer)(
        model=make(kind),
        args=args,
        train_dataset=Data(kind),
        eval_dataset=Data(kind),
        callbacks=[losses, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, losses.logged


def labels_of(inputs):
    return inputs["labels"]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 4}, {"bf16": True}],
    ids=["plain", "accumulated", "bf16"],
)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_recorded_training_is_bit_identical(tmp_path, kind, options):
    options = {"kind": kind, "eval_strategy": "steps", "eval_steps": 2} | options
    plain, expected = train(tmp_path, **options)
    callback = RecorderCallback(
        tmp_path / "run",
        every=1,
        capture=("inputs", "outputs", "weights", "weight_gradients", "updates"),
    )
    recorded, losses = train(tmp_path, [callback], **options)
    assert same(plain.model.state_dict(), recorded.model.state_dict())
    assert losses == expected
    run = rs.open(tmp_path / "run")
    assert run.closed
    assert callback.recorder.error is None
    assert run.steps[-1] == recorded.state.global_step
    loss = run.scalars()["loss"].dropna().tolist()
    assert loss == pytest.approx(expected, rel=1e-3)  # the log is rounded
    assert run.meta["recorder"]["optimizer"]["class"] == "AdamW"


def test_layers_are_found_and_labels_belong_to_their_rows(tmp_path):
    trainer, _ = train(
        tmp_path, [RecorderCallback(tmp_path / "run", every=1, labels=labels_of)]
    )
    run = rs.open(tmp_path / "run")
    assert "bert.encoder.layer.1.output.dense" in run.layers
    table = rs.measure(run, metrics=["effective_rank", "class_cosine"])
    at = table[(table.layer == "classifier") & (table.step == 2)]
    assert len(at) == 2
    assert at.value.notna().all()
    rows = run.read("bert.encoder.layer.1.output.dense", step=2)
    assert rows.shape == (BATCH * T, 32)
    assert len(run.labels(step=2)) == BATCH
    assert not trainer.model._forward_hooks


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_accumulated_batches_are_the_rows_of_one_step(tmp_path, kind):
    callback = RecorderCallback(
        tmp_path / "run",
        every=1,
        layers="classifier" if kind == "bert" else "lm_head",
        labels=labels_of if kind == "bert" else None,
    )
    _, logged = train(tmp_path, [callback], kind=kind, gradient_accumulation_steps=4)
    run = rs.open(tmp_path / "run")
    # 6 batches: an update after 4, and one at the end of the epoch
    (layer,) = run.layers
    tokens = 1 if kind == "bert" else T
    assert [len(run.read(layer, step=s)) for s in run.steps] == [
        16 * tokens,
        8 * tokens,
    ]
    assert run.scalars()["loss"].tolist() == pytest.approx(logged, rel=1e-3)
    if kind == "bert":
        assert [len(run.labels(step=step)) for step in run.steps] == [16, 8]


def test_a_loss_computed_elsewhere_is_not_recorded(tmp_path):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            labels = inputs.pop("labels")
            outputs = model(**inputs, return_dict=False)
            return torch.nn.functional.cross_entropy(outputs[0], labels)

    train(tmp_path, [RecorderCallback(tmp_path / "run", every=1)], trainer=Own)
    run = rs.open(tmp_path / "run")
    assert len(run.steps) == N // BATCH
    assert run.scalars().empty


def test_models_that_return_tuples_have_a_loss_too(tmp_path):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            return model(**inputs, return_dict=False)[0]

    callback = RecorderCallback(tmp_path / "run", every=1)
    _, logged = train(tmp_path, [callback], trainer=Own)
    loss = rs.open(tmp_path / "run").scalars()["loss"].tolist()
    assert loss == pytest.approx(logged, rel=1e-3)


@pytest.mark.parametrize(("everywhere", "expected"), [(True, 1.5), (False, 0.75)])
def test_the_loss_of_one_process_of_several(tmp_path, everywhere, expected):
    callback = RecorderCallback(tmp_path / "run")
    for part in (0.25, 0.5):  # divided by the count of tokens in both processes
        output = {"loss": torch.tensor(part)}
        callback._take({"num_items_in_batch": 10}, output)
        output["loss"] *= 2  # as the Trainer does, in place
    args = SimpleNamespace(world_size=2, average_tokens_across_devices=everywhere)
    assert callback._loss(args).item() == expected


# -- checkpoints -------------------------------------------------------------
SAVING = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}


class Stop(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **known):
        if state.global_step == self.step:
            raise ValueError("stop")


def record(folder):
    return RecorderCallback(
        folder / "run", every=1, labels=labels_of, capture=("outputs", "weights")
    )


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_training_goes_on_in_the_store(tmp_path, restore):
    whole, again = tmp_path / "whole", tmp_path / "again"
    on = SAVING | {"restore_callback_states_from_checkpoint": restore}
    train(whole, [record(whole)], **on)
    callback = record(again)
    with pytest.raises(ValueError, match="stop"):
        train(again, [callback, Stop(8)], **on)
    callback.recorder.close()
    assert rs.open(again / "run").progress == 8
    resumed = record(again)
    train(again, [resumed], resume=str(again / "checkpoint-6"), **on)
    assert resumed.recorder.step_number == N // BATCH * 2

    assert_resumed_like(rs.open(again / "run"), rs.open(whole / "run"))


def test_a_checkpoint_finds_its_step_in_the_store(tmp_path):
    committed = []

    class Watch(transformers.TrainerCallback):
        def on_save(self, args, state, control, **known):
            committed.append(rs.open(tmp_path / "run").progress)

    train(tmp_path, [record(tmp_path), Watch()], **SAVING)
    assert committed == [3, 6, 9, 12]


def test_the_step_is_that_of_the_optimizer_not_of_the_trainer(tmp_path, monkeypatch):
    """Gradient scaling skips updates that the Trainer counts as steps."""
    from accelerate.optimizer import AcceleratedOptimizer

    step, calls = AcceleratedOptimizer.step, []

    def skipping(self, closure=None):
        calls.append(closure)
        if len(calls) != 2:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", skipping)
    train(tmp_path, [record(tmp_path)], **SAVING | {"num_train_epochs": 1})
    assert rs.open(tmp_path / "run").progress == N // BATCH - 1
    monkeypatch.undo()
    resumed = record(tmp_path)
    trainer, _ = train(
        tmp_path, [resumed], resume=str(tmp_path / "checkpoint-6"), **SAVING
    )
    assert trainer.state.global_step == 12
    assert resumed.recorder.step_number == 11
    assert rs.open(tmp_path / "run").steps == list(range(12))


def test_a_checkpoint_of_a_training_that_was_not_recorded_has_its_own_step(tmp_path):
    train(tmp_path, **SAVING | {"num_train_epochs": 1})
    callback = record(tmp_path)
    with pytest.raises(rs.errors.NotAStore):  # there is no record to go on with
        train(tmp_path, [callback], resume=str(tmp_path / "checkpoint-6"), **SAVING)
    other = RecorderCallback(tmp_path / "new", every=1, resume=False)
    train(tmp_path, [other], resume=str(tmp_path / "checkpoint-6"), **SAVING)
    assert other.recorder.step_number == 6


# -- what must not break -----------------------------------------------------
def test_an_exception_closes_the_store_of_a_with_block(tmp_path):
    with (
        pytest.raises(ValueError, match="stop"),
        record(tmp_path) as callback,
    ):
        train(tmp_path, [callback, Stop(2)])
    run = rs.open(tmp_path / "run")
    assert run.closed
    assert run.meta["interrupted"] == "ValueError"
    assert run.steps == [0, 1, 2]


def test_a_callback_that_was_interrupted_can_go_on(tmp_path):
    callback = RecorderCallback(tmp_path / "run", every=1, resume=True)
    with pytest.raises(ValueError, match="stop"):
        train(tmp_path, [callback, Stop(2)])
    trainer, _ = train(tmp_path, [callback])
    assert not trainer.model._forward_hooks
    run = rs.open(tmp_path / "run")
    assert run.closed
    assert run.progress == 2 + N // BATCH


def test_copies_of_the_model_take_no_callback_along(tmp_path):
    class Copy(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **known):
            for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                made.train()
                made(**{k: v[None] for k, v in Data("bert")[0].items()})

    callback = RecorderCallback(tmp_path / "run", every=1, labels=labels_of)
    _, logged = train(tmp_path, [callback, Copy()])
    loss = rs.open(tmp_path / "run").scalars()["loss"].tolist()
    assert loss == pytest.approx(logged, rel=1e-3)


def test_without_transformers_the_install_line_is_named():
    code = (
        "import sys; sys.modules['transformers'] = None;"
        "import repscope.integrations.transformers"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "MissingExtra" in done.stderr
    assert "pip install 'repscope[transformers]'" in done.stderr
