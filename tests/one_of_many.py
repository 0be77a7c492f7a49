"""One process of the distributed tests: go through the scenarios of a group.

Usage, under torchrun: one_of_many.py GROUP FOLDER SECONDS

What a scenario finds wrong is written to FOLDER/<rank>.pt under its name. A process
that takes longer than SECONDS prints where it hangs, and dies.
"""

from __future__ import annotations

import faulthandler
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import repscope as rs
from repscope import errors
from repscope.capture.probe import Probe
from repscope.recorder import ranks as ranks_module
from repscope.recorder.ranks import connect

STEPS = 6
SCENARIOS = {}


def scenario(group):
    def note(function):
        SCENARIOS.setdefault(group, []).append(function)
        return function

    return note


# -- what is trained ----------------------------------------------------------
class Odd(nn.Module):
    """Returns something on some ranks that no recorder can read."""

    odd = False

    def forward(self, x):
        return (x, object()) if self.odd else (x, None)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.3)
        self.odd = Odd()
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x):
        x, _ = self.odd(self.drop(self.act(self.norm(self.fc1(x)))))
        return self.fc2(x)


def batch(rank, step):
    """Return a batch; every rank knows those of the others."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    n = 12 + 4 * rank
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


def ddp():
    torch.manual_seed(3)
    model = DistributedDataParallel(Net())
    torch.manual_seed(10 + dist.get_rank())  # of dropout
    return model


def sharded():
    torch.manual_seed(3)
    model = Net()
    for part in (model.fc1, model.fc2, model):
        fully_shard(part)
    torch.manual_seed(10 + dist.get_rank())
    return model


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def train(model, optimizer, recorder=None, *, steps=STEPS, first=0, at=lambda k: None):
    """Train; return losses, and what the optimizer was given in each step."""
    losses, gradients = [], []
    for k in range(first, first + steps):
        x, y = batch(dist.get_rank(), k)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        losses.append(loss.detach())
        if recorder is not None:
            recorder.step(loss=loss, labels=y)
        at(k)
    return losses, gradients


def fingerprint(model, losses):
    state = [whole(value) for value in model.state_dict().values()]
    return [*losses, *state, torch.get_rng_state()]


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


def unrecorded(make):
    model = make()
    return fingerprint(model, train(model, optimizer_of(model))[0])


@contextmanager
def watched(module):
    """Keep what a layer returns in training."""
    rows = []

    def keep(module, args, output):
        if torch.is_grad_enabled():
            rows.append(output.detach().clone())

    handle = module.register_forward_hook(keep)
    yield rows
    handle.remove()


def of_all(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_moments(moments, rows):
    """Compare with numpy on the rows of all ranks: to 1e-10 of the largest entry."""
    X = torch.cat(rows).double().numpy()
    assert moments.count == len(X)
    expected = np.cov(X, rowvar=False)
    gap = np.abs(moments.covariance().numpy() - expected).max()
    assert gap <= 1e-10 * np.abs(expected).max()
    np.testing.assert_allclose(moments.mean.numpy(), X.mean(0), rtol=1e-10)


def stops(recorder):
    """Close a recorder that an error has stopped, and return the error."""
    with pytest.raises(errors.RepScopeError) as caught:
        recorder.close()
    assert caught.value is recorder.error
    recorder.close()
    return caught.value


ALL = ("outputs", "moments", "weights", "weight_gradients", "updates",
       "optimizer_state")  # fmt: skip


# -- DDP, one store -----------------------------------------------------------
@scenario("ddp")
def live_with_everything(rank, folder):
    expected = unrecorded(ddp)
    model = ddp()
    optimizer, path = optimizer_of(model), folder / f"by-{rank}"
    weights, task = [], []

    def at(k):
        weights.append(model.module.fc1.weight.detach().clone())
        if k == 2:
            recorder.capture_now("task-1")
            task.extend(rows)
        if k == 4:
            recorder.commit()
            assert (path / "FORMAT").exists() == (rank == 0)

    recorder = rs.Recorder(
        model, path, capture=ALL, every=2, optimizer=optimizer, on_error="raise"
    )
    with watched(model.module.fc1) as rows, recorder:
        losses, gradients = train(model, optimizer, recorder, at=at)
    assert recorder.step_number == STEPS
    same(fingerprint(model, losses), expected)
    task, rows = of_all(task[:3:2]), of_all(rows)
    if rank > 0:
        assert not path.exists()
        assert recorder.bytes_per_capture is None
        return
    run = rs.open(path)
    assert "rank-1" not in {p.name for p in path.iterdir()}
    assert run.layers == ["fc1", "norm", "act", "drop", "odd:[0]", "fc2"]
    assert torch.equal(run.read("fc1", 2), rows[0][2])
    assert torch.equal(run.labels(2), batch(0, 2)[1])
    check_moments(run.moments("fc1", tag="task-1"), [x for each in task for x in each])
    check_moments(run.moments("fc1", step=5), [each[4] for each in rows])
    for k in (0, 2, 4):
        for name, gradient in gradients[k].items():
            found = run.read(name.removeprefix("module."), k, target="weight_gradients")
            assert torch.equal(found, gradient)
    assert torch.equal(run.read("fc1.weight", 4, target="weights"), weights[3])
    moved = run.read("fc1.weight", 4, target="updates")
    assert torch.equal(moved, weights[4] - weights[3])


@scenario("ddp")
def a_probe_waits_for_nobody(rank, folder):
    expected, probe = unrecorded(ddp), batch(9, 0)
    for name, builders in (("every", (0, 1)), ("first", (0,))):
        model = ddp()
        optimizer, path = optimizer_of(model), folder / name
        seen, recorder = [], None

        def look(k, model=model, seen=seen):
            rng = torch.get_rng_state()
            model.module.eval()
            seen.append(model.module.fc1(probe[0]).detach())
            model.module.train()
            torch.set_rng_state(rng)

        look(-1)
        if rank in builders:
            recorder = rs.Recorder(
                model, path, capture=("outputs", "weights"), every=2, probe=probe,
                optimizer=optimizer, on_error="raise",
            )  # fmt: skip
        losses, _ = train(model, optimizer, recorder, at=look)
        if recorder is not None:
            assert recorder.step_number == STEPS
            recorder.close()
        dist.barrier()
        same(fingerprint(model, losses), expected)
        run = rs.open(path)
        assert run.steps == [0, 2, 4, 6]
        for k in run.steps:
            assert torch.equal(run.read("fc1", k), seen[k])
        dist.barrier()


@scenario("ddp")
def no_group_without_need(rank, folder):
    model, parts = nn.Sequential(nn.Linear(6, 4)), sharded()
    dense = ("outputs", "weights")
    before = dict(dist.distributed_c10d._world.pg_map)
    assert connect("reduce", model, dense) is None
    assert connect("reduce", model, "outputs") is None
    with rs.Recorder(model, folder / f"{rank}", capture=dense, on_error="raise") as rec:
        model(batch(rank, 0)[0])
        rec.step()
    assert dist.distributed_c10d._world.pg_map == before
    for mode, net, capture in (
        ("shards", model, "outputs"),
        ("reduce", model, ("outputs", "moments")),
        ("reduce", model, "moments"),
        ("reduce", parts, "outputs"),
    ):
        found = connect(mode, net, capture)
        assert (found.rank, found.world) == (rank, 2)
        assert found.sharded == (net is parts)


@scenario("ddp")
def moments_of_probes(rank, folder):
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        for value in model.parameters():
            dist.broadcast(value, 0)
    parts = [batch(20 + r, 0)[0] for r in range(2)]
    rows = [model(part).detach() for part in parts]
    for name, own, expected in (
        ("one", parts[0], rows[:1]),
        ("two", parts[rank], rows),
    ):
        path = folder / name
        with rs.Recorder(
            model, path, capture="moments", probe=own, on_error="raise"
        ) as recorder:
            recorder.capture_now("now")
        dist.barrier()
        # of the looks at the start and now
        check_moments(rs.open(path).moments("0", tag="now"), 2 * expected)


@scenario("ddp")
def ranks_without_rows_or_batches(rank, folder):
    model, path = nn.Sequential(nn.Linear(6, 4)), folder / "run"
    with watched(model[0]) as rows, warnings.catch_warnings():
        # The second rank has no batch at the first step, and either at some.
        warnings.filterwarnings("ignore", message="a step was due, and the model ran")
        warnings.filterwarnings("ignore", message="1 of the layers")
        with rs.Recorder(
            model, path, capture="moments", every=1, on_error="raise"
        ) as recorder:
            for k in range(5 - 2 * rank):  # the second has fewer steps
                if k % 2 == rank:
                    model(batch(rank, k)[0])
                recorder.step(loss=float(k))
            recorder.capture_now("both")
            if rank == 0:
                model(batch(rank, 9)[0])
            recorder.step()
            recorder.capture_now("first")
            if rank == 1:
                model(batch(rank, 9)[0])
            recorder.step()
            recorder.commit()
            recorder.capture_now("none")
        first, second = of_all(rows)
    if rank == 0:
        run = rs.open(path)
        check_moments(run.moments("0", tag="both"), [*first[:3], *second[:1]])
        check_moments(run.moments("0", tag="first"), first[3:])
        check_moments(run.moments("0", step=7), second[1:])
        with pytest.raises(errors.UsageError):
            run.moments("0", tag="none")


@scenario("ddp")
def going_on_with_one_store(rank, folder):
    for capture in ("outputs", ("outputs", "moments", "weights")):
        path, goes_on = folder / "-".join(capture), None
        for resume, first in ((False, 0), (4, 4), (True, 6)):
            model = ddp()
            optimizer = optimizer_of(model)
            goes_on = rs.Recorder(
                model, path, capture=capture, every=2, optimizer=optimizer,
                resume=resume, on_error="raise",
            )  # fmt: skip
            with goes_on:
                assert goes_on.step_number == first
                steps = 5 if first == 0 else 2
                train(model, optimizer, goes_on, first=first, steps=steps)
            dist.barrier()
        assert goes_on.step_number == 8
        run = rs.open(path)
        assert run.scalars()["loss"].dropna().index.tolist() == [*range(8)]
        if "moments" in capture:
            assert run.moments("fc1", step=8).count == 12 + 16
        dist.barrier()


# -- a store a rank -----------------------------------------------------------
@scenario("shards")
def every_rank_has_a_store(rank, folder):
    expected, path = unrecorded(ddp), folder / "run"
    model = ddp()
    optimizer = optimizer_of(model)
    with (
        watched(model.module.fc1) as rows,
        rs.Recorder(
            model, path, every=2, capture=("outputs", "moments", "weights"),
            optimizer=optimizer, ranks="shards", on_error="raise",
        ) as recorder,
    ):  # fmt: skip
        assert recorder.path == path / f"rank-{rank}"
        losses, _ = train(model, optimizer, recorder)
        recorder.commit()
        recorder.capture_now("end")
    same(fingerprint(model, losses), expected)
    rows, losses = of_all(rows), of_all(losses)
    run = rs.open(path)
    assert run.closed
    for k in (0, 2, 4):
        assert torch.equal(run.read("fc1", k), torch.cat([each[k] for each in rows]))
        assert torch.equal(run.labels(k), torch.cat([batch(r, k)[1] for r in (0, 1)]))
    column = run.scalars()["loss"]
    for k in range(STEPS):
        assert column[k] == pytest.approx(float(losses[0][k] + losses[1][k]) / 2)
    check_moments(run.moments("fc1"), [each[k] for each in rows for k in (0, 2, 4)])
    assert run.read("fc1.weight", 6, target="weights").shape == (5, 6)


def shards(path, *, first=0, resume=False, steps=5, at=lambda k: None, **options):
    model = ddp()
    optimizer = optimizer_of(model)
    with rs.Recorder(
        model, path, every=2, optimizer=optimizer, ranks="shards", resume=resume,
        on_error="raise", **options,
    ) as recorder:  # fmt: skip
        assert recorder.step_number == first
        train(model, optimizer, recorder, first=first, steps=steps, at=at)
    dist.barrier()
    return recorder


@scenario("shards")
def going_on_with_many_stores(rank, folder):
    path = folder / "run"
    shards(path)
    shards(path, first=2, resume=2, steps=3)
    shards(path, first=5, resume=True, steps=1)
    run = rs.open(path)
    assert run.steps == [0, 2, 4]
    assert run.scalars()["loss"].dropna().index.tolist() == [*range(6)]
    dist.barrier()
    # The process of rank 1 was killed after its commit of step 6, that of rank 0
    # after one of step 8.
    model = ddp()
    optimizer = optimizer_of(model)
    recorder = rs.Recorder(
        model, path, every=2, optimizer=optimizer, ranks="shards", resume=True,
        on_error="raise",
    )  # fmt: skip
    train(model, optimizer, recorder, first=6, steps=2,
          at=lambda k: recorder.commit() if rank == 0 else None)  # fmt: skip
    dist.barrier()
    recorder._ranks.leave()
    recorder._detach_hooks()
    recorder._delivery.undo(new=False)
    recorder._closed = True
    recorder._finalizer.detach()
    dist.barrier()
    shards(path, first=6, resume=True, steps=3)
    run = rs.open(path)
    assert run.steps == [0, 2, 4, 6, 8]
    assert run.scalars()["loss"].dropna().index.tolist() == [*range(9)]
    assert len(run.read("fc1", 8)) == 12 + 16


@scenario("shards")
def a_second_start_is_refused(rank, folder):
    path = folder / "run"
    shards(path)
    with pytest.raises(errors.StoreExists):
        shards(path)
    only_first = folder / "other"
    if rank == 0:
        (only_first / "rank-0").mkdir(parents=True)
    dist.barrier()
    with pytest.raises(errors.RepScopeError, match=r"exists already|rank 0 stopped"):
        shards(only_first)
    dist.barrier()
    assert not (only_first / "rank-1").exists()
    assert rs.open(path).closed


@scenario("shards")
def equal_probes_are_refused(rank, folder):
    with pytest.raises(errors.UsageError, match="every rank has the same probe"):
        shards(folder / "equal", probe=batch(9, 0))
    assert not (folder / "equal").exists()
    parts = [batch(r, 30) for r in range(2)]
    shards(folder / "parts", probe=parts[rank], capture=("outputs", "moments"))
    run = rs.open(folder / "parts")
    assert torch.equal(run.labels(), torch.cat([y for _, y in parts]))
    assert len(run.read("fc1")) == len(run.labels())
    assert run.moments("fc1").count == 3 * len(run.labels())


# -- sharded parameters -------------------------------------------------------
@scenario("fsdp")
def nothing_changes_and_all_is_whole(rank, folder):
    expected = unrecorded(sharded)
    for name, probe in (("live", None), ("probe", batch(9, 0))):
        model = sharded()
        assert any(hasattr(value, "full_tensor") for value in model.parameters())
        optimizer, path = optimizer_of(model), folder / f"{name}-{rank}"
        weights, moments = [whole(model.fc1.weight).detach().clone()], []

        def at(k, model=model, optimizer=optimizer, weights=weights, moments=moments):
            assert all(hasattr(value, "full_tensor") for value in model.parameters())
            weights.append(whole(model.fc1.weight).detach().clone())
            state = optimizer.state[model.fc1.weight]["exp_avg"]
            moments.append(whole(state).clone())

        with (
            watched(model.fc1) as rows,
            rs.Recorder(
                model, path, capture=ALL, every=2, probe=probe, optimizer=optimizer,
                on_error="raise",
            ) as recorder,
        ):  # fmt: skip
            losses, gradients = train(model, optimizer, recorder, at=at)
            gradients = [{n: whole(g) for n, g in each.items()} for each in gradients]
            recorder.capture_now("end")
        same(fingerprint(model, losses), expected)
        rows = of_all(rows)
        if rank > 0:
            assert not path.exists()
            continue
        run = rs.open(path)
        assert run.layers == ["fc1", "norm", "act", "drop", "odd:[0]", "fc2"]
        names = [n for n, _ in Net().named_parameters()]
        assert [key[1] for key in run.streams if key[0] == "weights"] == names
        if probe is None:
            assert torch.equal(run.read("fc1", 2), rows[0][2])
            check_moments(
                run.moments("fc1"), [each[k] for each in rows for k in (0, 2, 4)]
            )
        else:
            assert run.read("fc1", 2).shape == (len(probe[0]), 5)
            # Of one rank, because all have the same probe: steps 0, 2, 4, 6 and end.
            assert run.moments("fc1").count == 5 * len(probe[0])
        for k in (0, 2, 4):
            assert torch.equal(run.read("fc1.weight", k, target="weights"), weights[k])
            moved = run.read("fc1.weight", k, target="updates")
            torch.testing.assert_close(moved, weights[k + 1] - weights[k])
            for n, gradient in gradients[k].items():
                found = run.read(n, k, target="weight_gradients")
                assert torch.equal(found, gradient)
            state = "fc1.weight:exp_avg"
            if k:
                found = run.read(state, k, target="optimizer_state")
                assert torch.equal(found, moments[k - 1])


@scenario("fsdp")
def weights_equal_those_that_no_rank_shares(rank, folder):
    """Both ranks train on the same batches, so that one process gives the same."""
    found = []
    for name, make in (("parts", sharded), ("whole", Net)):
        torch.manual_seed(3)
        model = make().eval()  # no dropout, no batch statistics
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if make is Net and rank > 0:  # which needs one process only
            return
        recorder = rs.Recorder(
            model, folder / name, capture=("outputs", "weights"), every=1,
            probe=batch(9, 0), on_error="raise",
        )  # fmt: skip
        with recorder:
            for k in range(3):
                x, y = batch(0, k)
                cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step()
        found.append(rs.open(folder / name))
    for target, layer in found[1].streams:
        for step in range(4):
            one, other = (run.read(layer, step, target=target) for run in found)
            # Before there was any arithmetic, bit for bit.
            tolerance = (
                {"rtol": 0, "atol": 0} if target == "weights" and not step else {}
            )
            torch.testing.assert_close(one, other, **tolerance)


@scenario("fsdp")
def a_store_a_rank(rank, folder):
    model = sharded()
    optimizer, path = optimizer_of(model), folder / "run"
    with (
        watched(model.fc1) as rows,
        rs.Recorder(
            model, path, capture=ALL, every=2, optimizer=optimizer, ranks="shards",
            on_error="raise",
        ) as recorder,
    ):  # fmt: skip
        train(model, optimizer, recorder)
    rows = of_all(rows)
    run = rs.open(path)
    assert torch.equal(run.read("fc1", 2), torch.cat([each[2] for each in rows]))
    for target in ("weights", "weight_gradients", "updates"):
        assert run.read("fc1.weight", 2, target=target).shape == (5, 6)


@scenario("fsdp")
def probes_of_unequal_length_are_refused(rank, folder):
    probe = Probe(torch.ones(4 + 4 * rank, 6), batch_size=4)
    with pytest.raises(errors.UsageError, match=r"take \[1, 2\] forwards"):
        rs.Recorder(sharded(), folder / "run", probe=probe)


@scenario("fsdp")
def sharding_after_the_recorder_was_built_is_refused(rank, folder):
    model = Net()
    recorder = rs.Recorder(model, folder / "run", capture="weights", every=1)
    fully_shard(model)
    with pytest.warns(errors.RepScopeWarning, match="call fully_shard first"):
        recorder.step()
    assert isinstance(stops(recorder), errors.ShardedParameter)


@scenario("fsdp")
def an_error_of_one_rank_stops_both(rank, folder):
    expected = unrecorded(sharded)
    cases = ("live", None), ("between", None), ("probe", batch(9, 0))
    for name, probe in cases:
        model = sharded()
        optimizer = optimizer_of(model)
        recorder = rs.Recorder(
            model, folder / f"{name}-{rank}", capture=ALL, every=2, probe=probe,
            optimizer=optimizer, ranks="shards" if probe is None else "reduce",
        )  # fmt: skip

        def at(k, name=name, model=model, recorder=recorder):
            if name != "between":
                model.odd.odd = k >= 2 and rank == 0
            elif k == 1 and rank == 0:  # the update to come is one to record
                recorder._fail(errors.UnsupportedOutput("as if"))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses, _ = train(model, optimizer, recorder, at=at)
        assert sum("stopped at step" in str(w.message) for w in caught) == 1
        check_stopped(recorder, rank, by=0, error=errors.UnsupportedOutput)
        model.odd.odd = False
        same(fingerprint(model, losses), expected)


def check_stopped(recorder, rank, *, by, error):
    found = stops(recorder)
    if rank == by:
        assert isinstance(found, error)
    else:
        assert type(found) is errors.CaptureError
        assert f"recorder of rank {by} stopped" in str(found)


# -- errors -------------------------------------------------------------------
MODES = {
    "shards": {"ranks": "shards", "capture": ("outputs", "weights")},
    "reduce": {"capture": ("outputs", "moments")},
}


def fails(
    rank, folder, *, by, error, prepare=lambda recorder: None, at=None, **options
):
    """Train under DDP with a recorder that fails on one rank; training goes on."""
    expected = unrecorded(ddp)
    for name, mode in MODES.items():
        model = ddp()
        optimizer = optimizer_of(model)
        recorder = rs.Recorder(
            model, folder / f"{name}-{rank}", every=2, optimizer=optimizer,
            **mode, **options,
        )  # fmt: skip
        prepare(recorder)

        def after(k, model=model, recorder=recorder):
            recorder.capture_now(f"task-{k}")  # also on the rank that failed
            if at is not None:
                at(k, model, recorder)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses, _ = train(model, optimizer, recorder, at=after)
        said = [str(w.message) for w in caught if "stopped at step" in str(w.message)]
        assert len(said) == 1
        assert "Training goes on" in said[0]
        with pytest.raises(errors.RepScopeError):
            recorder.commit()
        check_stopped(recorder, rank, by=by, error=error)
        model.module.odd.odd = False
        same(fingerprint(model, losses), expected)


@scenario("errors")
def an_output_of_one_rank_that_cannot_be_recorded(rank, folder):
    def at(k, model, recorder):
        model.module.odd.odd = k >= 1 and rank == 1

    fails(rank, folder, by=1, error=errors.UnsupportedOutput, at=at)


@scenario("errors")
def a_disk_of_one_rank_that_is_full(rank, folder):
    def prepare(recorder):
        if rank > 0:
            return
        writer, calls = recorder._delivery._writer, []
        append = writer.append

        def full(snapshot):
            calls.append(snapshot)
            if len(calls) > 3:
                raise errors.StoreWriteError("No space left on device")
            append(snapshot)

        writer.append = full

    fails(rank, folder, by=0, error=errors.StoreWriteError, prepare=prepare)


@scenario("errors")
def raised_at_a_step_and_caught_by_the_user(rank, folder):
    for name, mode in MODES.items():
        model = ddp()
        optimizer, raised = optimizer_of(model), []
        recorder = rs.Recorder(
            model, folder / f"{name}-{rank}", every=2, optimizer=optimizer,
            on_error="raise", **mode,
        )  # fmt: skip
        for k in range(STEPS):
            model.module.odd.odd = k >= 2 and rank == 1
            try:
                train(model, optimizer, recorder, first=k, steps=1)
                recorder.capture_now()
            except errors.CaptureError as error:
                raised.append(error)
        assert len(raised) == 1
        assert raised[0] is recorder.error
        check_stopped(recorder, rank, by=1, error=errors.UnsupportedOutput)


@scenario("errors")
def a_constructor_that_fails_on_one_rank(rank, folder):
    def refused(error, model, path, **options):
        expected = error if rank == 1 else errors.CaptureError
        with pytest.raises(expected, match=None if rank else "rank 1 stopped"):
            rs.Recorder(model, path, **options)
        assert not any(module._forward_hooks for module in model.modules())

    for name, mode in MODES.items():
        path = folder / f"{name}-{rank}"
        model = nn.Sequential(nn.Linear(6, 4))
        if rank == 1:
            with pytest.raises(errors.UnknownLayer):
                rs.Recorder(model, path, layers="none", capture="outputs")
        layers = "none" if rank == 1 else "*"
        refused(errors.UnknownLayer, model, path, layers=layers, **mode)
        policy = "no such" if rank == 1 else "block"
        refused(errors.UsageError, model, path, policy=policy, **mode)
        odd = Net().eval()
        odd.odd.odd = rank == 1
        refused(errors.UnsupportedOutput, odd, path, probe=batch(rank, 0), **mode)
        attached = rs.Recorder(model, folder / f"{name}-attached", capture="weights"
                               ) if rank == 1 else None  # fmt: skip
        dist.barrier()
        refused(errors.AlreadyAttached, model, path, **mode)
        if attached is not None:
            attached.close()
        if name == "shards":
            assert not (path / f"rank-{rank}").exists()
        # Nothing of all this is in the way of the next one.
        with rs.Recorder(model, path, every=1, on_error="raise", **mode) as recorder:
            model(batch(rank, 0)[0])
            recorder.step()


@scenario("errors")
def an_exception_of_the_user_on_one_rank(rank, folder):
    for name, mode in MODES.items():
        model = ddp()
        optimizer = optimizer_of(model)
        recorder = rs.Recorder(
            model, folder / name, every=1, optimizer=optimizer, **mode
        )
        if rank == 0:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="recording into")
                train(model, optimizer, recorder, steps=5)
            with pytest.raises(errors.CaptureError, match="rank 1 stopped"):
                recorder.close()
            assert rs.open(recorder.path).closed
            continue
        with pytest.raises(ZeroDivisionError), recorder:  # noqa: PT012
            train(model, optimizer, recorder, steps=2)
            raise ZeroDivisionError
        if name == "shards":
            run = rs.open(recorder.path)
            assert run.closed
            assert run.meta["interrupted"] == "ZeroDivisionError"
            assert run.steps == [0, 1, 2]
        train(model, optimizer, steps=3, first=2)


@scenario("errors")
def ranks_that_do_different_things(rank, folder):
    model = nn.Sequential(nn.Linear(6, 4))
    path = folder / "run"
    recorder = rs.Recorder(model, path, capture="moments", every=1)
    model(batch(rank, 0)[0])
    recorder.step()
    if rank == 0:
        with pytest.raises(errors.CaptureError, match="alike") as caught:
            recorder._ranks.meet("close()")
        recorder._stop(caught.value)
        stops(recorder)
    else:
        with pytest.raises(errors.CaptureError, match="alike"):
            recorder.commit()
        stops(recorder)
    dist.barrier()
    assert rs.open(path).closed


@scenario("errors")
def a_rank_that_does_not_come(rank, folder):
    model = nn.Sequential(nn.Linear(6, 4))
    path, limit = folder / "run", ranks_module._TIMEOUT
    recorder = rs.Recorder(model, path, capture="moments", every=1)
    ranks_module._TIMEOUT = limit / 3600
    if rank == 0:
        with pytest.raises(errors.CaptureError, match=r"waited 0:00:00\.5"):
            recorder.commit()
        assert "waited" in str(stops(recorder))
    ranks_module._TIMEOUT = limit
    dist.barrier()
    if rank == 1:
        with pytest.raises(errors.CaptureError, match="rank 0 stopped"):
            recorder.commit()
        assert "rank 0" in str(stops(recorder))
    assert rs.open(path).closed


@scenario("errors")
def what_interrupts_a_meeting_starts_no_other(rank, folder):
    model = nn.Sequential(nn.Linear(6, 4))
    found = connect("reduce", model, "moments")
    found._arrived["close()"] += 1  # as in a signal handler while it waits
    with pytest.raises(errors.CaptureError, match=r"commit\(\) interrupts"):
        found.meet("commit()")
    found.leave()
    with pytest.raises(errors.CaptureError, match=r"close\(\) before the others"):
        found._wait("close()")


@scenario("errors")
def moments_that_fit_no_other_on_one_rank(rank, folder):
    class Wide(nn.Module):
        def forward(self, x):
            return x

    model = nn.Sequential(Wide())
    recorder = rs.Recorder(model, folder / "run", capture="moments", every=1)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for k in range(3):
            model(torch.randn(5, 4 + (k if rank else 0)))
            recorder.step()
        recorder.capture_now("now")
    check_stopped(recorder, rank, by=1, error=errors.MetricError)


@scenario("errors")
def a_job_that_has_lost_its_store(rank, folder):
    model = nn.Sequential(nn.Linear(6, 4))
    recorder = rs.Recorder(model, folder / f"{rank}", capture="moments", every=1)

    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer")

    recorder._ranks._store = Gone()
    with pytest.raises(
        errors.CaptureError, match=r"lost the recorders .* reset by peer"
    ):
        recorder.close()
    left = connect("reduce", model, "moments")
    left._store = Gone()
    left.leave()


# -- a rank that dies ---------------------------------------------------------
@scenario("dies")
def an_exception_ends_the_job(rank, folder):
    model = ddp()
    optimizer = optimizer_of(model)
    with rs.Recorder(
        model, folder / "run", every=1, optimizer=optimizer, ranks="shards",
        capture=("outputs", "moments"),
    ) as recorder:  # fmt: skip
        train(model, optimizer, recorder, steps=3)
        if rank == 1:
            raise ZeroDivisionError
        train(model, optimizer, recorder, steps=3, first=3)


# -- one process --------------------------------------------------------------
@scenario("alone")
def one_process_is_like_no_job(rank, folder):
    assert dist.get_world_size() == 1
    for mode in ("reduce", "shards"):
        model = nn.Sequential(nn.Linear(6, 4))
        with rs.Recorder(
            model, folder / mode, every=1, ranks=mode, capture=("outputs", "moments"),
            on_error="raise",
        ) as recorder:  # fmt: skip
            assert recorder.path == folder / mode
            model(batch(0, 0)[0])
            recorder.step()
        run = rs.open(folder / mode)
        assert run.moments("0").count == 12
        assert "ranks" not in run.meta["recorder"]
        assert (folder / mode / "FORMAT").exists()


def main(group, folder, seconds):
    faulthandler.dump_traceback_later(seconds, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for function in SCENARIOS[group]:
        start, name = time.monotonic(), function.__name__
        place = folder / name
        place.mkdir(exist_ok=True)
        dist.barrier()
        try:
            function(rank, place)
            found[name] = ""
        except BaseException:  # the ranks are no longer at the same place
            found[name] = traceback.format_exc()
            raise
        finally:
            torch.save(found, folder / f"{rank}.pt")
        print(f"{rank} {name} {time.monotonic() - start:.2f} s", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
