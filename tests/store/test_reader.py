"""What a run tells about itself, and how it answers wrong questions."""

from __future__ import annotations

import pickle

import pytest
import torch

from repscope import Moments, store
from repscope.errors import NonFiniteError, UnknownName, UsageError
from repscope.snapshot import Snapshot


@pytest.fixture
def run(create, snapshot):
    """Steps 0, 10, ..., 40; weights without outputs at 50; step 20 recorded twice."""
    w = create(seed=3)
    for step in (0, 10, 20, 30, 40):
        w.append(snapshot(step, tags=("half",) if step == 20 else ()))
    w.commit()
    w.append(Snapshot(50, {("weights", "fc2.weight"): torch.zeros(3, 5)}))
    w.append(
        Snapshot(
            20,
            {("outputs", "fc1"): torch.full((1, 5), 2.0)},
            labels=torch.tensor([9]),
            tags=("again", "late"),
        )
    )
    w.close()
    return store.open(w.path)


def test_the_table_of_contents(run, snapshot):
    assert run.layers == ["fc1", "fc2"]
    assert run.targets == ["outputs", "weights"]
    assert run.streams == [
        ("outputs", "fc1"),
        ("outputs", "fc2"),
        ("weights", "fc2.weight"),
    ]
    assert run.steps == [0, 10, 20, 30, 40, 50]
    assert run.tags == {"half": 20, "again": 20, "late": 20}
    assert run.shapes == {
        ("outputs", "fc1"): (1, 5),  # the latest record, of step 20
        ("outputs", "fc2"): (6, 3),
        ("weights", "fc2.weight"): (3, 5),
    }
    assert run.meta == {"seed": 3}
    segments = (run.path / "segments").iterdir()
    assert run.nbytes == sum(file.stat().st_size for file in segments)
    assert run.closed


def test_last_is_the_last_step_that_has_the_stream(run, snapshot):
    assert torch.equal(run.read("fc1"), snapshot(40).streams["outputs", "fc1"])
    assert run.read("fc2.weight", target="weights").abs().sum() == 0
    assert torch.equal(run.labels(), snapshot(40).labels)


def test_a_step_recorded_twice(run, snapshot):
    assert run.read("fc1", 20).tolist() == [[2.0] * 5]
    first = snapshot(20).streams
    assert torch.equal(run.read("fc1", tag="half"), first["outputs", "fc1"])
    assert run.read("fc1", tag="late").tolist() == [[2.0] * 5]
    # of the two records of step 20 only the first has this stream
    assert torch.equal(run.read("fc2", 20), first["outputs", "fc2"])
    assert run.labels(20).tolist() == [9]
    assert torch.equal(run.labels(tag="half"), snapshot(20).labels)
    assert run.labels(50) is None
    assert [s.step for s in run.snapshots()] == [0, 10, 20, 30, 40, 50, 20]
    assert [s.tags for s in run.snapshots()][2::4] == [("half",), ("again", "late")]


def test_snapshots_of_some_streams(run):
    only = list(run.snapshots(target="outputs", layers=["fc2"]))
    assert [s.step for s in only] == [0, 10, 20, 30, 40]
    assert all(set(s.streams) == {("outputs", "fc2")} for s in only)
    assert all(set(s.scalars) == {"loss", "lr"} for s in only)
    assert len(list(run.snapshots(layers="fc1"))) == 6
    assert next(run.snapshots(target="weights")).step == 0


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda run: run.read("fc3"), "no outputs of a layer 'fc3'; did you mean 'fc"),
        (lambda run: run.read("fc1", target="weights"), "did you mean 'fc2.weight'"),
        (lambda run: run.read("fc1", target="output"), "did you mean 'outputs'"),
        (lambda run: run.read("y", target="labels"), "no target 'labels'"),
        (lambda run: run.read("fc1", 17), "no step 17.*steps 10, 20, 30 .of 6"),
        (lambda run: run.read("fc1", -2), "no step -2.*steps 0, 10, 20"),
        (lambda run: run.read("fc1", 50), "step 50 .* recorded at steps 20, 30, 40"),
        (lambda run: run.read("fc2", tag="again"), "tag 'again' .* no outputs"),
        (lambda run: run.read("fc1", tag="agian"), "did you mean 'again'"),
        (lambda run: run.labels(17), "no step 17"),
        (lambda run: run.labels(tag="x"), "no tag 'x'"),
        (lambda run: list(run.snapshots(target="weihgts")), "'weights'"),
        (lambda run: list(run.snapshots(layers=["fc1", "fc9"])), "no layer 'fc9'"),
    ],
)
def test_wrong_names_are_answered_with_right_ones(run, ask, words):
    with pytest.raises(UnknownName, match=words):
        ask(run)


