"""The stores of the ranks of one job, read as one run."""

from __future__ import annotations

import math
import pickle

import pandas as pd
import pytest
import torch

import repscope as rs
from repscope import Moments, store
from repscope.analysis import accuracy_matrix, measure
from repscope.cli import main
from repscope.errors import (
    NonFiniteError,
    ShardMismatch,
    UnknownName,
    UntrustedStore,
    UsageError,
)
from repscope.snapshot import Snapshot

WORLD = 3


def rows(rank, step, n=4):
    g = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(n, 5, generator=g) + 1e3


def seen(rank, step, *, tags=(), **streams):
    """Return what a rank records at a step; rank r has r rows more than rank 0."""
    X = rows(rank, step, 4 + rank)
    return Snapshot(
        step,
        {
            ("outputs", "fc"): X,
            ("weights", "fc.weight"): torch.full((2, 5), float(10 * rank + step)),
            ("moments", "fc"): Moments().update(X).to_tensor(),
        }
        | streams,
        labels=torch.arange(len(X)) + 10 * rank,
        scalars={"loss": float(rank + step)},
        tags=tags,
    )


def facts(rank, world=WORLD):
    return {"seed": rank, "recorder": {"ranks": {"rank": rank, "world": world}}}


@pytest.fixture
def shard(tmp_path):
    """Return a function that writes the store of a rank."""
    made = []

    def write(rank, snapshots, *, world=WORLD, close=True, name=None, **meta):
        path = tmp_path / "job" / (name or f"rank-{rank}")
        writer = store.create(path, meta=facts(rank, world) | meta)
        made.append(writer)
        for snapshot in snapshots:
            writer.append(snapshot)
        (writer.close if close else writer.commit)()
        return writer

    yield write
    for writer in made:
        writer.abort()


@pytest.fixture
def job(shard, tmp_path):
    """Three ranks, of which the last was killed one step earlier."""
    for rank in range(WORLD):
        steps = (0, 10, 20) if rank < 2 else (0, 10)
        shard(rank, [seen(rank, s, tags=(f"at {s}",)) for s in steps])
    return tmp_path / "job"


def test_rows_and_labels_are_those_of_all_ranks_in_order(job):
    run = rs.open(job)
    expected = torch.cat([rows(rank, 10, 4 + rank) for rank in range(WORLD)])
    assert torch.equal(run.read("fc"), expected)  # the last step that all ranks have
    assert torch.equal(run.read("fc", tag="at 10"), expected)
    labels = [torch.arange(4 + rank) + 10 * rank for rank in range(WORLD)]
    assert torch.equal(run.labels(), torch.cat(labels))
    assert run.read("fc", 0).shape == (15, 5)
    assert run.shapes["outputs", "fc"] == (15, 5)
    with pytest.raises(UnknownName, match=r"step 20 .* recorded at steps 0, 10"):
        run.read("fc", 20)
    assert run.labels(20) is None


def test_the_rest_is_as_the_target_has_it(job):
    run = rs.open(job)
    assert run.read("fc.weight", 20, target="weights").tolist() == [[20.0] * 5] * 2
    every = torch.cat([rows(rank, 10, 4 + rank) for rank in range(WORLD)])
    torch.testing.assert_close(run.moments("fc").covariance(), rs.covariance(every))
    assert run.moments("fc").count == 15
    assert run.shapes["moments", "fc"] == (5, 5)
    assert run.scalars()["loss"].to_dict() == {0: 1.0, 10: 11.0}
    assert run.meta["seed"] == 0
    assert run.tags == {"at 0": 0, "at 10": 10}  # that of step 20 is not whole
    assert run.streams == rs.open(job / "rank-0").streams
    assert run.steps == [0, 10, 20]
    assert (run.layers, run.closed, run.progress) == (["fc"], True, 10)
    assert run.nbytes == sum(rs.open(rank).nbytes for rank in job.iterdir())


