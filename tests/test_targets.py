"""Every capture target against what autograd and the optimizer themselves say."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import repscope as rs
from repscope.capture import TARGETS
from repscope.errors import MissingOptimizer, RepScopeWarning, UsageError
from repscope.optim import make

EVERYTHING = tuple(TARGETS)


class Net(nn.Module):
    """A dict, a kwarg, a layer used twice, and in-place work on what it returned."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.act = nn.ReLU(inplace=True)
        self.twice = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.act(self.first(x))
        h = self.twice(input=self.twice(h))
        return self.head(self.drop(self.norm(h)))


def net():
    torch.manual_seed(1)
    return Net()


def batch(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), torch.arange(n) % 3


def iterate(model, optimizer, recorder=None, steps=5):
    losses = []
    for step in range(steps):
        x, y = batch(seed=step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if recorder is not None:
            recorder.step(loss=loss, labels=y)
    return losses


def record(path, model, optimizer, **options):
    options = {"capture": EVERYTHING, "every": 1, "on_error": "raise"} | options
    return rs.Recorder(model, path, optimizer=optimizer, **options)


@pytest.mark.parametrize("name", ["sgd", "adamw", "shampoo"])
def test_a_run_that_is_recorded_whole_is_bit_identical(tmp_path, name):
    def run(recorded):
        model = net()
        optimizer = make(name, model.parameters(), lr=0.05)
        if not recorded:
            return model, iterate(model, optimizer)
        with record(tmp_path / "run", model, optimizer) as recorder:
            return model, iterate(model, optimizer, recorder)

    (a, losses), (b, others) = run(True), run(False)
    assert all(map(torch.equal, losses, others))
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    stateless = {"optimizer_state"} if name == "sgd" else set()
    assert set(rs.open(tmp_path / "run").targets) == set(EVERYTHING) - stateless


def test_updates_lead_from_one_step_to_the_next(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with record(tmp_path / "run", model, optimizer) as recorder:
        iterate(model, optimizer, recorder)
    run = rs.open(tmp_path / "run")
    for name, value in model.named_parameters():
        for step in range(5):
            before, after = (
                run.read(name, k, target="weights") for k in (step, step + 1)
            )
            assert torch.equal(run.read(name, step, target="updates"), after - before)
        assert torch.equal(run.read(name, 5, target="weights"), value.detach())
    assert run.series("head.weight", target="updates").shape == (5, 3, 6)


def test_gradients_are_those_at_the_weights_of_their_step(tmp_path):
    """Against a second model that is given the recorded weights and no recorder."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(5)
    with record(tmp_path / "run", model, optimizer) as recorder:
        iterate(model, optimizer, recorder, steps=3)
    run = rs.open(tmp_path / "run")
    torch.manual_seed(5)
    twin, taps = net(), {}
    torch.manual_seed(5)
    twin.drop.register_forward_hook(lambda m, a, out: taps.update(drop=out))
    twin.head.register_forward_hook(lambda m, a, out: taps.update(head=out))
    twin.first.register_forward_hook(lambda m, a, out: taps.update(first=out * 1))
    for step in range(3):
        weights = {n: run.read(n, step, target="weights")
                   for n, _ in twin.named_parameters()}  # fmt: skip
        twin.load_state_dict(weights, strict=False)
        x, y = batch(seed=step)
        loss = nn.functional.cross_entropy(twin(x), y)
        for name in ("head", "drop"):
            taps[name].retain_grad()
        twin.zero_grad()
        loss.backward()
        for name, value in twin.named_parameters():
            assert torch.equal(
                run.read(name, step, target="weight_gradients"), value.grad
            )
        for name in ("head", "drop"):
            got = run.read(name, step, target="output_gradients")
            assert torch.equal(got, taps[name].grad)
            assert torch.equal(run.read(name, step), taps[name].detach())
        assert torch.equal(run.read("first", step, target="inputs"), x)


def test_a_layer_that_an_in_place_one_follows(tmp_path):
    """Output and gradient are of what the layer returned, not of what became of it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = batch()[0]
    w0, b0, w2 = (p.detach().clone() for p in (*model[0].parameters(), model[2].weight))
    with record(tmp_path / "run", model, optimizer) as recorder:
        model(x).sum().backward()
        optimizer.step()
        recorder.step()
    run = rs.open(tmp_path / "run")
    z = x @ w0.T + b0
    torch.testing.assert_close(run.read("0", 0), z)
    torch.testing.assert_close(run.read("1", 0, target="inputs"), z)
    torch.testing.assert_close(run.read("1", 0), z.relu())
    torch.testing.assert_close(
        run.read("0", 0, target="output_gradients"), (z > 0) * w2.expand(8, 6)
    )


def test_inputs_in_every_shape_they_are_given_in(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b=None, *, c=None, n=3):
            return a + b + c

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.one = Two(), nn.Linear(4, 4)

        def forward(self, x):
            return self.two(x, 2 * x, c=self.one(self.one(x)))

    model, x = Root(), batch()[0]
    with rs.Recorder(
        model, tmp_path / "run", capture="inputs", layers=["two", "one"], probe=x
    ):
        pass
    run = rs.open(tmp_path / "run")
    seen = {layer: run.read(layer, target="inputs") for _, layer in run.streams}
    assert set(seen) == {"one", "one@1", "two:0", "two:1", "two:c"}
    assert torch.equal(seen["two:1"], 2 * x)
    assert torch.equal(seen["one@1"], model.one(x))
    assert run.targets == ["inputs"]


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("SGD", {"momentum_buffer"}),
        ("AdamW", {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_optimizer_state(tmp_path, name, entries):
    model = net()
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)
    with record(tmp_path / "run", model, optimizer, capture="optimizer_state") as rec:
        iterate(model, optimizer, rec, steps=2)
    run = rs.open(tmp_path / "run")
    streams = {layer for _, layer in run.streams}
    assert {s.split(":")[1] for s in streams} == entries
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for entry in entries:
            got = run.read(
                f"{names[id(parameter)]}:{entry}", 2, target="optimizer_state"
            )
            assert torch.equal(got, state[entry])


def test_the_factors_of_shampoo_are_streams(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = make("shampoo", model.parameters(), lr=0.01)
    model.root = nn.Identity()
    with record(tmp_path / "run", model, optimizer, capture="optimizer_state") as rec:
        for _ in range(2):
            model(batch()[0]).sum().backward()
            optimizer.step()
            rec.step()
    run = rs.open(tmp_path / "run")
    shapes = {layer: run.shapes["optimizer_state", layer] for _, layer in run.streams}
    assert (4, 4) in shapes.values()
    assert (3, 3) in shapes.values()
    assert all(layer.startswith(("weight:", "bias:")) for layer in shapes)


# -- what a step is ------------------------------------------------------------
def accumulate(model, optimizer, recorder, parts, *, together=False):
    x, y = batch(12)
    optimizer.zero_grad()
    chunks = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    losses = []
    for a, b in chunks:
        loss = nn.functional.cross_entropy(model(a), b) / parts
        losses.append(loss)
        if not together:
            loss.backward()
    if together:
        sum(losses).backward()
    for number, (loss, (_, b)) in enumerate(zip(losses, chunks, strict=True)):
        if number == parts - 1:
            optimizer.step()
        recorder.step(loss=loss, labels=b)


@pytest.mark.parametrize("together", [False, True])
def test_micro_batches_are_one_step(tmp_path, together):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    runs = []
    for parts in (1, 3):
        model = plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / str(parts)
        with record(path, model, optimizer) as recorder:
            for _ in range(2):
                accumulate(model, optimizer, recorder, parts, together=together)
            assert recorder.step_number == 2
        runs.append(rs.open(path))
    whole, split = runs
    assert whole.steps == split.steps == [0, 1, 2]
    for target, layer in whole.streams:
        for step in (0, 1) if target != "moments" else (2,):
            a, b = (run.read(layer, step, target=target) for run in runs)
            torch.testing.assert_close(a, b, msg=f"{target} {layer}")
    assert torch.equal(whole.labels(1), split.labels(1))
    one, three = (torch.tensor(run.scalars()["loss"].to_numpy()) for run in runs)
    torch.testing.assert_close(one, 3 * three)


def test_a_step_that_scaling_skips_is_none(tmp_path):
    model = nn.Linear(4, 3)
    model.inner = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with record(tmp_path / "run", model, optimizer, capture="weights") as recorder:
        for scale in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            loss = model(batch()[0]).sum() * scale
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            recorder.step(loss=loss)
        assert recorder.step_number == 2
    assert rs.open(tmp_path / "run").steps == [0, 1, 2]


@pytest.mark.parametrize("by_name", [False, True])
def test_of_a_closure_the_first_run_counts(tmp_path, by_name):
    """LBFGS evaluates at trial points: only the first is at the weights of the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    x, calls, grads = batch()[0], [], []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        calls.append(loss.detach())
        grads.append(model[0].weight.grad.clone())
        return loss

    with record(tmp_path / "run", model, optimizer) as recorder:
        for _ in range(3):
            first = len(calls)
            optimizer.step(**{"closure": closure}) if by_name else optimizer.step(
                closure
            )
            recorder.step(loss=calls[first])
        assert recorder.step_number == 3
    assert len(calls) > 6
    run = rs.open(tmp_path / "run")
    w, b = (run.read(f"0.{n}", 1, target="weights") for n in ("weight", "bias"))
    torch.testing.assert_close(run.read("0", 1), x @ w.T + b)
    got = run.read("0.weight", 0, target="weight_gradients")
    assert torch.equal(got, grads[0])


def test_several_updates_between_two_calls(tmp_path):
    """The rows are those at the weights of the step; the number counts all updates."""
    model = net().eval()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(tmp_path / "run", model, optimizer, capture=("outputs", "updates"),
                layers="first") as recorder:  # fmt: skip
        for _ in range(2):
            for seed in range(3):
                x, y = batch(seed=seed)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            recorder.step()
        assert recorder.step_number == 6
    run = rs.open(tmp_path / "run")
    assert run.steps == [0, 3]
    assert run.read("first", 3).shape == (8, 6)


def test_a_new_optimizer_is_followed_when_it_is_told(tmp_path):
    model = net()
    with record(tmp_path / "run", model, torch.optim.SGD(model.parameters())) as rec:
        for lr in (0.1, 0.2):
            rec.optimizer = optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            iterate(model, optimizer, rec, steps=2)
        assert rec.optimizer is optimizer
        assert rec.step_number == 4
        rec.optimizer = None
        model(batch()[0])
        rec.step()
        assert rec.step_number == 5


def test_an_optimizer_that_never_steps_is_mentioned_once(tmp_path, monkeypatch):
    monkeypatch.setattr("repscope.recorder.held._IDLE_CALLS", 5)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(tmp_path / "run", model, optimizer, capture="weights") as recorder:
        for call in range(12):
            if call == 4:
                with pytest.warns(RepScopeWarning, match="set recorder.optimizer"):
                    recorder.step()
            else:
                recorder.step()
        assert recorder.step_number == 0


# -- leaves nothing behind -------------------------------------------------------
def test_hooks_are_gone_and_copies_are_inert(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with record(tmp_path / "run", model, optimizer) as recorder:
        iterate(model, optimizer, recorder, steps=1)
        twin = copy.deepcopy(model)
        other = copy.deepcopy(optimizer)
        torch.save(model, io.BytesIO())
        before = recorder.step_number
        other.step()
        twin(batch()[0]).sum().backward()
        assert recorder.step_number == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert rs.open(tmp_path / "run").read("first", 0).shape == (8, 6)


def test_an_error_while_copying_does_not_break_the_update(tmp_path, monkeypatch):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = record(
        tmp_path / "run", model, optimizer, capture="updates", on_error="warn"
    )

    def broken(model):
        raise RuntimeError("no memory")

    monkeypatch.setattr("repscope.capture.updates.parameters", broken)
    before = model.head.weight.detach().clone()
    with pytest.warns(RepScopeWarning, match="no memory"):
        iterate(model, optimizer, recorder, steps=2)
    assert not torch.equal(model.head.weight, before)
    with pytest.raises(RuntimeError, match="no memory"):
        recorder.close()


def test_targets_that_cannot_be_had(tmp_path):
    model = net()
    for target in ("updates", "weight_gradients", "optimizer_state"):
        with pytest.raises(MissingOptimizer, match="optimizer="):
            rs.Recorder(model, tmp_path / "run", capture=target)
    with pytest.raises(UsageError, match="leave probe= out"):
        rs.Recorder(model, tmp_path / "run", capture="output_gradients",
                    probe=batch())  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_no_gradient_no_stream(tmp_path):
    """A frozen layer has outputs, and neither gradients nor updates of its own."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with record(tmp_path / "run", model, optimizer) as recorder:
            iterate(model, optimizer, recorder, steps=1)
    streams = rs.open(tmp_path / "run").streams
    assert ("outputs", "0") in streams
    assert ("output_gradients", "1") in streams
    assert ("output_gradients", "0") not in streams
    assert ("weight_gradients", "0.weight") not in streams


# -- rows ---------------------------------------------------------------------------
def conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize(
    ("reduce", "shape"),
    [
        ("auto", (5, 3)),
        ("positions", (20, 3)),
        ("flatten", (5, 12)),
        ("tokens", (30, 2)),
    ],
)
def test_reduce_decides_what_a_row_is(tmp_path, reduce, shape):
    x, y = torch.randn(5, 1, 3, 3), torch.tensor([0, 1, 0, 1, 2])
    model = conv()
    with rs.Recorder(model, tmp_path / "run", probe=(x, y), reduce=reduce):
        pass
    run = rs.open(tmp_path / "run")
    assert run.meta["recorder"]["reduce"] == reduce
    assert run.read("0").shape == run.read("1").shape == shape
    assert run.read("3").shape == (5, 2)
    table = rs.measure(run, metrics=["class_cosine"], layers="0")
    assert table["n_samples"].item() == shape[0]
    assert table["value"].notna().all()  # positions take the label of their example
    if reduce == "positions":
        want = model[0](x).permute(0, 2, 3, 1).reshape(20, 3)
        assert torch.equal(run.read("0"), want.detach())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        ("float64", torch.float64),
        (None, torch.bfloat16),
    ],
)
def test_dtype_of_what_is_recorded(tmp_path, dtype, stored):
    """Under autocast layers return bfloat16: float32 holds it exactly."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, kept = batch()[0], []
    model[0].register_forward_hook(lambda m, a, out: kept.append(out.detach().clone()))
    with record(tmp_path / "run", model, optimizer, dtype=dtype) as recorder:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().sum()
        loss.backward()
        optimizer.step()
        recorder.step()
    run = rs.open(tmp_path / "run")
    assert kept[0].dtype == torch.bfloat16
    got = run.read("0", 0)
    assert got.dtype == run.read("0", 0, target="output_gradients").dtype == stored
    assert torch.equal(got, kept[0].to(stored))
    for target in ("weights", "updates", "weight_gradients"):
        assert run.read("0.weight", 0, target=target).dtype == torch.float32


def test_rows_in_another_form_are_refused_on_resume(tmp_path):
    x = torch.randn(5, 1, 3, 3)
    model = conv()
    rs.Recorder(model, tmp_path / "run", probe=x).close()
    for option in ({"reduce": "flatten"}, {"dtype": "float16"}):
        with pytest.raises(UsageError, match="give the same"):
            rs.Recorder(model, tmp_path / "run", probe=x, resume=True, **option)
    rs.Recorder(model, tmp_path / "run", probe=x, resume=True).close()
    for option in ({"reduce": "flaten"}, {"dtype": "float23"}, {"dtype": torch.int8}):
        with pytest.raises(UsageError, match="is not one of"):
            rs.Recorder(model, tmp_path / "new", probe=x, **option)
    assert not (tmp_path / "new").exists()