def test_step_and_tag_together(run):
    with pytest.raises(UsageError, match="not by both"):
        run.read("fc1", 20, tag="half")


def test_a_run_without_streams(create):
    run = store.open(create().path)
    assert (run.layers, run.streams, run.steps, run.shapes) == ([], [], [], {})
    assert run.labels() is None
    assert list(run.snapshots()) == []
    with pytest.raises(UnknownName, match="holds no stream"):
        run.read("fc1")
    assert "0 streams" in repr(run)


def test_a_tag_used_again_means_the_latest(create):
    w = create()
    for value in (1.0, 2.0):
        w.append(
            Snapshot(5, {("outputs", "a"): torch.full((1, 1), value)}, tags=("t",))
        )
    w.close()
    run = store.open(w.path)
    assert run.read("a", tag="t").item() == 2.0
    assert [s.tags for s in run.snapshots()] == [("t",), ("t",)]


def test_reading_while_it_is_written(create, snapshot, same):
    w = create()
    run = store.open(w.path)
    for step in range(5):
        w.append(snapshot(step))
        assert run.refresh() is run
        assert run.steps == list(range(step))  # what is pending is not seen
        w.commit()
        assert run.refresh().steps == list(range(step + 1))
        same.tensor(run.read("fc1"), snapshot(step).streams["outputs", "fc1"])
    w.close()
    assert not run.closed
    assert run.refresh().closed


def test_a_run_pickles_as_its_path(run, same):
    data = pickle.dumps(run)
    assert len(data) < 300
    copy = pickle.loads(data)
    assert copy.path == run.path
    same.tensor(copy.read("fc1"), run.read("fc1"))


def test_it_shows_itself(run):
    assert repr(run).endswith("run', 3 streams, 6 steps (0 to 50), closed)")
    page = run._repr_html_()
    assert "fc2.weight" in page
    assert "3 &times; 5" in page
    assert "seed" in page


def test_the_page_is_short_and_safe_whatever_the_run(create):
    streams = {
        ("outputs", f"<script>alert({i})</script>{'x' * 500}"): torch.zeros(1, 1)
        for i in range(300)
    }
    w = create(**{f"<b>{i}": "<script>" * 1000 for i in range(200)})
    w.append(Snapshot(0, streams))
    w.close()
    page = store.open(w.path)._repr_html_()
    assert len(page.encode()) < 50_000
    assert "<script" not in page
    assert "<b>0" not in page
    assert "and 240 more streams" in page
    assert len(repr(store.open(w.path))) < 300


def test_moments_come_back_as_they_were_recorded(create):
    w, every = create(), []
    for step in (5, 10):
        every.append(Moments().update(torch.randn(20, 3) + step).to_tensor())
        streams = {("moments", "fc1"): every[-1], ("outputs", "fc2"): torch.ones(2, 2)}
        w.append(Snapshot(step, streams, tags=(f"at {step}",)))
    w.append(Snapshot(15, {("moments", "fc1"): torch.full((6, 3), torch.nan).double()}))
    w.close()
    run = store.open(w.path)
    assert torch.equal(run.moments("fc1", 10).to_tensor(), every[1])
    assert torch.equal(run.moments("fc1", tag="at 5").to_tensor(), every[0])
    assert torch.equal(run.read("fc1", 5, target="moments"), every[0])
    assert run.series("fc1", steps=[5, 10], target="moments").shape == (2, 6, 3)
    assert run.shapes["moments", "fc1"] == (3, 3)
    assert run.layers == ["fc2"]
    with pytest.raises(NonFiniteError, match="18 non-finite"):
        run.moments("fc1")
    for ask, words in {
        ("fc2",): "no moments of a layer 'fc2'; did you mean 'fc1'",
        ("fc1", 7): "no step 7; recorded nearest: steps 5, 10, 15",
    }.items():
        with pytest.raises(UnknownName, match=words):
            run.moments(*ask)


def test_a_run_without_moments_says_so(run):
    with pytest.raises(UnknownName, match="no target 'moments'; did you mean"):
        run.moments("fc1")