def test_series_and_snapshots_agree_with_read(job):
    run = rs.open(job)
    whole = torch.stack([run.read("fc", step) for step in (0, 10)])
    assert torch.equal(run.series("fc"), whole)
    assert torch.equal(
        run.series("fc", steps=[10], units=[1, 3])[0], whole[1][:, [1, 3]]
    )
    weights = run.series("fc.weight", target="weights", units=0)
    assert weights.tolist() == [[0.0] * 2, [10.0] * 2, [20.0] * 2]
    found = run.series("fc", target="moments", units=2)
    expected = [run.read("fc", step, target="moments")[:, 2] for step in (0, 10)]
    assert torch.equal(found, torch.stack(expected))
    first, second, third = run.snapshots()
    assert torch.equal(second.streams["outputs", "fc"], whole[1])
    assert torch.equal(second.labels, run.labels(10))
    assert (second.scalars, second.tags) == ({"loss": 11.0}, ("at 10",))
    assert set(third.streams) == {("weights", "fc.weight")}
    assert (third.labels, third.scalars) == (None, {})
    assert first.step == 0
    assert [s.step for s in run.snapshots(target="outputs")] == [0, 10]


def test_a_step_recorded_twice_is_paired_record_by_record(shard, tmp_path):
    for rank in range(2):
        again = Snapshot(5, {("outputs", "fc"): rows(rank, 7)}, tags=("again",))
        only = [Snapshot(5, {("outputs", "fc"): rows(rank, 8)})] if rank == 0 else []
        shard(rank, [seen(rank, 5, tags=("first",)), again, *only], world=2)
    run = rs.open(tmp_path / "job")
    both = torch.cat([rows(0, 7), rows(1, 7)])
    assert torch.equal(run.read("fc", 5), both)
    assert torch.equal(run.read("fc", tag="again"), both)
    first = torch.cat([rows(0, 5, 4), rows(1, 5, 5)])
    assert torch.equal(run.read("fc", tag="first"), first)
    assert len(list(run.snapshots())) == 2


def test_a_rewound_rank_shows_what_is_left(job):
    writer = store.reopen(job / "rank-1", at=0)
    writer.append(seen(1, 10))
    writer.close()
    assert rs.open(job).series("fc").shape == (2, 15, 5)
    store.reopen(job / "rank-1", at=0).close()
    assert rs.open(job).series("fc").shape == (1, 15, 5)


def test_a_scalar_of_some_ranks_is_the_mean_of_theirs(shard, tmp_path):
    for rank in range(2):
        scalars = {"loss": math.nan if rank else 1.0}
        if rank == 0:
            scalars |= {"accuracy/1": 0.75}
        shard(
            rank,
            [
                Snapshot(
                    3, {("weights", "w"): torch.ones(1)}, None, scalars, ("task-1",)
                )
            ],
            world=2,
        )
    run = rs.open(tmp_path / "job")
    assert run.scalars()["accuracy/1"].to_dict() == {3: 0.75}
    assert math.isnan(run.scalars()["loss"].item())
    assert accuracy_matrix(run).tolist() == [[0.75]]
    (snapshot,) = run.snapshots()
    assert snapshot.scalars["accuracy/1"] == 0.75


def test_a_layer_that_one_rank_never_has_is_not_there(shard, tmp_path):
    extra = {("outputs", "expert"): torch.ones(2, 2)}
    shard(0, [Snapshot(0, seen(0, 0).streams | extra)], world=2)
    shard(1, [seen(1, 0)], world=2)
    run = rs.open(tmp_path / "job")
    assert run.layers == ["fc"]
    with pytest.raises(UnknownName, match="no outputs of a layer 'expert'"):
        run.read("expert")


def test_measure_and_the_commands_take_them_as_one_run(job, capsys):
    run = rs.open(job)
    frame = measure([run, job], metrics=["effective_rank", "class_cosine"])
    at = frame[(frame["step"] == 10) & (frame["metric"] == "effective_rank")]
    expected = float(rs.spectrum(run.read("fc", 10)).effective_rank)
    assert at["value"].tolist() == pytest.approx([expected] * 4)  # outputs and moments
    assert set(at["n_samples"]) == {15}
    assert set(frame["run"]) == {"job"}
    pd.testing.assert_frame_equal(
        measure([run, job], metrics=["trace"], jobs=2),
        measure([run, job], metrics=["trace"]),
    )
    assert main(["info", str(job)]) == 0
    assert "15 x 5" in capsys.readouterr().out
    assert main(["metrics", str(job), "--metric", "trace", "--format", "csv"]) == 0
    assert "job,unknown,0,,10,fc,moments,trace," in capsys.readouterr().out
    file = job.parent / "x.svg"
    assert main(["plot", "spectrum", str(job), "--out", str(file)]) == 0
    assert repr(run).endswith("job', 3 streams, 3 steps (0 to 20), closed)")
    assert "15 &times; 5" in run._repr_html_()


