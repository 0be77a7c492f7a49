"""Which rows are recorded: at most so many, and none of padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import repscope as rs
from repscope.errors import UsageError

N, T, D = 10, 7, 6


class Tokens(nn.Module):
    """Takes a mask as transformers do, and as torch's own encoder does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, D)
        self.norm = nn.LayerNorm(D)
        self.pool = nn.Linear(D, 3)

    def forward(self, x, attention_mask=None, src_key_padding_mask=None):
        return self.pool(self.norm(self.embed(x)).mean(1))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, T, 4, generator=generator)
    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    return x, mask, torch.arange(N)


def live(path, *, micro=1, mask=None, forward=None, steps=3, **options):
    model = Tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = rs.Recorder(
        model, path, every=1, optimizer=optimizer, on_error="raise", **options
    )
    x, _, y = batch()
    with recorder:
        for _ in range(steps):
            for rows in torch.arange(N).chunk(micro):
                keywords = {k: v[rows] for k, v in (forward or {}).items()}
                model(x[rows], **keywords).square().sum().backward()
                if rows[-1] < N - 1:
                    part = None if mask is None else mask[rows]
                    recorder.step(labels=y[rows], mask=part)
            optimizer.step()
            optimizer.zero_grad()
            part = mask if mask is None or micro == 1 else mask[rows]
            recorder.step(labels=y[rows], mask=part)
    return rs.open(path)


EVERY = ("outputs", "inputs", "output_gradients")


