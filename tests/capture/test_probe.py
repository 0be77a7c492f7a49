import random

import numpy as np
import pytest
import torch
from torch import nn

import repscope as rs
from repscope import Probe
from repscope.capture.probe import as_probe
from repscope.errors import LabelError, LabelMismatch, UsageError


class Restless(nn.Module):
    """Touches everything a forward can touch: RNG, buffers, a replaced buffer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("noise", torch.zeros(3))
        self.register_buffer("late", None)

    def forward(self, x):
        self.calls += 1
        self.late = torch.ones(1)
        self.noise = torch.rand(3) + random.random() + np.random.rand()  # noqa: NPY002
        return self.drop(self.norm(x))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_probe_leaves_no_trace():
    model = Restless()
    model.norm.eval()  # a frozen layer inside a training model
    buffer = model.noise
    probe = Probe(torch.randn(8, 4), batch_size=3)
    before, rng = state(model), torch.get_rng_state()
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    flags = [module.training for module in model.modules()]
    probe.run(model)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], legacy[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert model.noise is buffer
    assert model.late is None


def test_everything_is_restored_after_a_forward_that_raises():
    model = Restless()
    probe = Probe(torch.randn(8, 5))
    rng, before = torch.get_rng_state(), state(model)
    with pytest.raises(RuntimeError):
        probe.run(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_an_untouched_buffer_keeps_its_version():
    model = nn.BatchNorm1d(4)
    version = model.running_mean._version
    Probe(torch.randn(8, 4)).run(model)
    assert model.running_mean._version == version


def test_buffers_with_nan_are_left_alone():
    model = nn.BatchNorm1d(4)
    model.running_mean.fill_(float("nan"))
    version = model.running_mean._version
    Probe(torch.randn(8, 4)).run(model)
    assert model.running_mean._version == version


@pytest.mark.parametrize("batch_size", [None, 1, 3, 8, 100])
def test_every_row_is_run_once_in_chunks(batch_size):
    seen = []
    model = nn.Identity()
    model.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    x = torch.randn(8, 4)
    Probe(x, batch_size=batch_size).run(model)
    assert torch.equal(torch.cat(seen), x)


def test_tuples_mappings_and_own_forwards():
    class Two(nn.Module):
        def forward(self, a, b, scale=1):
            return seen.append((a + b) * scale)

    seen: list[torch.Tensor] = []
    a, b = torch.ones(4, 2), torch.ones(4, 2)
    Probe((a, b), batch_size=3).run(Two())
    Probe({"a": a, "b": b, "scale": 2}).run(Two())
    Probe(a, forward=lambda model, x: model(x, x, scale=3)).run(Two())
    assert [float(s.unique()) for s in seen] == [2, 2, 4, 6]
    assert [len(s) for s in seen] == [3, 1, 4, 4]


def test_the_batch_stays_fixed_whatever_happens_to_the_tensors():
    seen = []

    class InPlace(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x.mul_(2)

    x = torch.ones(4, 2)
    probe = Probe(x)
    before = probe.sha256
    probe.run(InPlace())
    x.zero_()
    probe.run(InPlace())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(x, torch.zeros(4, 2))  # the caller's, untouched by us
    assert probe.sha256 == before


def test_the_hash_knows_values_labels_and_shape():
    x = torch.arange(6.0)
    hashes = {
        Probe(x.reshape(2, 3)).sha256,
        Probe(x.reshape(3, 2)).sha256,
        Probe(x.reshape(2, 3), labels=[0, 1]).sha256,
        Probe(x.reshape(2, 3).double()).sha256,
    }
    assert len(hashes) == 4
    assert Probe(x.reshape(2, 3)).sha256 == Probe(x.reshape(2, 3).clone()).sha256


def test_short_forms():
    x = torch.ones(3, 2)
    assert as_probe(None) is None
    assert as_probe(x).labels is None
    assert as_probe((x, [0, 1, 1])).labels.tolist() == [0, 1, 1]
    probe = Probe(x)
    assert as_probe(probe) is probe


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Probe((torch.ones(3), torch.ones(4))), UsageError),
        (lambda: Probe({}), UsageError),
        (lambda: Probe(torch.ones(3), batch_size=0), UsageError),
        (lambda: as_probe([1, 2, 3]), UsageError),
        (lambda: Probe(torch.ones(3), labels=[0, 1]), LabelMismatch),
        (lambda: Probe(torch.ones(2), labels=[0.0, 1.0]), LabelError),
    ],
)
def test_unusable_probes_are_refused(make, error):
    with pytest.raises(error):
        make()


def test_several_batches_are_one_probe(tmp_path):
    torch.manual_seed(0)
    batches = [{"x": torch.randn(n, t, 3)} for n, t in ((4, 5), (2, 7), (3, 5))]
    masks = [torch.rand(b["x"].shape[:2]) > 0.3 for b in batches]
    for mask in masks:
        mask[:, 0] = True

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x)

    y = torch.arange(9)
    model = Net()
    paths = []
    for size in (None, 2):
        paths.append(tmp_path / str(size))
        probe = rs.Probe(batches, labels=y, batch_size=size, mask=masks)
        rs.Recorder(model, paths[-1], probe=probe).close()
    for run in map(rs.open, paths):
        rows = [model.fc(b["x"][m]) for b, m in zip(batches, masks, strict=True)]
        torch.testing.assert_close(run.read("fc"), torch.cat(rows).detach())
        counts = torch.cat([mask.sum(1) for mask in masks])
        assert run.labels(layer="fc").tolist() == y.repeat_interleave(counts).tolist()
    hashes = {rs.Probe(b, labels=y[:4]).sha256 for b in ([batches[0]], batches[0])}
    assert len(hashes) == 1
    with pytest.raises(UsageError, match="2 masks for 3 batches"):
        rs.Probe(batches, mask=masks[:2])
    with pytest.raises(UsageError, match="share their first dimension"):
        rs.Probe([batches[0], {}])