def test_it_pickles_as_its_path(job):
    run = rs.open(job)
    copy = pickle.loads(pickle.dumps(run))
    assert torch.equal(copy.read("fc"), run.read("fc"))


def test_ranks_that_are_still_recording(shard, tmp_path):
    writers = [shard(rank, [seen(rank, 0)], world=2, close=False) for rank in range(2)]
    run = rs.open(tmp_path / "job")
    assert (run.steps, run.closed) == ([0], False)
    for writer, rank in zip(writers, range(2), strict=True):
        assert run.refresh().series("fc").shape == (1, 9, 5)
        writer.append(seen(rank, 1))
        writer.commit()
    assert run.refresh().series("fc").shape == (2, 9, 5)
    writers[0].close()
    assert not run.refresh().closed
    writers[1].close()
    assert run.refresh().closed


@pytest.mark.parametrize("trust", ["default", "untrusted"])
def test_packed_ranks_and_ranks_of_strangers(job, trust):
    expected = rs.open(job).read("fc")
    packed = job.parent / "packed"
    packed.mkdir()
    for rank in range(WORLD):
        store.pack(job / f"rank-{rank}", packed / f"rank-{rank}.h5")
    for folder in (job, packed):
        run = rs.open(folder, trust=trust)
        assert torch.equal(run.read("fc"), expected)
        assert torch.equal(pickle.loads(pickle.dumps(run)).read("fc"), expected)


def test_a_rank_that_becomes_one_file(shard, tmp_path):
    writers = [
        shard(rank, [seen(rank, 0)], world=2, name=f"rank-{rank}.h5", close=False)
        for rank in range(2)
    ]
    assert rs.open(tmp_path / "job").read("fc").shape == (9, 5)
    writers[0].close()
    assert rs.open(tmp_path / "job").read("fc").shape == (9, 5)


def test_a_link_among_the_ranks_of_a_stranger_is_refused(job):
    (job / "rank-1").rename(job.parent / "elsewhere")
    (job / "rank-1").symlink_to(job.parent / "elsewhere")
    assert rs.open(job).read("fc").shape == (15, 5)
    with pytest.raises(UntrustedStore, match="rank-1"):
        rs.open(job, trust="untrusted")


def test_rows_per_label_that_differ_over_ranks_have_no_label(shard, tmp_path):
    for rank in range(2):
        streams = {
            ("outputs", "tokens"): torch.randn(4 * (2 + rank), 3),
            ("outputs", "head"): torch.randn(4, 3),
        }
        labels = torch.arange(4) % 2
        unlabelled = ["noted"] if rank else []
        shard(rank, [Snapshot(0, streams, labels)], world=2, unlabelled=unlabelled)
    frame = measure(tmp_path / "job", metrics=["class_cosine"])
    assert frame["layer"].tolist() == ["head"]
    run = rs.open(tmp_path / "job")
    assert run.meta["unlabelled"] == ["noted"]
    list(run.snapshots())
    assert run.meta["unlabelled"] == ["noted", "tokens"]


def test_examples_are_numbered_over_all_ranks(shard, tmp_path):
    own = {0: [0, 0, 1, 3], 1: [0, 2, 2, 2, 1]}
    for rank in range(2):
        streams = {
            ("outputs", "fc"): torch.randn(len(own[rank]), 3),
            ("examples", "outputs:fc"): torch.tensor(own[rank]),
            ("outputs", "some"): torch.randn(4 - rank, 3),
        }
        if rank:
            streams["examples", "outputs:some"] = torch.tensor([0, 0, 1])
        shard(rank, [Snapshot(0, streams, torch.arange(4 - rank))], world=2)
    run = rs.open(tmp_path / "job")
    expected = [0, 0, 1, 3, 4, 6, 6, 6, 5]
    assert run.read("outputs:fc", target="examples").tolist() == expected
    assert run.series("outputs:fc", target="examples").tolist() == [expected]
    (snapshot,) = run.snapshots()
    assert snapshot.streams["examples", "outputs:fc"].tolist() == expected
    assert run.meta["unlabelled"] == ["some"]  # of which one rank has no examples


