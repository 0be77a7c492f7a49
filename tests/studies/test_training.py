"""What the runs of a study share, what they record, and how they end."""

import dataclasses

import pytest
import torch

import repscope as rs
from repscope import errors, plots, store
from repscope.report.study import build
from repscope.studies import DATASETS, STUDIES, load, plan, sweep
from repscope.studies.data import Data
from repscope.studies.sweep import is_finished, run_one
from repscope.studies.training import accuracy

DATA = {"digits": load("digits")}


def configs(study, seed=0, **changes):
    return {
        config.optimizer: dataclasses.replace(config, **changes)
        for config in plan([study], seeds=[seed])
    }


def run(config, out):
    return rs.open(run_one(config, out=out, data=DATA).path)


def diverge_at(monkeypatch, step, *, optimizer, seeds):
    """Make the runs of some seeds end at an update, as a non-finite loss would."""
    from repscope.studies import training

    real = training.Session._update

    def failing(self, task, rows):
        config = self.config
        hit = config.optimizer == optimizer and config.seed in seeds
        if hit and self.recorder.step_number >= step:
            raise training.Diverged
        return real(self, task, rows)

    monkeypatch.setattr(training.Session, "_update", failing)


def test_all_optimizers_of_a_seed_start_from_the_same_network(tmp_path):
    starts = []
    for seed in (0, 1):
        for config in configs("pairs", seed, epochs=1).values():
            starts.append(run(config, tmp_path).read("hidden2", 0))
    assert all(torch.equal(start, starts[0]) for start in starts[:3])
    assert all(torch.equal(start, starts[3]) for start in starts[3:])
    assert not torch.equal(starts[0], starts[3])


def test_rows_come_in_the_same_order_also_after_an_early_stop(tmp_path, monkeypatch):
    from repscope.studies import training

    seen = []
    real = training.Session._update

    def noting(self, task, rows):
        seen[-1].append((task.name, tuple(rows.tolist())))
        return real(self, task, rows)

    monkeypatch.setattr(training.Session, "_update", noting)
    for patience in (1, 3):
        seen.append([])
        config = configs("permuted", epochs=2, eval_every=5, patience=patience)["sgd"]
        run(config, tmp_path)
    short, long = (
        [rows for name, rows in order if name == "permutation 2"] for order in seen
    )
    assert len(seen[0]) < len(seen[1])
    assert short == long[: len(short)]


def test_a_permuted_run_goes_back_to_its_best_weights(tmp_path):
    seen = run(configs("permuted", epochs=2)["sgd"], tmp_path)
    table = seen.scalars()
    ends = [seen.tags[f"task-{i}"] for i in (1, 2, 3)]
    for number, end in enumerate(ends, start=1):
        start = 0 if number == 1 else ends[number - 2]
        during = table[f"accuracy/{number}"].loc[start + 1 : end].dropna()
        assert table[f"accuracy/{number}"].loc[end] == during.max()
        assert table[f"capped/{number}"].loc[end] in (0.0, 1.0)
    assert table["loss"].notna().sum() == ends[-1]


def test_patience_ends_a_task_and_is_told_from_running_out(tmp_path):
    short = run(configs("permuted", epochs=1, eval_every=10)["adamw"], tmp_path)
    assert short.scalars()["capped/1"].dropna().item() == 1.0
    config = configs("permuted", epochs=20, eval_every=2, patience=1)["sgd"]
    stopped = run(config, tmp_path)
    assert stopped.scalars()["capped/1"].dropna().item() == 0.0
    assert stopped.tags["task-1"] < 20 * 41


def test_the_state_of_the_optimizer_is_kept_in_pairs_only(tmp_path, monkeypatch):
    from repscope.studies import training

    made = []
    real = training.make
    monkeypatch.setattr(
        training, "make", lambda *a, **k: made.append(a[0]) or real(*a, **k)
    )
    run(configs("pairs", epochs=1)["adam"], tmp_path)
    assert made == ["adam"]
    run(configs("permuted", epochs=1)["sgd"], tmp_path)
    assert made == ["adam"] + ["sgd"] * 4  # the first, and one a task


