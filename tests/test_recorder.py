"""The recorder changes nothing, misses nothing silently and leaves nothing behind."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import repscope as rs
from repscope import errors
from repscope.optim import make


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.norm(self.fc1(x)))))


def data(n=24):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, 4, generator=generator), torch.arange(n) % 3


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def n_hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    )


def train(model, optimizer, recorder=None, *, steps=12, per_step=1):
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(cross_entropy(model(x), y) for _ in range(per_step)) / per_step
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if recorder is not None:
            recorder.step(loss=loss, labels=y.repeat(per_step))
    return losses


def fingerprint(model, losses):
    return [*losses, *model.state_dict().values(), torch.get_rng_state()]


# -- changes nothing ----------------------------------------------------------
@pytest.mark.parametrize("inputs", ["probe", "live"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "shampoo"])
def test_a_recorded_run_is_bit_identical(tmp_path, name, inputs):
    def run(record):
        torch.manual_seed(3)
        model = Net()
        optimizer = make(name, model.parameters(), lr=0.05)
        if not record:
            return fingerprint(model, train(model, optimizer))
        with rs.Recorder(
            model,
            tmp_path / "run",
            capture=("outputs", "weights"),
            every=2,
            probe=data(8) if inputs == "probe" else None,
            optimizer=optimizer,
        ) as recorder:
            losses = train(model, optimizer, recorder)
        flags = [module.training for module in model.modules()]
        assert all(flags)
        return fingerprint(model, losses)

    with_recorder, without = run(True), run(False)
    assert len(with_recorder) == len(without)
    for a, b in zip(with_recorder, without, strict=True):
        assert torch.equal(a, b)


def test_outputs_keep_their_graph_and_values_under_the_hooks(tmp_path):
    model, (x, _) = plain_net(), data()
    expected = model(x)
    with rs.Recorder(model, tmp_path / "run", every=1):
        seen = model(x)
        assert torch.equal(seen, expected)
        seen.sum().backward()
    assert model[0].weight.grad is not None


# -- what belongs to step k ---------------------------------------------------
def test_probe_activations_belong_to_the_updates_done(tmp_path):
    model, (x, y) = plain_net(), data(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {0: torch.relu(model[0](x)).detach()}
    with rs.Recorder(model, tmp_path / "run", every=3, probe=(x, y)) as recorder:
        for step in range(1, 8):
            train(model, optimizer, recorder, steps=1)
            expected[step] = torch.relu(model[0](x)).detach()
    run = rs.open(tmp_path / "run")
    assert run.steps == [0, 3, 6]
    assert run.layers == ["0", "1", "2"]
    for step in run.steps:
        torch.testing.assert_close(run.read("1", step), expected[step], rtol=0, atol=0)
        assert torch.equal(run.labels(step), y)
    assert torch.equal(run.read("1"), expected[6])


def test_live_rows_labels_and_loss_belong_to_the_forward(tmp_path):
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, losses = [], []
    x, y = data()
    path = tmp_path / "run"
    with rs.Recorder(
        model, path, layers="1", capture=("outputs", "weights"), every=1
    ) as recorder:
        for _ in range(4):
            before.append(torch.relu(model[0](x)).detach())  # a forward of a part
            losses += train(model, optimizer, None, steps=1)
            recorder.step(loss=losses[-1], labels=y, lr=0.1)
    run = rs.open(path)
    assert run.read("1").shape == (24, 5)
    for step, rows in enumerate(before):
        torch.testing.assert_close(run.read("1", step), rows, rtol=0, atol=0)
        assert torch.equal(run.labels(step), y)
    assert torch.equal(run.read("1", -1), before[3])  # n updates: outputs end at n - 1
    final = run.read("0.weight", -1, target="weights")
    assert torch.equal(final, model[0].weight)  # ... and weights at n
    assert torch.equal(run.read("0.weight", 4, target="weights"), final)
    table = run.scalars()
    assert table["loss"].dropna().tolist() == pytest.approx([float(v) for v in losses])
    assert table["loss"].dropna().index.tolist() == [0, 1, 2, 3]
    assert table["lr"].dropna().index.tolist() == [1, 2, 3, 4]


def test_micro_batches_of_one_step_are_more_rows(tmp_path):
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        train(model, optimizer, recorder, steps=2, per_step=3)
    run = rs.open(tmp_path / "run")
    assert run.layers == ["0", "1", "2"]
    assert run.read("0").shape == (72, 5)
    assert run.labels().shape == (72,)


def test_the_users_evaluation_passes_are_not_recorded(tmp_path):
    model, (x, _) = plain_net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        model.eval()
        model(x)
        model.train()
        with torch.no_grad():
            model(x)
        train(model, optimizer, recorder, steps=1)
    assert rs.open(tmp_path / "run").read("0", 0).shape == (24, 5)


def test_capture_now_records_under_a_tag(tmp_path):
    model, probe = plain_net(), data(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.Recorder(model, tmp_path / "run", every=100, probe=probe) as recorder:
        train(model, optimizer, recorder, steps=5)
        recorder.capture_now("task-1", accuracy=0.75)
        at_tag = model[0](probe[0]).detach()
        train(model, optimizer, recorder, steps=2)
    run = rs.open(tmp_path / "run")
    assert run.tags == {"task-1": 5}
    assert torch.equal(run.read("0", tag="task-1"), at_tag)
    assert run.scalars()["accuracy"].dropna().to_dict() == {5: 0.75}


def test_a_schedule_is_asked_once_a_step(tmp_path):
    asked = []
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.Recorder(
        model, tmp_path / "run", every=lambda step: asked.append(step) or step % 2
    ) as recorder:
        train(model, optimizer, recorder, steps=4)
    assert asked == [1, 2, 3, 4]
    assert rs.open(tmp_path / "run").steps == [0, 1, 3]


# -- labels -------------------------------------------------------------------
@pytest.mark.parametrize("n_labels", [12, 48])
def test_labels_of_another_number_than_the_examples_are_refused(tmp_path, n_labels):
    model, (x, _) = plain_net(), data()  # 24 examples
    recorder = rs.Recorder(model, tmp_path / "run", every=1, on_error="raise")
    model(x)
    with pytest.raises(errors.LabelMismatch, match="for the 24 examples"):
        recorder.step(labels=torch.zeros(n_labels, dtype=torch.long))
    with pytest.raises(errors.LabelMismatch):
        recorder.close()


def test_a_second_view_of_the_batch_needs_labels_of_its_own(tmp_path):
    model, (x, y) = plain_net(), data(6)
    recorder = rs.Recorder(model, tmp_path / "run", every=1, on_error="raise")
    model(x)
    model(x)
    with pytest.raises(errors.LabelMismatch, match="for the 12 examples"):
        recorder.step(labels=y)
    with pytest.raises(errors.LabelMismatch):
        recorder.close()


def test_a_forward_that_raised_leaves_no_rows_behind(tmp_path):
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.out_of_memory = True

        def forward(self, x):
            h = self.fc(x)
            if self.out_of_memory:
                raise RuntimeError("out of memory")
            return h

    model, (x, y) = Fragile(), data(6)
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x)
        model.out_of_memory = False
        model(x)
        recorder.step(labels=y)
    run = rs.open(tmp_path / "run")
    assert torch.equal(run.read("fc", 0), model.fc(x))
    assert torch.equal(run.labels(0), y)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.memory = nn.LSTM(4, 5, num_layers=2)
        self.pool = Pool()

    def forward(self, x):  # (n, time, features)
        h = self.mix(x.transpose(0, 1))
        h, _ = self.memory(h)
        return self.pool(h)


class Pool(nn.Module):
    def forward(self, h):
        return h.sum(1)  # (time, features): rows are no examples


def test_rows_follow_the_examples_or_get_no_labels(tmp_path):
    model, n, time = TimeFirst(), 6, 4
    x, y = torch.randn(n, time, 4), torch.arange(n) % 2
    with rs.Recorder(model, tmp_path / "run", probe=(x, y)):
        pass
    run = rs.open(tmp_path / "run")
    assert torch.equal(run.read("mix"), model.mix(x).flatten(0, 1))
    hidden, (last, _) = model.memory(model.mix(x).transpose(0, 1))
    expected = hidden.transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(run.read("memory:[0]"), expected)
    torch.testing.assert_close(
        run.read("memory:[1][0]"), last.transpose(0, 1).flatten(0, 1)
    )
    assert run.meta["unlabelled"] == ["pool"]
    frame = rs.measure(run, metrics=["class_cosine"])
    assert "pool" not in set(frame["layer"])
    assert "mix" in set(frame["layer"])


def test_a_convolution_and_what_follows_it_are_read_alike(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    with rs.Recorder(model, tmp_path / "run", probe=torch.randn(5, 1, 10)):
        pass
    shapes = rs.open(tmp_path / "run").shapes
    assert [shapes["outputs", str(i)] for i in range(4)] == [
        (5, 6), (5, 6), (5, 48), (5, 2),
    ]  # fmt: skip


def test_chunks_of_a_probe_are_one_stream_whatever_part_they_call(tmp_path):
    model, (x, y) = plain_net(), data(6)
    probe = rs.Probe(x, labels=y, batch_size=4, forward=lambda m, part: m[0](part))
    with rs.Recorder(model, tmp_path / "run", layers="0", probe=probe):
        pass
    run = rs.open(tmp_path / "run")
    assert run.layers == ["0"]
    assert torch.equal(run.read("0"), model[0](x))
    assert torch.equal(run.labels(), y)


# -- streams ------------------------------------------------------------------
def test_repeated_calls_and_structured_outputs_get_names_of_their_own(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(4, 4)
            self.both = Both()

        def forward(self, x):
            return self.both(self.block(self.block(x)))["h"]

    class Both(nn.Module):
        def forward(self, x):
            return {"h": x + 1, "t": (x + 2, None)}

    model, (x, _) = Twice(), data(6)
    with rs.Recorder(model, tmp_path / "run", probe=x):
        pass
    run = rs.open(tmp_path / "run")
    assert run.layers == ["block", "block@1", "both:h", "both:t[0]"]
    once = model.block(x)
    assert torch.equal(run.read("block", 0), once)
    assert torch.equal(run.read("block@1", 0), model.block(once))


def test_a_following_in_place_layer_does_not_reach_the_record(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
    x, _ = data()
    with rs.Recorder(model, tmp_path / "run", layers="0", probe=x):
        pass
    assert torch.equal(rs.open(tmp_path / "run").read("0", 0), model[0](x))


def test_non_finite_activations_are_recorded_bit_for_bit(tmp_path):
    x = torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]])
    with rs.Recorder(nn.Sequential(nn.Identity()), tmp_path / "run", probe=x):
        pass
    seen = rs.open(tmp_path / "run").read("0", 0)
    assert torch.equal(seen.view(torch.int32), x.view(torch.int32))


def test_the_store_knows_how_it_was_made(tmp_path):
    model, probe = plain_net(), data(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    with rs.Recorder(
        model,
        tmp_path / "run",
        probe=probe,
        optimizer=optimizer,
        meta={"seed": 4, "config": {"depth": 2}},
    ):
        pass
    meta = rs.open(tmp_path / "run").meta
    assert (meta["seed"], meta["config"]) == (4, {"depth": 2})
    made = meta["recorder"]
    assert made["versions"]["torch"] == torch.__version__
    assert made["layers"] == {"0": "Linear", "1": "ReLU", "2": "Linear"}
    assert made["probe"]["sha256"] == rs.Probe(probe[0], labels=probe[1]).sha256
    assert made["optimizer"]["groups"][0]["lr"] == 3e-4
    shapes = rs.open(tmp_path / "run").shapes
    assert shapes["outputs", "1"] == (6, 5)


# -- leaves nothing behind ----------------------------------------------------
@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(tmp_path, fault):
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def body():
        with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
            assert n_hooks(model) > 0
            train(model, optimizer, recorder, steps=3)
            raise fault

    with pytest.raises(fault):
        body()
    assert n_hooks(model) == 0
    run = rs.open(tmp_path / "run")
    assert run.closed
    assert run.meta["interrupted"] == fault.__name__
    assert run.read("0").shape == (24, 5)
    rs.Recorder(model, tmp_path / "next").close()  # and it can be recorded again


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"layers": "fc_1"}, errors.UnknownLayer),
        ({"layers": "head*"}, errors.UnknownLayer),
        ({"capture": "output"}, errors.UnknownName),
        ({"every": 0}, errors.UsageError),
        ({"probe": [1, 2]}, errors.UsageError),
        ({"probe": (torch.ones(3, 4), [0, 1])}, errors.LabelMismatch),
        ({"probe": torch.ones(3, 9)}, RuntimeError),  # the model's own error
        ({"on_error": "ignore"}, errors.UsageError),
        ({"meta": {"model": object()}}, errors.UsageError),
    ],
)
def test_a_refused_recorder_attaches_and_writes_nothing(tmp_path, arguments, error):
    model = plain_net()
    with pytest.raises(error):
        rs.Recorder(model, tmp_path / "run", **arguments)
    assert n_hooks(model) == 0
    assert list(tmp_path.iterdir()) == []
    rs.Recorder(model, tmp_path / "run").close()


def test_an_existing_store_is_left_as_it_was(tmp_path):
    model = plain_net()
    rs.Recorder(model, tmp_path / "run", probe=data(6)).close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError):
        rs.Recorder(model, tmp_path / "run", probe=data(6))
    assert n_hooks(model) == 0
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_one_recorder_a_model(tmp_path):
    model = plain_net()
    with rs.Recorder(model, tmp_path / "a"):
        with pytest.raises(errors.AlreadyAttached):
            rs.Recorder(model, tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_copies_and_pickles_of_a_recorded_model_are_inert(tmp_path):
    model, (x, _) = plain_net(), data()
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        torch.save(model, io.BytesIO())
        for other in (twin, again):
            assert torch.equal(other(x), model(x))
        model.zero_grad()
        recorder.step()
    rows = rs.open(tmp_path / "run").read("0", 0)
    assert len(rows) == 2 * len(x)  # the two forwards of the model itself


def test_an_interrupted_probe_leaves_no_rows_for_the_next(tmp_path):
    class Stop(nn.Module):
        stop = False

        def forward(self, x):
            if self.stop:
                raise KeyboardInterrupt
            return x

    model, (x, y) = nn.Sequential(nn.Linear(4, 3), Stop()), data(6)
    with rs.Recorder(model, tmp_path / "run", probe=(x, y), every=1) as recorder:
        model[1].stop = True
        with pytest.raises(KeyboardInterrupt):
            recorder.step()
        model[1].stop = False
        recorder.step()
    assert rs.open(tmp_path / "run").read("0", 2).shape == (6, 3)


def test_a_recorder_that_is_never_closed_saves_what_it_has_and_says_so(tmp_path):
    model = plain_net()
    recorder = rs.Recorder(model, tmp_path / "run", probe=data(6), every=1)
    recorder.step()
    with pytest.warns(errors.RepScopeWarning, match="never closed"):
        del recorder
    assert n_hooks(model) == 0
    run = rs.open(tmp_path / "run")
    assert run.steps == [0, 1]
    assert run.meta["interrupted"] == "never closed"
    rs.Recorder(model, tmp_path / "next").close()  # the model is free again


def test_the_end_of_the_program_closes_a_forgotten_recorder(tmp_path):
    code = f"""
