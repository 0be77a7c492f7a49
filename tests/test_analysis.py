"""From stores to tables: every number is the one the plain functions give."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import repscope as rs
from repscope import errors, store
from repscope.analysis import (
    METRICS,
    accuracy_matrix,
    example_labels,
    measure,
    never_updated_weights,
    optimizer_of,
    sparsity_curves,
)
from repscope.metrics.spectra import SPECTRUM_METRICS
from repscope.metrics.weights import WEIGHT_METRICS
from repscope.report.figures import weight_histogram
from repscope.snapshot import Snapshot


def write(path, snapshots, **meta):
    writer = store.create(path, meta=meta)
    for snapshot in snapshots:
        writer.append(snapshot)
    writer.close()
    return path


def features(seed, n=40, d=6):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).relu()


LABELS = torch.arange(40) % 4


@pytest.fixture
def runs(tmp_path):
    paths = []
    for seed in range(2):
        snapshots = [
            Snapshot(
                step,
                {
                    ("outputs", "hidden1"): features(10 * seed + step),
                    ("outputs", "hidden2"): features(50 + 10 * seed + step, d=3),
                    ("weights", "linear.weight"): features(90 + seed, 5, 6) - 0.3,
                },
                LABELS,
            )
            for step in (0, 5)
        ]
        paths.append(
            write(tmp_path / f"r{seed}", snapshots, optimizer="sgd", seed=seed)
        )
    return paths


def value(frame, **where):
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    (found,) = frame["value"].tolist()
    return found


def test_the_table_is_tidy_and_holds_what_the_functions_say(runs):
    frame = measure(runs)
    assert list(frame.columns) == [
        "run", "optimizer", "seed", "task", "step", "layer", "target", "metric",
        "value", "n_samples", "note",
    ]  # fmt: skip
    X = features(15)
    at = {"run": "r1", "step": 5, "layer": "hidden1"}
    spectrum = rs.spectrum(X)
    for metric, expected in {
        "effective_rank": rs.effective_rank(spectrum),
        "participation_ratio": rs.participation_ratio(spectrum),
        "class_cosine": rs.cross_class_cosine(X, LABELS),
    }.items():
        assert value(frame, metric=metric, **at) == pytest.approx(
            float(expected), rel=1e-12
        )
    W = features(91, 5, 6) - 0.3
    at = {"run": "r1", "step": 0, "layer": "linear.weight"}
    assert value(frame, metric="hoyer_sparsity", **at) == pytest.approx(
        float(rs.hoyer_sparsity(W))
    )
    rows = frame[(frame["layer"] == "hidden2") & (frame["metric"] == "effective_rank")]
    assert rows["run"].tolist() == ["r0", "r0", "r1", "r1"]
    assert rows["step"].tolist() == [0, 5, 0, 5]
    assert set(rows["n_samples"]) == {40}
    assert set(frame["optimizer"]) == {"sgd"}
    assert set(frame["seed"]) == {0, 1}


def test_one_decomposition_per_matrix_size_for_all_layers_steps_and_runs(
    runs, monkeypatch
):
    calls = []
    real = torch.linalg.eigvalsh

    def counting(A, *rest, **options):
        calls.append(tuple(A.shape))
        return real(A, *rest, **options)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counting)
    measure(runs, metrics=["effective_rank"])
    assert sorted(calls) == [(4, 3, 3), (4, 6, 6)]


def test_metrics_and_layers_can_be_chosen(runs):
    frame = measure(runs[0], metrics="trace", layers="hidden*")
    assert set(frame["metric"]) == {"trace"}
    assert set(frame["layer"]) == {"hidden1", "hidden2"}
    frame = measure(rs.open(runs[0]), metrics=["class_cosine"], layers="hidden1")
    assert len(frame) == 2


def test_collapse_and_units_are_read_of_labelled_outputs(runs):
    frame = measure(runs[1])
    X = features(15)
    at = {"step": 5, "layer": "hidden1"}
    collapse = rs.neural_collapse(X, LABELS)
    for metric, expected in {
        "nc1": collapse.nc1,
        "cdnv": collapse.cdnv,
        "nc2_equinorm": collapse.nc2_equinorm,
        "nc2_equiangular": collapse.nc2_equiangular,
        "dormant_fraction": rs.dormant_fraction(X),
        "population_sparseness": rs.population_sparseness(X),
        "activation_overlap": rs.activation_overlap(X, LABELS).mean,
    }.items():
        assert value(frame, metric=metric, **at) == float(expected)
    assert not set(frame["metric"]) & {"linear_probe_accuracy", "nc3", "nc4"}


def test_units_are_read_of_outputs_only(tmp_path):
    streams = {(target, "h"): features(1) for target in ("inputs", "outputs")}
    frame = measure(write(tmp_path / "run", [Snapshot(0, streams, LABELS)]))
    rows = frame[frame["metric"].isin(["dormant_fraction", "nc1"])]
    assert rows["target"].tolist() == ["outputs", "outputs"]


def test_a_probe_is_fitted_where_it_is_asked_for(runs):
    frame = measure(runs[0], metrics="linear_probe_accuracy", layers="hidden*")
    expected = rs.linear_probe_accuracy(features(55, d=3), LABELS)
    assert value(frame, step=5, layer="hidden2") == float(expected)
    with pytest.raises(errors.UnknownName, match="did you mean 'linear_probe_acc"):
        measure(runs[0], metrics="linear_probe")


def test_readings_of_classes_and_units_say_why_they_are_nan(tmp_path):
    silent = features(1) + 0.1
    silent[:3] = 0
    streams = {
        "dead": torch.zeros(40, 3),
        "signed": features(2) - 1,
        "silent": silent,
        "diverged": features(3).index_fill(0, torch.tensor([3]), math.nan),
    }
    snapshot = Snapshot(
        0, {("outputs", name): X for name, X in streams.items()}, LABELS
    )
    frame = measure(write(tmp_path / "run", [snapshot]))

    def cell(layer, metric):
        row = frame[(frame["layer"] == layer) & (frame["metric"] == metric)]
        return row["value"].item(), row["note"].item()

    assert cell("dead", "dormant_fraction") == (
        1.0,
        "no active unit in 40 of 40 samples",
    )
    number, note = cell("dead", "nc1")
    assert math.isnan(number)
    assert note == "no within-class variance; no between-class variance"
    number, note = cell("signed", "population_sparseness")
    assert math.isnan(number)
    assert ">= 0" in note
    assert cell("signed", "dormant_fraction")[1] == ""
    number, note = cell("silent", "population_sparseness")
    assert 0 < number < 1
    assert note == "no active unit in 3 of 40 samples"
    for metric in ("nc1", "cdnv", "dormant_fraction", "activation_overlap"):
        number, note = cell("diverged", metric)
        assert math.isnan(number)
        assert "non-finite" in note


def test_worker_processes_change_nothing(runs):
    pd.testing.assert_frame_equal(measure(runs, jobs=2), measure(runs))


def test_small_batches_change_nothing(runs, monkeypatch):
    whole = measure(runs)
    monkeypatch.setattr("repscope.analysis._BATCH_BYTES", 1)
    pd.testing.assert_frame_equal(measure(runs), whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"metrics": ["effective_rnak"]}, errors.UnknownName, "'effective_rank'"),
        ({"layers": "hiden1"}, errors.UnknownLayer, "'hidden1'"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(runs, call, error, message):
    with pytest.raises(error, match=message):
        measure(runs, **call)


def test_no_run_is_refused():
    with pytest.raises(errors.UsageError, match="at least one store"):
        measure([])


def test_what_has_no_meaning_is_nan_with_a_note(tmp_path):
    bad = features(0)
    bad[3, 1] = math.nan
    streams = {
        "diverged": bad,
        "constant": torch.full((40, 3), 2.0),
        "single": features(1, 1),
        "few": features(2, 10),
    }
    path = write(
        tmp_path / "run",
        [
            Snapshot(0, {("outputs", name): X}, torch.zeros(len(X), dtype=torch.long))
            for name, X in streams.items()
        ],
    )
    frame = measure(path, metrics=["effective_rank", "class_cosine"])

    def cell(layer, metric):
        row = frame[(frame["layer"] == layer) & (frame["metric"] == metric)]
        return row["value"].item(), row["note"].item()

    number, note = cell("diverged", "effective_rank")
    assert math.isnan(number)
    assert "not finite" in note
    number, note = cell("diverged", "class_cosine")
    assert math.isnan(number)
    assert "non-finite" in note
    assert cell("constant", "effective_rank") == (0.0, "degenerate: constant")
    assert "fewer than 2 rows" in cell("single", "effective_rank")[1]
    assert "n_samples < 5 n_features" in cell("few", "effective_rank")[1]
    assert math.isnan(cell("few", "class_cosine")[0])  # one class


def test_accuracies_make_the_matrix_and_its_readings(tmp_path):
    rows = [[0.9, 0.1], [0.6, 0.8]]
    path = write(
        tmp_path / "run",
        [
            Snapshot(
                10 * i,
                {("weights", "w"): torch.ones(2, 2)},
                scalars={f"accuracy/{j}": a for j, a in enumerate(row, start=1)},
                tags=(f"task-{i}",),
            )
            for i, row in enumerate(rows, start=1)
        ],
    )
    run = rs.open(path)
    assert accuracy_matrix(run).tolist() == rows
    frame = measure(run)
    for metric, expected in {
        "average_accuracy": 0.7,
        "learning_accuracy": 0.85,
        "forgetting": 0.3,
        "backward_transfer": -0.3,
        "old_task_accuracy": 0.6,
        "last_task_accuracy": 0.8,
    }.items():
        assert value(frame, metric=metric) == pytest.approx(expected)


def test_an_unfinished_sequence_is_nan_and_says_so(tmp_path):
    path = write(
        tmp_path / "run",
        [
            Snapshot(
                5,
                {("weights", "w"): torch.ones(2, 2)},
                scalars={"accuracy/1": 0.9, "accuracy/2": 0.1},
                tags=("task-1",),
            ),
            Snapshot(
                8,
                {("weights", "w"): torch.full((2, 2), math.nan)},
                scalars={"diverged": 1.0},
                tags=("diverged",),
            ),
        ],
    )
    frame = measure(path, metrics=["average_accuracy"])
    assert math.isnan(frame["value"].item())
    assert "diverged" in frame["note"].item()


def test_pruned_accuracies_make_curves_and_their_readings(tmp_path):
    scores = {"0.0000": 0.9, "0.9000": 0.7, "0.9500": 0.4}
    path = write(
        tmp_path / "run",
        [Snapshot(1, {}, scalars={f"pruned/global/{s}": a for s, a in scores.items()})],
    )
    curve = sparsity_curves(rs.open(path))["global"]
    assert curve.sparsity.tolist() == [0.0, 0.9, 0.95]
    assert curve.score.tolist() == [0.9, 0.7, 0.4]
    frame = measure(path)
    assert value(frame, metric="accuracy_at_90", layer="global") == 0.7
    assert value(frame, metric="accuracy_at_95", layer="global") == 0.4


def test_stores_without_such_scalars_have_no_such_readings(runs):
    run = rs.open(runs[0])
    assert accuracy_matrix(run) is None
    assert sparsity_curves(run) == {}


def test_token_rows_take_the_label_of_their_example(tmp_path):
    streams = {
        ("outputs", "tokens"): torch.ones(6, 3),
        ("outputs", "odd"): torch.ones(5, 3),
        ("outputs", "time_first"): torch.ones(6, 3),
    }
    snapshot = Snapshot(0, streams, torch.tensor([4, 7]))
    run = rs.open(write(tmp_path / "run", [snapshot], unlabelled=["time_first"]))
    assert example_labels(run, snapshot, "tokens").tolist() == [4, 4, 4, 7, 7, 7]
    assert example_labels(run, snapshot, "odd") is None
    assert example_labels(run, snapshot, "time_first") is None
    assert example_labels(run, Snapshot(0, streams), "tokens") is None


def test_too_few_examples_are_noted_however_many_rows_they_have(tmp_path):
    rows = features(0, 40)  # of width 6, and 30 rows would be enough
    whose = torch.arange(40).div(8, rounding_mode="floor")
    streams = {
        ("outputs", "tokens"): rows,
        ("inputs", "fc"): rows,
        ("outputs", "masked"): rows[:38],
        ("examples", "outputs:masked"): whose[:38],
        ("outputs", "known"): rows[:30],
    }
    snapshots = [
        Snapshot(0, streams, torch.arange(10)),
        Snapshot(1, {("outputs", "tokens"): rows}, torch.arange(40)),
        Snapshot(2, {("outputs", "tokens"): rows}),
    ]
    frame = measure(write(tmp_path / "run", snapshots), metrics=["effective_rank"])
    notes = frame.set_index(["step", "target", "layer"])["note"].to_dict()
    assert notes == {
        (0, "outputs", "tokens"): "10 examples < 5 n_features",
        (0, "inputs", "fc"): "10 examples < 5 n_features",
        (0, "outputs", "masked"): "5 examples < 5 n_features",
        (0, "outputs", "known"): "10 examples < 5 n_features",
        (1, "outputs", "tokens"): "",
        (2, "outputs", "tokens"): "",
    }


def test_the_optimizer_is_named_by_the_user_or_by_its_class(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for name, meta in {"a": {}, "b": {"optimizer": "mine"}}.items():
        rs.Recorder(model, tmp_path / name, optimizer=optimizer, meta=meta).close()
    rs.Recorder(model, tmp_path / "c").close()
    named = [optimizer_of(rs.open(tmp_path / name)) for name in "abc"]
    assert named == ["adamw", "mine", "unknown"]


def test_the_list_of_metrics_has_no_name_twice():
    assert len(set(METRICS)) == len(METRICS)


# -- moments ------------------------------------------------------------------
def streamed(path, streams, **meta):
    """Write a store of moments, one record a stream."""
    snapshots = [
        Snapshot(step, {("moments", name): t})
        for step, (name, t) in enumerate(streams.items())
    ]
    return write(path, snapshots, **meta)


def test_moments_are_measured_as_their_rows_are(tmp_path, monkeypatch):
    calls = []
    real = torch.linalg.eigvalsh
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda C: calls.append(C.shape) or real(C)
    )
    rows = {"fc": features(1), "wide": features(2, 4), "constant": torch.ones(9, 6)}
    snapshot = Snapshot(
        3,
        {("outputs", name): X for name, X in rows.items()}
        | {
            ("moments", name): rs.Moments().update(X).to_tensor()
            for name, X in rows.items()
        },
    )
    path = write(tmp_path / "run", [snapshot])
    frame = measure(path, metrics=list(SPECTRUM_METRICS))
    assert sorted(calls) == [(1, 4, 4), (5, 6, 6)]
    by_target = {
        target: part.drop(columns="target").reset_index(drop=True)
        for target, part in frame.groupby("target")
    }
    pd.testing.assert_frame_equal(
        by_target["moments"], by_target["outputs"], rtol=1e-10
    )
    at = frame[frame["layer"] == "wide"]
    assert set(at["n_samples"]) == {4}
    assert set(at["note"]) == {"n_samples < 5 n_features"}


@pytest.mark.parametrize("metric", ["effective_rank", "trace"])
def test_one_bad_stream_spoils_no_other(tmp_path, metric):
    streams = {
        "fine": features(1),
        "diverged": features(2).index_fill(0, torch.tensor([3]), math.inf),
        "huge": features(3).double() * 1e200,
        "fine too": features(4),
    }
    snapshot = Snapshot(0, {("outputs", name): X for name, X in streams.items()})
    frame = measure(write(tmp_path / "run", [snapshot]), metrics=[metric])
    assert frame["layer"].tolist() == list(streams)
    assert frame["value"].isna().tolist() == [False, True, True, False]
    assert "not finite" in frame["note"][1]
    assert "leave the float64 range" in frame["note"][2]
    alone = rs.spectrum(streams["fine too"])
    expected = (
        alone.effective_rank if metric == "effective_rank" else alone.eigenvalues.sum()
    )
    assert frame["value"][3] == pytest.approx(float(expected), rel=1e-5)


def test_moments_without_a_spectrum_are_nan_with_a_note(tmp_path):
    fine = rs.Moments().update(features(1)).to_tensor()
    diverged = fine.clone()
    diverged[3:] = math.nan
    path = streamed(
        tmp_path / "run",
        {
            "one row": rs.Moments().update(features(1, 1)).to_tensor(),
            "diverged": diverged,
            "nothing but NaN": torch.full_like(fine, math.nan),
            "something else": torch.full((3, 2), 5.0),
        },
    )
    frame = measure(path, metrics=["trace"])
    assert frame["value"].isna().all()
    assert frame["n_samples"].tolist() == [1, 40, 0, 5]
    assert ["no spectrum" in note for note in frame["note"]] == [True] * 3 + [False]
    assert "n_features + 3, n_features" in frame["note"].tolist()[3]


# -- weights that were never updated ------------------------------------------
def trained(path, optimizer, *, capture=("weights",), frozen=False):
    """Record a training on inputs of which the first two are always 0."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].requires_grad_(not frozen)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with rs.Recorder(model, path, every=1, capture=capture, optimizer=optimizer) as rec:
        for _ in range(3):
            x = torch.randn(20, 5)
            x[:, :2] = 0
            loss = (model(x) - x[:, 2:]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(loss=loss)
    return model[0].weight.detach().clone()


DARK = torch.arange(5).expand(4, 5) < 2


def test_readings_of_weights_leave_out_what_was_never_updated(tmp_path):
    W = trained(tmp_path / "run", torch.optim.SGD)
    frame = measure(tmp_path / "run", metrics=["hoyer_sparsity", "weight_rms"])
    at = {"step": 3, "layer": "0.weight"}
    for metric in ("hoyer_sparsity", "weight_rms"):
        expected = WEIGHT_METRICS[metric](W, exclude=DARK)
        assert value(frame, metric=metric, **at) == pytest.approx(float(expected))
        assert expected != WEIGHT_METRICS[metric](W)
    noted = frame[frame["layer"] == "0.weight"]["note"]
    assert set(noted) == {"8 of 20 weights never updated, left out"}
    assert set(frame[frame["layer"] != "0.weight"]["note"]) == {""}
    masks = never_updated_weights(rs.open(tmp_path / "run"))
    assert masks.keys() == {"0.weight"}
    assert torch.equal(masks["0.weight"], DARK)


def test_under_weight_decay_adams_second_moment_finds_them(tmp_path):
    trained(tmp_path / "plain", torch.optim.AdamW)
    assert never_updated_weights(rs.open(tmp_path / "plain")) == {}
    both = ("weights", "optimizer_state")
    trained(tmp_path / "state", torch.optim.AdamW, capture=both)
    run = rs.open(tmp_path / "state")
    masks = never_updated_weights(run)
    assert torch.equal(masks["0.weight"], DARK)
    assert never_updated_weights(run, ["2.weight"]) == {}


def test_a_frozen_layer_is_read_whole(tmp_path, runs):
    trained(tmp_path / "run", torch.optim.SGD, frozen=True)
    masks = never_updated_weights(rs.open(tmp_path / "run"))
    assert masks.keys() == {"0.weight"}
    assert never_updated_weights(rs.open(runs[0])) == {}
    path = write(tmp_path / "bare", [Snapshot(0, {("outputs", "a"): features(0)})])
    assert never_updated_weights(rs.open(path)) == {}


def test_the_histogram_of_a_report_leaves_them_out_and_says_so(tmp_path):
    trained(tmp_path / "sgd", torch.optim.SGD)
    trained(tmp_path / "adam", torch.optim.AdamW)
    runs = {name: [rs.open(tmp_path / name)] for name in ("sgd", "adam")}
    drawn = weight_histogram(runs, None)
    assert drawn.caption.endswith("never updated are left out: 8 (sgd).")
    drawn = weight_histogram({"adam": runs["adam"]}, None)
    assert drawn.caption.endswith("equal edges for all.")