@pytest.mark.parametrize("most", [1, 8, 13, 69, 70, 71])
@pytest.mark.parametrize("micro", [1, 3])
def test_at_most_so_many_rows_the_same_at_every_step(tmp_path, most, micro):
    whole = live(tmp_path / "whole", capture=EVERY)
    run = live(tmp_path / "run", capture=EVERY, max_rows=most, micro=micro)
    assert run.streams == whole.streams
    kept = {}
    streams = sorted(whole.streams, key=lambda key: key[0] != "outputs")
    for target, layer in streams:  # first those whose rows all differ
        for step in range(3):
            a = whole.read(layer, step, target=target)
            b = run.read(layer, step, target=target)
            assert len(b) == min(most, len(a))
            # Which rows: found by their values, in order, the same wherever there
            # are as many.
            where = [int((a - row).abs().sum(1).argmin()) for row in b]
            where = kept.setdefault(len(a), where)
            assert where == sorted(set(where))
            torch.testing.assert_close(a[where], b)
            labels = run.labels(step, layer=layer, target=target)
            assert labels.tolist() == [i // (len(a) // N) for i in where]


def test_the_choice_does_not_depend_on_how_a_probe_is_cut(tmp_path):
    x, _, y = batch()
    runs = []
    for size in (None, 4, 1):
        model = Tokens()
        path = tmp_path / str(size)
        probe = rs.Probe(x, labels=y, batch_size=size)
        with rs.Recorder(model, path, probe=probe, max_rows=12):
            pass
        runs.append(rs.open(path))
    for layer in ("embed", "pool"):
        first, *others = [run.labels(layer=layer).tolist() for run in runs]
        assert all(labels == first for labels in others)
        rows = [run.read(layer) for run in runs]
        assert all(torch.allclose(r, rows[0], atol=1e-6) for r in rows)
    assert len(runs[0].read("embed")) == 12


def test_the_chosen_rows_are_spread_over_all(tmp_path):
    choice = rs.capture.Choice(100)
    chosen = choice.among(0, 10_000)
    assert len(chosen) == 100
    quarters = torch.bincount(chosen // 2500, minlength=4)
    assert quarters.min() > 10
    assert len(set(torch.diff(chosen).tolist())) > 20


@pytest.mark.parametrize("most", [0, -1])
def test_fewer_than_one_row_is_refused(tmp_path, most):
    with pytest.raises(UsageError, match="max_rows must be positive"):
        rs.Recorder(Tokens(), tmp_path / "run", max_rows=most)


def expected(path):
    """Rows of tokens that count, and the example of each."""
    whole = live(path, capture=EVERY)
    _, mask, _ = batch()
    keep = mask.flatten()
    return whole, keep, torch.arange(N).repeat_interleave(T)[keep].tolist()


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("how", ["step", "attention_mask", "src_key_padding_mask"])
def test_padding_is_left_out(tmp_path, how, micro):
    whole, keep, examples = expected(tmp_path / "whole")
    _, mask, _ = batch()
    given = {"step": {"mask": mask}}.get(
        how, {"forward": {how: mask.long() if how == "attention_mask" else ~mask}}
    )
    run = live(tmp_path / "run", capture=EVERY, micro=micro, **given)
    for target, layer in whole.streams:
        a, b = (r.read(layer, 1, target=target) for r in (whole, run))
        if len(a) == N * T:
            a = a[keep]
            assert run.labels(1, layer=layer, target=target).tolist() == examples
        torch.testing.assert_close(a, b)
    assert len(run.labels(1)) == N


def test_padding_is_left_out_before_rows_too_many(tmp_path):
    _, mask, _ = batch()
    run = live(tmp_path / "run", mask=mask, max_rows=9)
    whole = live(tmp_path / "whole", mask=mask)
    rows = run.read("embed", 0)
    assert 0 < len(rows) <= 9
    known = whole.read("embed", 0)
    assert all((known == row).all(1).any() for row in rows)
    assert len(run.labels(0, layer="embed")) == len(rows)


@pytest.mark.parametrize("how", ["mapping", "mask"])
def test_padding_of_a_probe_is_left_out(tmp_path, how):
    x, mask, y = batch()
    whole, keep, examples = expected(tmp_path / "whole")
    if how == "mapping":
        inputs = {"x": x, "attention_mask": mask.long()}
        probe = rs.Probe(inputs, labels=y, batch_size=4)
    else:
        probe = rs.Probe(x, labels=y, batch_size=4, mask=mask)
    with rs.Recorder(Tokens(), tmp_path / "run", probe=probe):
        pass
    run = rs.open(tmp_path / "run")
    torch.testing.assert_close(run.read("norm"), whole.read("norm", 0)[keep])
    assert run.labels(layer="norm").tolist() == examples
    assert run.labels(layer="pool").tolist() == y.tolist()


def test_a_mean_over_time_is_one_of_the_tokens_that_count(tmp_path):
    x, mask, _ = batch()
    probe = rs.Probe(x, mask=mask)
    with rs.Recorder(Tokens(), tmp_path / "run", probe=probe, reduce="pool"):
        pass
    out = Tokens().embed(x).detach()
    means = torch.stack([h[m].mean(0) for h, m in zip(out, mask, strict=True)])
    torch.testing.assert_close(rs.open(tmp_path / "run").read("embed"), means)


@pytest.mark.parametrize("shape", [(N, T + 1), (N + 1, T), (N * T,)])
def test_a_mask_that_fits_nothing_is_refused(tmp_path, shape):
    with pytest.raises(UsageError, match="fits no recorded layer"):
        live(tmp_path / "run", mask=torch.ones(shape, dtype=torch.bool))


def test_a_probe_and_its_mask_have_one_length():
    x, mask, _ = batch()
    with pytest.raises(UsageError, match="mask= has 9 rows for 10 samples"):
        rs.Probe(x, mask=mask[:-1])


def test_class_metrics_use_the_labels_of_the_rows_that_are_there(tmp_path):
    x, mask, y = batch()
    y = y % 2
    probe = rs.Probe(x, labels=y, mask=mask)
    path = tmp_path / "run"
    with rs.Recorder(Tokens(), path, probe=probe, max_rows=20, layers="norm"):
        pass
    run = rs.open(path)
    table = rs.measure(run, metrics=["class_cosine"])
    X, labels = run.read("norm"), run.labels(layer="norm")
    assert float(table["value"].iloc[0]) == pytest.approx(
        float(rs.cross_class_cosine(X, labels)), abs=1e-12
    )
    assert set(table["layer"]) == {"norm"}


def test_a_gradient_that_never_came_does_not_shift_the_labels(tmp_path):
    model = Tokens()
    x, _, y = batch()
    with rs.Recorder(
        model, tmp_path / "run", every=1, capture="output_gradients", on_error="raise"
    ) as recorder:
        model(x[:4])  # nobody goes back through this one
        model(x[4:]).sum().backward()
        recorder.step(labels=y)
    run = rs.open(tmp_path / "run")
    labels = run.labels(0, layer="pool", target="output_gradients")
    assert labels.tolist() == y[4:].tolist()