import torch, repscope as rs
model = torch.nn.Sequential(torch.nn.Linear(4, 3))
x = torch.ones(5, 4)
recorder = rs.Recorder(model, {str(tmp_path / "run")!r}, probe=x, every=1)
recorder.step(loss=1.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "never closed" in done.stderr
    assert rs.open(tmp_path / "run").steps == [0, 1]


def test_a_deleted_model_is_named(tmp_path):
    model = plain_net()
    recorder = rs.Recorder(model, tmp_path / "run", probe=data(6), every=1)
    del model
    gc.collect()
    with pytest.warns(errors.RepScopeWarning, match="no longer exists"):
        recorder.step()
    with pytest.raises(errors.CaptureError):
        recorder.close()


def test_a_relative_path_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = plain_net()
    with rs.Recorder(model, "runs/a", probe=data(6), every=1) as recorder:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        recorder.step()
    assert rs.open(tmp_path / "runs" / "a").steps == [0, 1]


# -- layers that never run ----------------------------------------------------
class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Sequential(nn.Linear(4, 3))
        self.block = Weights()

    def forward(self, x):
        return self.used(x) + self.block(x)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight)


def test_an_exactly_named_layer_that_never_runs_is_an_error(tmp_path):
    model = Shortcut()
    with pytest.raises(errors.LayerNeverFired, match="its parent 'block' did"):
        rs.Recorder(model, tmp_path / "run", layers="block.inner", probe=data(6))
    assert n_hooks(model) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_glob_that_catches_one_warns_once_and_notes_it(tmp_path):
    model = Shortcut()
    with (
        pytest.warns(
            errors.RepScopeWarning, match=r"did not run.*block\.inner"
        ) as seen,
        rs.Recorder(model, tmp_path / "run", probe=data(6), every=1) as recorder,
    ):
        recorder.step()
    assert len(seen) == 1
    run = rs.open(tmp_path / "run")
    assert run.meta["never_fired"] == ["block.inner"]
    assert run.layers == ["used.0"]


