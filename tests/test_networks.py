"""Networks of several runs: what is compared, and what must not be."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import repscope as rs
from repscope import errors
from repscope.cli import main

PROBE = torch.randn(40, 5, generator=torch.Generator().manual_seed(7))


def record(path, optimizer, seed, *, probe=PROBE, layers="*", named=True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    if optimizer == "other":  # far from where all begin
        with torch.no_grad():
            model[0].weight *= torch.tensor([[50.0], [1.0], [0.0], [0.0]])
    meta = {"optimizer": optimizer} | ({"seed": seed} if named else {})
    with rs.Recorder(
        model, path, layers=layers, every=1, probe=probe, meta=meta
    ) as recorder:
        for step in range(2):
            with torch.no_grad():
                model[2].bias += step
            recorder.step()
    return path


@pytest.fixture
def runs(tmp_path):
    return [
        record(tmp_path / f"{optimizer}-{seed}", optimizer, seed)
        for optimizer in ("one", "other")
        for seed in range(3)
    ]


def by_hand(runs, layer, distance):
    """Return mean distances between the optimizers and within each of them."""
    features = [rs.open(path).read(layer) for path in runs]
    kinds = [path.name.split("-") for path in runs]
    between, within = [], {"one": [], "other": []}
    for i, (a, s) in enumerate(kinds):
        for j, (b, t) in enumerate(kinds[:i]):
            if s != t:
                pair = float(distance(features[i], features[j]))
                (within[a] if a == b else between).append(pair)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return mean(between), mean(list(map(mean, within.values())))


@pytest.mark.parametrize(
    ("metric", "distance"),
    [
        ("procrustes_distance", rs.procrustes_distance),
        ("linear_cka", rs.linear_cka),
        ("linear_cka_debiased", lambda X, Y: rs.linear_cka(X, Y, debiased=True)),
    ],
)
def test_optimizers_are_compared_beside_their_seeds(runs, metric, distance):
    frame = rs.compare_networks(runs, metric=metric)
    assert list(frame["layer"].unique()) == ["0", "1", "2"]
    assert list(frame["metric"].unique()) == [metric]
    for layer, rows in frame.groupby("layer"):
        assert len(rows) == 3
        between, within = by_hand(runs, layer, distance)
        assert rows["between"].tolist() == pytest.approx([between] * 3)
        assert rows["within"].tolist() == pytest.approx([within] * 3)
        assert rows["ratio"].tolist() == pytest.approx([between / within] * 3)
        pairs = rows.set_index(["group_a", "group_b"])["n_pairs"].to_dict()
        # Not the three of equal seeds, which share an initialisation.
        assert pairs == {("one", "one"): 3, ("one", "other"): 6, ("other", "other"): 3}


def test_layers_and_steps_are_chosen(runs):
    frame = rs.compare_networks(runs, layers="[02]", step=0)
    assert list(frame["layer"].unique()) == ["0", "2"]
    with pytest.raises(errors.UnknownLayer, match="all 6 runs have matches 'conv'"):
        rs.compare_networks(runs, layers="conv")
    with pytest.raises(errors.UsageError, match="'procrustes_distance'"):
        rs.compare_networks(runs, metric="procrustes")


def test_a_layer_that_one_run_lacks_is_left_out(runs, tmp_path):
    fewer = record(tmp_path / "other-3", "other", 3, layers="2")
    assert set(rs.compare_networks([*runs, fewer])["layer"]) == {"2"}


def test_features_of_different_inputs_are_refused(runs, tmp_path):
    other = record(tmp_path / "other-3", "other", 3, probe=PROBE + 1)
    with pytest.raises(errors.ProbeMismatch, match=r"one-0 and .*other-3 were"):
        rs.compare_networks([*runs, other])
    live = tmp_path / "live"
    model = nn.Sequential(nn.Linear(5, 4))
    with rs.Recorder(model, live, every=1) as recorder:
        model(PROBE)
        recorder.step()
    with pytest.raises(errors.ProbeMismatch, match="recorded on its training batches"):
        rs.compare_networks([*runs, live])


def test_one_seed_twice_and_groups_too_small_are_refused(runs, tmp_path):
    again = record(tmp_path / "again", "one", 2)
    with pytest.raises(errors.UsageError, match=r"again are both one with seed 2"):
        rs.compare_networks([*runs, again])
    with pytest.raises(errors.NotEnoughSamples):
        rs.compare_networks(runs[:4])
    with pytest.raises(errors.UsageError, match="at least 2"):
        rs.compare_networks(runs[:3])


def test_runs_that_name_no_seed_are_all_compared(tmp_path):
    paths = [
        record(tmp_path / f"{optimizer}-{i}", optimizer, i, named=False)
        for optimizer in ("one", "other")
        for i in range(2)
    ]
    frame = rs.compare_networks(paths, layers="0")
    assert frame.set_index(["group_a", "group_b"])["n_pairs"]["one", "other"] == 4


def test_the_command_prints_the_table(runs, capsys):
    arguments = ["compare", *map(str, runs), "--layers", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "procrustes_distance" in out
    assert "ratio" in out
    assert main([*arguments, "--format", "json", "--metric", "linear_cka"]) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = rs.compare_networks(runs, layers="2", metric="linear_cka")
    assert [row["mean"] for row in rows] == pytest.approx(expected["mean"].tolist())
    assert main(["compare", *map(str, runs[:3])]) == 2
    assert "at least 2" in capsys.readouterr().err