def test_own_pair_accuracy_lets_only_two_logits_compete():
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 2.0]])
    y = torch.tensor([2, 1])
    model = torch.nn.Identity()
    assert accuracy(model, logits, y) == 0.0
    assert accuracy(model, logits, y, classes=torch.tensor([1, 2])) == 1.0


def test_a_run_that_diverges_is_recorded_and_shown_as_diverged(tmp_path):
    stores = tmp_path / "stores"
    quick = configs("pairs", epochs=1)
    wild = dataclasses.replace(quick["sgd"], hyper={"lr": 1e30})
    seen = run(wild, stores)
    assert seen.closed
    assert "diverged" in seen.tags
    again = run_one(wild, out=stores, data=DATA)
    assert again.reused  # it is an outcome, not a failure
    for config in (quick["adam"], quick["shampoo"]):
        run(config, stores)
    outcome = build(tmp_path)
    (_, (_, rows), _), *_ = outcome.tables
    assert [row[:2] for row in rows] == [
        ["SGD", "1 (1 diverged)"],
        ["Adam", "1"],
        ["Shampoo", "1"],
    ]
    assert "1 diverged run(s) left out" in outcome.report.read_text()


@pytest.mark.parametrize(
    ("study", "step", "optimizer", "metric"),
    [
        ("pairs", 30, "shampoo", "class_cosine"),  # finite features, half-way
        ("sparsity", 5, "p-sgd", "accuracy_at_95"),  # before any pruned accuracy
    ],
)
def test_runs_that_diverged_are_counted_and_never_averaged(
    tmp_path, monkeypatch, study, step, optimizer, metric
):
    diverge_at(monkeypatch, step, optimizer=optimizer, seeds={1, 2})
    rivals = {"shampoo": "adam", "p-sgd": "sgd"}
    for seed in range(4):
        quick = configs(study, seed, epochs=1)
        for name in (optimizer, rivals[optimizer]):
            run(quick[name], tmp_path / "stores")
    outcome = build(tmp_path)
    judged = [j for j in outcome.judgements if j.claim.quantity.metric == metric]
    assert judged
    for judgement in judged:
        if judgement.claim.first == optimizer:
            assert (judgement.verdict, judgement.n) == ("not reported", 2)
            assert judgement.n_lost == 2
    (_, (_, rows), _), *_ = outcome.tables
    (row,) = [row for row in rows if row[0] == plots.display_name(optimizer)]
    assert row[1] == "4 (2 diverged)"


def test_a_study_in_which_everything_diverged_still_has_its_report(
    tmp_path, monkeypatch
):
    diverge_at(monkeypatch, 5, optimizer="sgd", seeds={0})
    run(configs("sparsity", epochs=1)["sgd"], tmp_path / "stores")
    said = []
    outcome = build(tmp_path, progress=said.append)
    (_, (_, rows), _), *_ = outcome.tables
    assert rows[0][:2] == ["SGD", "1 (1 diverged)"]
    assert sum("all 1 runs diverged" in text for text in said) == 2
    assert "Not drawn for study sparsity" in outcome.report.read_text()


@pytest.mark.parametrize("others", [[], ["adam"]])
def test_a_dead_network_is_named_and_stops_nothing(tmp_path, others):
    quick = configs("pairs", epochs=1)
    for name in others:
        run(quick[name], tmp_path / "stores")
    dead = dataclasses.replace(quick["sgd"], hyper={"lr": 1e6})
    seen = run(dead, tmp_path / "stores")
    assert not seen.read("hidden2").any()
    outcome = build(tmp_path)
    assert f"{seen.name} hidden2" in outcome.tables[0][2]
    page = outcome.report.read_text()
    if others:
        assert "Zero features, hence no cosine: SGD" in page
    else:
        assert "alignment (all features of hidden2 are zero in every run)" in page