def test_live_recording_names_the_layer_at_the_first_step(tmp_path):
    model = Shortcut()
    recorder = rs.Recorder(
        model, tmp_path / "run", layers="block.inner", on_error="raise"
    )
    model(data()[0])
    with pytest.raises(errors.LayerNeverFired, match="training mode"):
        recorder.step()
    with pytest.raises(errors.LayerNeverFired):
        recorder.close()


# -- errors while training ----------------------------------------------------
def test_by_default_an_error_never_breaks_training(tmp_path):
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    recorder = rs.Recorder(model, tmp_path / "run", every=1)
    train(model, optimizer, recorder, steps=2)
    model(x)
    with pytest.warns(errors.RepScopeWarning, match="stopped at step 3.*LabelMismatch"):
        recorder.step(labels=y[:7])
    assert isinstance(recorder.error, errors.LabelMismatch)
    assert n_hooks(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, recorder, steps=2)  # goes on, silently
        recorder.capture_now("later")
    assert recorder.step_number == 5
    with pytest.raises(errors.LabelMismatch):
        recorder.commit()
    with pytest.raises(errors.LabelMismatch):
        recorder.close()
    assert rs.open(tmp_path / "run").read("0").shape == (24, 5)


def test_on_request_an_error_is_raised_at_step(tmp_path):
    model, (x, y) = plain_net(), data()
    recorder = rs.Recorder(model, tmp_path / "run", every=1, on_error="raise")
    model(x)
    with pytest.raises(errors.LabelError):
        recorder.step(labels=y.float())
    with pytest.raises(errors.LabelError):
        recorder.close()