def test_examples_without_labels_keep_the_numbers_of_their_rank(shard, tmp_path):
    for rank in range(2):
        streams = {
            ("outputs", "fc"): torch.randn(2, 3),
            ("examples", "outputs:fc"): torch.tensor([0, 2]),
        }
        shard(rank, [Snapshot(0, streams)], world=2)
    run = rs.open(tmp_path / "job")
    assert run.read("outputs:fc", target="examples").tolist() == [0, 2, 0, 2]
    list(run.snapshots())
    assert "unlabelled" not in run.meta


def test_moments_of_a_rank_that_diverged_are_nan_with_a_note(shard, tmp_path):
    fine = Moments().update(rows(0, 0)).to_tensor()
    for rank, t in enumerate((fine, torch.full_like(fine, math.nan))):
        shard(rank, [Snapshot(0, {("moments", "fc"): t})], world=2)
    run = rs.open(tmp_path / "job")
    with pytest.raises(NonFiniteError):
        run.moments("fc")
    frame = measure(run, metrics=["trace"])
    assert frame["value"].isna().all()
    assert "not finite" in frame["note"].item()


def test_a_series_of_unequal_steps_says_so(shard, tmp_path):
    for rank in range(2):
        more = Snapshot(1, {("outputs", "fc"): rows(rank, 1, 9)})
        shard(rank, [seen(rank, 0), more], world=2)
    with pytest.raises(UsageError, match="a series has one shape"):
        rs.open(tmp_path / "job").series("fc")


# -- what does not belong together --------------------------------------------
def test_a_missing_rank_is_named(job):
    (job / "rank-1").rename(job.parent / "elsewhere")
    with pytest.raises(ShardMismatch, match="no store of rank 1 of 3: put rank-1 back"):
        rs.open(job)
    (job / "rank-0").rename(job.parent / "elsewhere too")
    with pytest.raises(ShardMismatch, match=r"rank 0 of 3 \(and 1 more\)"):
        measure(job)
    assert main(["info", str(job)]) == 3
    assert rs.open(job / "rank-2").steps == [0, 10]


def test_ranks_of_different_jobs_are_told_apart(shard, tmp_path):
    shard(0, [seen(0, 0)], world=2)
    shard(1, [seen(1, 0)], world=4)
    words = "rank-0 is of a job of 2 ranks, rank-1 of one of 4"
    with pytest.raises(ShardMismatch, match=words):
        rs.open(tmp_path / "job")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"recorder": None},
        {"recorder": {"ranks": "reduce"}},
        {"recorder": {"ranks": {"rank": 0}}},
        {"recorder": {"ranks": {"rank": 2, "world": 2}}},
    ],
)
def test_a_store_that_does_not_say_its_rank_is_refused(tmp_path, said):
    store.create(tmp_path / "job" / "rank-0", meta=said).close()
    with pytest.raises(ShardMismatch, match="rank-0 does not say which rank"):
        rs.open(tmp_path / "job")


def test_a_renamed_rank_is_refused(job):
    (job / "rank-2").rename(job / "rank-7")
    with pytest.raises(ShardMismatch, match="rank-7 was recorded by rank 2"):
        rs.open(job)


def test_a_rank_that_is_there_twice_is_refused(job):
    store.pack(job / "rank-1", job / "rank-1.h5")
    with pytest.raises(
        ShardMismatch, match=r"rank 1 twice, as rank-1 and as rank-1.h5"
    ):
        rs.open(job)


def test_rows_of_unequal_width_are_refused(shard, tmp_path):
    shard(0, [seen(0, 0)], world=2)
    shard(1, [Snapshot(0, {("outputs", "fc"): torch.ones(4, 6)})], world=2)
    with pytest.raises(ShardMismatch, match="rank 1 recorded outputs of layer 'fc' as"):
        rs.open(tmp_path / "job")
