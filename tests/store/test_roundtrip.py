"""What is written is read back, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repscope import store
from repscope.snapshot import Snapshot
from repscope.store import writer as writer_module
from repscope.store.index import STORED_AS


def bits(dtype, shape):
    """Return a tensor of random bits: NaN payloads and subnormals included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", STORED_AS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (7,), (2, 3, 4), (0, 3), (3, 0)], ids=str)
def test_rows_of_every_dtype_and_shape(create, same, dtype, shape):
    rows = bits(dtype, shape)
    w = create()
    w.append(Snapshot(0, {("outputs", "a"): rows.clone()}))
    w.close()
    run = store.open(w.path)
    same.tensor(run.read("a"), rows)
    assert run.shapes == {("outputs", "a"): shape}


@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (0, 5), (2, 1, 3, 3)], ids=str)
def test_a_parameter_keeps_its_shape(create, same, shape):
    w = create()
    weights = [torch.randn(shape) for _ in range(3)]
    for step, weight in enumerate(weights):
        w.append(Snapshot(step, {("weights", "p"): weight.clone()}))
    w.close()
    run = store.open(w.path)
    assert run.layers == []
    assert run.shapes["weights", "p"] == shape
    for step, weight in enumerate(weights):
        same.tensor(run.read("p", step, target="weights"), weight)


def test_many_steps_over_many_segments(create, snapshot, same, tiny):
    w = create()
    for step in range(200):
        w.append(snapshot(step, rows=step % 9))
    w.close()
    assert len(list((w.path / "segments").iterdir())) > 5
    run = store.open(w.path)
    assert run.steps == list(range(200))
    for step, seen in enumerate(run.snapshots()):
        same(seen, snapshot(step, rows=step % 9))
    for step in (199, 0, 77):
        same.tensor(
            run.read("fc1", step),
            snapshot(step, rows=step % 9).streams["outputs", "fc1"],
        )


def test_a_batch_larger_than_a_segment_is_one_frame(create, same, tiny):
    rows = torch.randn(40, 200)  # 32 kB: cut into rows
    weight = torch.randn(70, 50)  # 14 kB: not even one "row" fits
    wide = torch.randn(2, 3, 1000)  # 12 kB a row
    w = create()
    before = (w.path / "MANIFEST").read_bytes()
    w.append(
        Snapshot(
            4,
            {
                ("outputs", "a"): rows.clone(),
                ("weights", "w"): weight.clone(),
                ("inputs", "b"): wide.clone(),
            },
        )
    )
    w.commit()
    sizes = [file.stat().st_size for file in (w.path / "segments").iterdir()]
    assert len(sizes) >= 7
    # data stays below the limit; HDF5's own few kB come on top of a tiny one
    assert max(sizes) < 8192 + 4096
    assert (w.path / "MANIFEST").read_bytes()[len(before) :].count(b"RSF1") == 1
    run = store.open(w.path)
    same.tensor(run.read("a"), rows)
    same.tensor(run.read("w", target="weights"), weight)
    same.tensor(run.read("b", target="inputs"), wide)
    assert run.shapes == {
        ("outputs", "a"): (40, 200),
        ("weights", "w"): (70, 50),
        ("inputs", "b"): (2, 3, 1000),
    }
    assert w.acked_rows("outputs", "a") == 40
    assert w.acked_rows("weights", "w") == 1
    assert w.acked_rows("inputs", "b") == 2