def test_an_output_that_cannot_be_read_is_an_error_of_the_recorder_only(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return {"a", "b"}

    model = nn.Sequential(nn.Identity(), Odd())
    recorder = rs.Recorder(model, tmp_path / "run", every=1)
    assert model(torch.ones(2, 3, requires_grad=True)) == {"a", "b"}
    with pytest.warns(errors.RepScopeWarning, match="returned a set"):
        recorder.step()
    with pytest.raises(errors.UnsupportedOutput):
        recorder.close()


def test_close_inside_an_exception_adds_a_note_and_does_not_replace_it(tmp_path):
    model, (x, y) = plain_net(), data()

    def body():
        with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
            model(x)
            with pytest.warns(errors.RepScopeWarning):
                recorder.step(labels=y[:5])
            raise ZeroDivisionError("the user's own")

    with pytest.raises(ZeroDivisionError, match="the user's own") as caught:
        body()
    assert "also failed: 5 labels were given" in caught.value.__notes__[0]


def test_a_closed_recorder_refuses_and_closes_once(tmp_path):
    recorder = rs.Recorder(plain_net(), tmp_path / "run", probe=data(6))
    recorder.close()
    recorder.close()
    with pytest.raises(errors.ClosedStore, match=r"step\(\) after close"):
        recorder.step()
    with pytest.raises(errors.ClosedStore, match=r"capture_now\(\) after close"):
        recorder.capture_now()


def test_commit_makes_the_record_readable_at_once(tmp_path):
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.Recorder(model, tmp_path / "run", every=1, probe=data(6)) as recorder:
        train(model, optimizer, recorder, steps=3)
        recorder.commit()
        assert rs.open(tmp_path / "run").steps == [0, 1, 2, 3]
        assert not rs.open(tmp_path / "run").closed
