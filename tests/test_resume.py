"""A resumed run holds what an uninterrupted one would."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import repscope as rs
from repscope import errors


class Run:
    """A deterministic training run that can be stopped, checkpointed and resumed."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        g = torch.Generator().manual_seed(2)
        self.batches = torch.randn(40, 12, 4, generator=g)
        self.y = torch.arange(12) % 3
        self.step = 0

    def record(self, path, *, probe=True, **options):
        options = {"every": 2, "capture": ("outputs", "weights")} | options
        if probe:
            options["probe"] = (self.batches[-1], self.y)
        return rs.Recorder(self.model, path, **options)

    def train(self, recorder, until):
        while self.step < until:
            loss = cross_entropy(self.model(self.batches[self.step]), self.y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            recorder.step(loss=loss, labels=self.y)

    def checkpoint(self):
        return copy.deepcopy(
            (self.model.state_dict(), self.optimizer.state_dict(), self.step)
        )

    @classmethod
    def load(cls, checkpoint):
        run = cls()
        model, optimizer, run.step = copy.deepcopy(checkpoint)
        run.model.load_state_dict(model)
        run.optimizer.load_state_dict(optimizer)
        return run


def die(recorder):
    """What a kill leaves: no hook, no lock, nothing that was pending."""
    recorder._finalizer.detach()
    recorder._taps.detach()
    recorder._delivery.undo(new=False)


def content(path):
    run, found = rs.open(path), []
    for each in run.snapshots():
        streams = {key: tensor.tolist() for key, tensor in each.streams.items()}
        y = None if each.labels is None else each.labels.tolist()
        found.append((each.step, streams, y, each.tags))
    table = run.scalars()
    return found, table.index.tolist(), table.to_dict("list"), run.steps, run.closed


@pytest.fixture(params=["probe", "live"])
def probe(request):
    return request.param == "probe"


@pytest.fixture
def whole(tmp_path, probe):
    run = Run()
    with run.record(tmp_path / "whole", probe=probe) as recorder:
        run.train(recorder, 20)
    return content(tmp_path / "whole")


@pytest.mark.parametrize("at", [0, 1, 7, 8, 12])
def test_go_on_where_the_last_commit_was(tmp_path, probe, whole, at):
    run = Run()
    first = run.record(tmp_path / "run", probe=probe, resume=True)  # nothing is there
    run.train(first, at)
    first.commit()
    saved = run.checkpoint()
    run.train(first, at + 3)
    die(first)
    run = Run.load(saved)
    with run.record(tmp_path / "run", probe=probe, resume=True) as second:
        assert second.step_number == at
        run.train(second, 20)
    assert content(tmp_path / "run") == whole


@pytest.mark.parametrize("at", [0, 1, 7, 8, 12])
def test_go_on_from_an_older_checkpoint(tmp_path, probe, whole, at):
    run = Run()
    first = run.record(tmp_path / "run", probe=probe)
    run.train(first, at)
    saved = run.checkpoint()
    run.train(first, 15)
    first.capture_now("never", accuracy=1.0)
    first.commit()
    die(first)
    assert "never" in rs.open(tmp_path / "run").tags
    run = Run.load(saved)
    with run.record(tmp_path / "run", probe=probe, resume=at) as second:
        assert second.step_number == at
        run.train(second, 20)
    assert content(tmp_path / "run") == whole
    assert rs.open(tmp_path / "run").tags == {}


def test_a_resumed_run_trains_bit_identically(tmp_path):
    straight = Run()
    with straight.record(tmp_path / "straight") as recorder:
        straight.train(recorder, 16)
    run = Run()
    first = run.record(tmp_path / "run")
    run.train(first, 6)
    saved = run.checkpoint()
    first.close()
    run = Run.load(saved)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with run.record(tmp_path / "run", resume=6) as second:
        run.train(second, 16)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(run.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_commit_knows_the_step_though_nothing_was_due(tmp_path):
    run = Run()
    first = run.record(tmp_path / "run", every=100)
    for _ in range(13):
        first.step()  # no loss given: nothing to record
    first.commit()
    die(first)
    assert rs.open(tmp_path / "run").steps == [0]
    assert rs.open(tmp_path / "run").progress == 13
    with Run().record(tmp_path / "run", every=100, resume=True) as second:
        assert second.step_number == 13


def test_a_checkpoint_newer_than_the_store_says_what_is_missing(tmp_path):
    run = Run()
    first = run.record(tmp_path / "run")
    run.train(first, 4)
    first.commit()
    run.train(first, 9)
    saved = run.checkpoint()
    die(first)
    run = Run.load(saved)
    with pytest.warns(rs.errors.RepScopeWarning, match=r"at step 4, .* at step 9"):
        second = run.record(tmp_path / "run", resume=9)
    run.train(second, 12)
    second.close()
    assert rs.open(tmp_path / "run").steps == [0, 2, 4, 10, 12]


def test_a_closed_run_is_extended_and_interruptions_are_forgotten(tmp_path):
    run = Run()

    def interrupted():
        with run.record(tmp_path / "run") as first:
            run.train(first, 4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert rs.open(tmp_path / "run").meta["interrupted"] == "KeyboardInterrupt"
    with run.record(tmp_path / "run", resume=True, meta={"note": "more"}) as second:
        run.train(second, 8)
    again = rs.open(tmp_path / "run")
    assert again.steps == [0, 2, 4, 6, 8]
    assert again.meta["note"] == "more"
    assert "interrupted" not in again.meta


def test_a_step_that_was_due_and_not_acknowledged_is_captured_at_once(tmp_path):
    run = Run()
    first = run.record(tmp_path / "run")
    run.train(first, 3)
    first.commit()
    run.train(first, 4)
    die(first)
    with pytest.warns(rs.errors.RepScopeWarning):
        second = run.record(tmp_path / "run", resume=4)
    second.close()
    assert rs.open(tmp_path / "run").steps == [0, 2, 4]


# -- refused -----------------------------------------------------------------
def test_another_probe(tmp_path):
    run = Run()
    run.record(tmp_path / "run").close()
    before = (tmp_path / "run" / "MANIFEST").read_bytes()
    other = (run.batches[0], run.y)
    with pytest.raises(errors.ProbeMismatch, match="probe of 12 samples") as caught:
        rs.Recorder(run.model, tmp_path / "run", probe=other, every=2,
                    capture=("outputs", "weights"), resume=True)  # fmt: skip
    assert isinstance(caught.value, ValueError)
    with pytest.raises(errors.ProbeMismatch, match="not on training batches"):
        run.record(tmp_path / "run", probe=False, resume=True)
    assert (tmp_path / "run" / "MANIFEST").read_bytes() == before
    run.record(tmp_path / "run", resume=True).close()  # the model is free again


def test_other_layers_or_targets(tmp_path):
    run = Run()
    run.record(tmp_path / "run").close()
    with pytest.raises(errors.UsageError, match=r"with layers .*not \['0'\]"):
        run.record(tmp_path / "run", layers="0", resume=True)
    with pytest.raises(errors.UsageError, match=r"with targets .*not \['outputs'\]"):
        run.record(tmp_path / "run", capture="outputs", resume=True)


def test_a_run_that_is_being_recorded(tmp_path):
    run, other = Run(), Run()
    with run.record(tmp_path / "run") as recorder:
        recorder.commit()
        with pytest.raises(errors.StoreLocked):
            other.record(tmp_path / "run", resume=True)
        run.train(recorder, 4)
    assert rs.open(tmp_path / "run").steps == [0, 2, 4]


def test_nothing_to_resume(tmp_path):
    run = Run()
    with pytest.raises(errors.NotAStore):
        run.record(tmp_path / "run", resume=7)
    run.record(tmp_path / "run", resume=0).close()
    stillborn = tmp_path / "stillborn"
    stillborn.mkdir()
    run.record(stillborn, resume=True).close()
    assert rs.open(stillborn).steps == [0]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("...")
    with pytest.raises(errors.NotAStore):
        run.record(tmp_path / "thesis", resume=True)
    assert [f.name for f in (tmp_path / "thesis").iterdir()] == ["main.tex"]


def test_a_failed_resume_leaves_the_run(tmp_path):
    run = Run()
    first = run.record(tmp_path / "run")
    run.train(first, 4)
    first.close()
    breaks = run.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.record(tmp_path / "run", resume=3, every=1)
    breaks.remove()
    assert rs.open(tmp_path / "run").steps == [0, 2]
    run.record(tmp_path / "run", resume=3, every=1).close()  # neither lock nor hook
    assert rs.open(tmp_path / "run").steps == [0, 2, 3]


@pytest.mark.parametrize("at", [5, 8])
def test_with_durability_append_every_step_is_there(tmp_path, at):
    run = Run()
    with run.record(tmp_path / "whole") as recorder:
        run.train(recorder, 12)
    run = Run()
    first = run.record(tmp_path / "run", durability="append")
    run.train(first, at)
    saved = run.checkpoint()
    die(first)
    assert rs.open(tmp_path / "run").progress == at
    run = Run.load(saved)
    with run.record(tmp_path / "run", durability="append", resume=True) as second:
        assert second.step_number == at
        run.train(second, 12)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