def test_a_full_size_segment_stays_below_64_mib(create, same):
    w = create()
    rows = torch.randn(1 << 14, 1024)  # 64 MiB
    w.append(Snapshot(0, {("outputs", "a"): rows}))
    w.close()
    sizes = [file.stat().st_size for file in (w.path / "segments").iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 2**26
    same.tensor(store.open(w.path).read("a"), rows)


def test_views_and_graphs_are_written_as_they_look(create, same):
    base = torch.randn(6, 8, requires_grad=True)
    negative = torch.randn(3, 2, dtype=torch.complex64).conj().imag
    w = create()
    w.append(
        Snapshot(
            0,
            {
                ("outputs", "t"): base.t(),
                ("outputs", "s"): base[:, ::2] * 1,
                ("outputs", "n"): negative,
            },
        )
    )
    w.close()
    run = store.open(w.path)
    same.tensor(run.read("t"), base.detach().t().contiguous())
    same.tensor(run.read("s"), base.detach()[:, ::2].contiguous())
    same.tensor(run.read("n"), negative.resolve_neg().contiguous())
    assert not run.read("t").requires_grad


def test_read_returns_a_copy(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.close()
    run = store.open(w.path)
    run.read("fc1").zero_()
    assert run.read("fc1").abs().sum() > 0


def test_labels_of_a_probe_are_stored_once_a_segment(create, tiny):
    labels = torch.arange(7, 57)
    w = create()
    for step in range(60):
        w.append(Snapshot(step, {("outputs", "a"): torch.zeros(50, 1)}, labels + 0))
    w.append(Snapshot(60, {("outputs", "a"): torch.zeros(50, 1)}, labels + 1))
    w.append(Snapshot(61, {("outputs", "a"): torch.zeros(50, 1)}))
    w.close()
    run = store.open(w.path)
    stored = sum(f.read_bytes().count(labels.numpy().tobytes()) for f in files(w.path))
    assert stored == len(files(w.path)) == 2
    assert all(torch.equal(run.labels(step), labels) for step in range(60))
    assert torch.equal(run.labels(60), labels + 1)
    assert run.labels(61) is None
    assert torch.equal(run.labels(), labels + 1)


def files(path):
    return sorted((path / "segments").iterdir())


def test_scalars_merge_by_step_and_the_later_value_wins(create):
    w = create()
    w.append(Snapshot(2, {}, scalars={"loss": 2.0}))
    w.append(Snapshot(0, {}, scalars={"loss": torch.tensor(0.5), "acc": 1}))
    w.commit()
    w.append(Snapshot(2, {}, scalars={"acc": torch.tensor(7)}))
    w.append(Snapshot(2, {}, scalars={"loss": float("nan")}))
    w.append(Snapshot(0, {("outputs", "a"): torch.ones(1, 1)}))
    w.close()
    run = store.open(w.path)
    table = run.scalars()
    assert table.index.name == "step"
    assert table.index.tolist() == [0, 2]
    assert list(table.columns) == ["loss", "acc"]
    assert (table.dtypes == "float64").all()
    assert table["acc"].tolist() == [1.0, 7.0]
    assert table["loss"][0] == 0.5
    assert table["loss"].isna()[2]
    assert run.steps == [0]  # steps are those with streams


def test_scalars_of_a_run_without_any(create):
    table = store.open(create().path).scalars()
    assert table.shape == (0, 0)
    assert table.index.name == "step"


def test_mixed_scalar_dtypes_of_one_step(create):
    values = {
        "f": torch.tensor(0.1),
        "h": torch.tensor(0.5, dtype=torch.bfloat16),
        "d": torch.tensor([0.1], dtype=torch.float64),
        "i": torch.tensor(3),
        "b": torch.tensor(True),
        "p": 0.1,
    }
    w = create()
    w.append(Snapshot(0, {}, scalars=values))
    w.close()
    row = store.open(w.path).scalars().loc[0].to_dict()
    assert row == {name: float(value) for name, value in values.items()}


names = st.text(max_size=8)
tensors = st.tuples(
    st.sampled_from(list(STORED_AS)), st.integers(0, 5), st.integers(0, 4)
)


@st.composite
def runs(draw):
    """Draw snapshots of a few streams, each with one dtype and width."""
    streams = draw(
        st.dictionaries(
            st.tuples(st.sampled_from(["outputs", "weights", "other"]), names),
            tensors,
            max_size=4,
        )
    )
    out = []
    for _ in range(draw(st.integers(0, 6))):
        here = {}
        for key, (dtype, rows, width) in streams.items():
            if draw(st.booleans()):
                n = draw(st.integers(0, 5)) if key[0] == "outputs" else rows
                here[key] = bits(dtype, (n, width))
        labels = draw(st.none() | st.lists(st.integers(-9, 9), max_size=4))
        scalars = draw(st.dictionaries(names, st.floats(allow_nan=False), max_size=2))
        tags = tuple(draw(st.lists(names, max_size=2, unique=True)))
        out.append(
            Snapshot(
                draw(st.integers(0, 10**12)),
                here,
                None if labels is None else torch.tensor(labels, dtype=torch.int64),
                scalars,
                tags,
            )
        )
    return out, draw(st.lists(st.booleans(), min_size=len(out), max_size=len(out)))


@given(runs(), st.sampled_from([16, 100, 2**26]))
@settings(
    max_examples=150,
    deadline=None,
    # `same` is a function without state
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_run_survives_the_round_trip(same, run_and_commits, segment_bytes):
    snapshots, commits = run_and_commits
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "SEGMENT_BYTES", segment_bytes)
        w = store.create(Path(folder) / "run", meta={})
        try:
            for snapshot, commit in zip(snapshots, commits, strict=True):
                w.append(snapshot)
                if commit:
                    w.commit()
        finally:
            w.close()
        run = store.open(w.path)
        seen = list(run.snapshots())
        meant = [s for s in snapshots if s.streams]
        assert len(seen) == len(meant)
        for a, b in zip(seen, meant, strict=True):
            same(a, b)
        assert run.steps == sorted({s.step for s in meant})
        assert run.tags == {tag: s.step for s in snapshots for tag in s.tags}


def test_nothing_stays_open(create, snapshot):
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts descriptors under /proc")
    before = descriptors()
    w = create()
    for step in range(20):
        w.append(snapshot(step))
        w.commit()
    w.close()
    run = store.open(w.path)
    assert len(list(run.snapshots())) == 20
    run.scalars()
    assert descriptors() == before
    create("dropped").abort()
    assert descriptors() == before