def test_runs_on_other_files_are_not_reused(tmp_path):
    config = configs("pairs", epochs=1)["sgd"]
    run(config, tmp_path)
    one = DATA["digits"]
    flipped = dataclasses.replace(one, x_train=one.x_train.flip(1))
    with pytest.raises(errors.DataError, match="other digits files"):
        run_one(config, out=tmp_path, data={"digits": flipped})


def test_one_frozen_run_still_gives_its_numbers(tmp_path):
    """Regression values of one configuration and seed, not a claim about anything."""
    config = configs("pairs", 7, epochs=1, sizes=(64, 16, 12, 10))["shampoo"]
    seen = run(config, tmp_path)
    frame = rs.measure(seen, layers="hidden2")
    at = frame.set_index(["step", "metric"])["value"].groupby(level=[0, 1]).last()
    assert at[0, "effective_rank"] == pytest.approx(START_RANK, rel=1e-4)
    assert at[0, "class_cosine"] == pytest.approx(START_COSINE, rel=1e-4)
    # Other machines sum in another order, and 84 updates enlarge the difference.
    assert at[84, "effective_rank"] == pytest.approx(END_RANK, rel=0.02)
    assert at[84, "class_cosine"] == pytest.approx(END_COSINE, rel=0.02)


START_RANK, START_COSINE = 4.098845, 0.970286
END_RANK, END_COSINE = 3.370086, 0.969528


def test_a_sweep_yields_every_run_once_and_in_order(tmp_path):
    quick = list(configs("pairs", epochs=1).values())
    first = list(sweep(quick, tmp_path, jobs=2))
    assert [item.config for item in first] == quick
    assert not any(item.reused for item in first)
    assert all(is_finished(item.path) for item in first)
    again = list(sweep(quick, tmp_path))
    assert [(item.path, item.reused) for item in again] == [
        (item.path, True) for item in first
    ]


def test_an_unfinished_run_is_done_again_unless_someone_is_at_it(tmp_path):
    config = configs("pairs", epochs=1)["sgd"]
    writer = store.create(tmp_path / config.name, meta={})
    with pytest.raises(errors.StoreLocked):
        run(config, tmp_path)
    writer.commit()  # the other's store is as it was
    writer.abort()
    assert "task-5" in run(config, tmp_path).tags


def test_a_changed_setting_is_another_run():
    base = configs("pairs")["sgd"]
    assert base.key == configs("pairs")["sgd"].key
    others = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, hyper={"lr": 0.2}),
        dataclasses.replace(base, epochs=6),
    ]
    assert len({base.key, *(other.key for other in others)}) == 4


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"seeds": []}, errors.UsageError),
        ({"seeds": [1, 1]}, errors.UsageError),
        ({"seeds": [99, 100]}, errors.UsageError),
        ({"data": "minst"}, errors.UnknownName),
        ({"optimizers": ["lion"]}, errors.UnknownName),
    ],
)
def test_plans_that_make_no_sense_are_refused(arguments, error):
    with pytest.raises(error):
        plan(["pairs"], **arguments)
    with pytest.raises(errors.UnknownName, match="did you mean 'pairs'"):
        plan(["pair"])


@pytest.mark.parametrize("study", STUDIES)
def test_what_looks_like_mnist_is_treated_like_it(study):
    for name in set(DATASETS) - {"digits", "mnist"}:
        assert plan([study], data=name)[0].sizes == plan([study], data="mnist")[0].sizes


def test_no_finished_run_is_said_plainly(tmp_path):
    with pytest.raises(errors.DataError, match="has no finished runs"):
        build(tmp_path)


def test_data_is_a_value_of_its_own():
    assert isinstance(DATA["digits"], Data)
