"""The writer: what it refuses, when it commits, and who may use it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from repscope import store
from repscope.errors import (
    ClosedStore,
    DtypeChanged,
    ShapeChanged,
    StoreExists,
    StoreLocked,
    UnsupportedOutput,
    UsageError,
)
from repscope.snapshot import Snapshot
from repscope.store import files
from repscope.store import writer as writer_module


def outputs(step, tensor, **rest):
    return Snapshot(step, {("outputs", "a"): tensor}, **rest)


# -- create ------------------------------------------------------------------
def test_parents_are_made_and_meta_is_kept(create):
    meta = {
        "seed": np.int64(3),
        "lr": torch.tensor(0.5),
        "loss": float("nan"),
        "tags": ("a", "b"),
        "nested": {"deep": [True, None, np.float32(0.5)]},
        "ünïcode": "\ud800",
    }
    w = create("deep/er/run", **meta)
    run = store.open(w.path)
    assert np.isnan(run.meta.pop("loss"))
    assert {k: v for k, v in run.meta.items() if k != "loss"} == {
        "seed": 3,
        "lr": 0.5,
        "tags": ["a", "b"],
        "nested": {"deep": [True, None, 0.5]},
        "ünïcode": "\ud800",
    }
    assert run.name == "run"


@pytest.mark.parametrize("kind", ["store", "directory", "file", "dangling link"])
def test_whatever_is_there_stays_untouched(create, tmp_path, kind):
    path = tmp_path / "run"
    if kind == "store":
        create("run", seed=1).close()
    elif kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("thesis")
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = (
        sorted(tmp_path.rglob("*")),
        [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()],
    )
    with pytest.raises(StoreExists, match="left untouched"):
        store.create(path, meta={})
    after = (
        sorted(tmp_path.rglob("*")),
        [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()],
    )
    assert after == before


def test_a_file_where_a_parent_should_be(tmp_path):
    (tmp_path / "runs").write_text("thesis")
    with pytest.raises(StoreExists, match=r"/runs exists already"):
        store.create(tmp_path / "runs" / "a", meta={})
    assert (tmp_path / "runs").read_text() == "thesis"


def test_the_second_of_two_writers_is_refused_and_the_first_unharmed(create, snapshot):
    w = create()
    with pytest.raises(StoreLocked):
        store.create(w.path, meta={})
    w.append(snapshot(1))
    w.close()
    assert store.open(w.path).steps == [1]


def test_read_only_parent(tmp_path):
    parent = tmp_path / "readonly"
    parent.mkdir()
    parent.chmod(0o555)
    # root may write anywhere, so be somebody else while trying
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            store.create(parent / "run", meta={})
    finally:
        if root:
            os.seteuid(0)
    assert not list(parent.iterdir())


@pytest.mark.parametrize(
    "value",
    [object(), b"bytes", torch.ones(2), np.ones(2), 1j, {(1, 2): 3}, {1, 2}],
    ids=lambda value: type(value).__name__,
)
def test_meta_that_is_no_json_is_refused_before_anything_is_written(
    create, tmp_path, value
):
    with pytest.raises(UsageError, match="'odd'"):
        store.create(tmp_path / "refused", meta={"odd": value})
    assert not (tmp_path / "refused").exists()
    w = create()
    with pytest.raises(UsageError, match="'odd'"):
        w.annotate(good=1, odd=[value])
    w.close()
    assert store.open(w.path).meta == {}


def test_meta_that_contains_itself(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(UsageError, match="'loop'"):
        store.create(tmp_path / "run", meta={"loop": loop})


def test_notes_override_the_header(create):
    w = create(seed=1, task="digits")
    w.annotate(seed=2)
    assert store.open(w.path).meta["seed"] == 1  # not yet committed
    w.commit()
    w.annotate(n_params=10)
    w.close()
    assert store.open(w.path).meta == {"seed": 2, "task": "digits", "n_params": 10}


# -- append ------------------------------------------------------------------
def test_a_changed_width_takes_nothing_of_the_snapshot(create):
    w = create()
    w.append(outputs(0, torch.ones(2, 3)))
    streams = {("outputs", "b"): torch.ones(1, 1), ("outputs", "a"): torch.ones(2, 4)}
    with pytest.raises(ShapeChanged, match=r"'a'.*\(3,\), at step 7 .*\(4,\)"):
        w.append(Snapshot(7, streams, scalars={"loss": 1.0}))
    w.append(Snapshot(8, {("outputs", "b"): torch.ones(1, 9)}))  # b had no width yet
    w.close()
    run = store.open(w.path)
    assert run.steps == [0, 8]
    assert run.scalars().empty
    assert w.acked_rows("outputs", "a") == 2


def test_a_weight_must_keep_its_whole_shape(create):
    w = create()
    w.append(Snapshot(0, {("weights", "w"): torch.ones(2, 3)}))
    w.commit()  # layouts outlive a commit
    with pytest.raises(ShapeChanged, match=r"\(2, 3\), at step 1 .*\(3, 3\)"):
        w.append(Snapshot(1, {("weights", "w"): torch.ones(3, 3)}))


def test_a_changed_dtype(create):
    w = create()
    w.append(outputs(0, torch.ones(2, 3)))
    with pytest.raises(DtypeChanged, match=r"float32, at step 1 they have .*bfloat16"):
        w.append(outputs(1, torch.ones(2, 3, dtype=torch.bfloat16)))
    w.append(outputs(1, torch.ones(2, 3), labels=torch.zeros(2).long()))
    with pytest.raises(DtypeChanged, match="labels"):
        w.append(outputs(2, torch.ones(2, 3), labels=torch.zeros(2).char()))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, 2, device="meta"), "on meta"),
        (torch.tensor(1.0), "no rows"),
    ],
    ids=["complex", "float8", "sparse", "meta", "0-dim"],
)
def test_what_cannot_be_stored_exactly_is_refused(create, tensor, words):
    w = create()
    with pytest.raises(UnsupportedOutput, match=f"outputs of layer 'a'.*{words}"):
        w.append(outputs(0, tensor))
    assert w.pending_bytes == 0


@pytest.mark.parametrize("value", ["abc", None, torch.ones(2), 1j, torch.tensor(1j)])
def test_a_scalar_is_one_real_number(create, value):
    w = create()
    with pytest.raises(UsageError, match="'loss'"):
        w.append(Snapshot(0, {}, scalars={"loss": value}))


def test_reserved_targets_and_negative_steps(create):
    w = create()
    for target in ("labels", "scalars"):
        with pytest.raises(UsageError, match="reserved"):
            w.append(Snapshot(0, {(target, "a"): torch.ones(1)}))
    for step in (-1, 2**63):
        with pytest.raises(UsageError, match=str(step)):
            w.append(Snapshot(step, {}))


def test_names_are_text(create):
    w = create()
    for snapshot in (
        Snapshot(0, {("outputs", 7): torch.ones(1, 1)}),
        Snapshot(0, {}, scalars={7: 1.0}),
        Snapshot(0, {}, tags=(7,)),
    ):
        with pytest.raises(UsageError, match="text names, got 7"):
            w.append(snapshot)


# -- commit ------------------------------------------------------------------
def test_acknowledged_means_committed(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.append(snapshot(1))
    assert w.acked_rows("outputs", "fc1") == 0
    assert w.pending_bytes > 0
    w.commit()
    assert w.acked_rows("outputs", "fc1") == 12
    assert w.acked_rows("weights", "fc2.weight") == 2
    assert w.acked_rows("outputs", "never seen") == 0
    assert w.pending_bytes == 0


def test_a_commit_without_anything_new_writes_nothing(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.commit()
    before = (w.path / "MANIFEST").read_bytes()
    w.commit()
    assert (w.path / "MANIFEST").read_bytes() == before


def test_commits_by_size(create, tiny):
    w = create()
    for step in range(8):
        w.append(outputs(step, torch.ones(1, 256)))  # 1 KB each, of 8 KB
    assert w.acked_rows("outputs", "a") == 7
    w.close()
    assert sorted(f.name for f in (w.path / "segments").iterdir()) == [
        "00000000.h5",
        "00000001.h5",
    ]


def test_commits_by_time(create, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])
    w = create()
    w.append(outputs(0, torch.ones(1, 1)))
    now[0] += 9.9
    w.append(outputs(1, torch.ones(1, 1)))
    assert w.acked_rows("outputs", "a") == 0
    now[0] += 0.2
    w.append(outputs(2, torch.ones(1, 1)))
    assert w.acked_rows("outputs", "a") == 3
    w.append(outputs(3, torch.ones(1, 1)))
    assert w.acked_rows("outputs", "a") == 3


def test_repeated_labels_do_not_fill_a_segment(create, tiny):
    w = create()
    for step in range(30):
        w.append(outputs(step, torch.ones(1, 1), labels=torch.arange(300)))
    assert w.acked_rows("outputs", "a") == 0
    assert w.pending_bytes == 2400 + 30 * 4


# -- the end -----------------------------------------------------------------
def test_close_commits_and_a_second_close_does_nothing(create, snapshot):
    w = create()
    w.append(snapshot(0))
    assert not store.open(w.path).closed
    w.close()
    w.close()
    w.abort()
    run = store.open(w.path)
    assert run.closed
    assert run.steps == [0]
    uses = [
        lambda: w.append(snapshot(1)),
        lambda: w.annotate(a=1),
        w.commit,
    ]
    for use in uses:
        with pytest.raises(ClosedStore):
            use()


def test_discard_removes_the_store(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.commit()
    w.discard()
    assert not w.path.exists()
    again = store.create(w.path, meta={})
    again.close()


def test_remove_takes_away_a_store_nobody_writes(create, snapshot):
    w = create()
    w.append(snapshot(0))
    with pytest.raises(StoreLocked):
        store.remove(w.path)
    w.commit()
    assert store.open(w.path).steps == [0]
    w.close()
    store.remove(w.path)
    assert not w.path.exists()


def test_abort_drops_what_is_pending(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.commit()
    w.append(snapshot(1))
    w.abort()
    w.abort()
    run = store.open(w.path)
    assert run.steps == [0]
    assert not run.closed
    with pytest.raises(ClosedStore):
        w.append(snapshot(2))
    w.close()  # nothing left to do
    assert not store.open(w.path).closed


@pytest.mark.parametrize("durability", ["batch", "append"])
def test_one_value_with_the_strides_of_a_larger_tensor(tmp_path, durability):
    """Contiguous for torch, but not for a view of its bytes."""
    big = torch.arange(30.0).reshape(6, 5)
    odd = {
        ("outputs", "column"): big[:1, :1].T,
        ("outputs", "one"): big[:, 2][:1],
        ("weights", "one"): big.T[:1, :1],
        ("weights", "expanded"): torch.ones(()).expand(1),
        ("weights", "0-dim"): big[2, 3],
    }
    assert any(t.ndim and t.stride(-1) != 1 for t in odd.values())
    w = store.create(tmp_path / "run", meta={}, durability=durability)
    w.append(Snapshot(0, odd))
    w.close()
    run = store.open(w.path)
    for (target, layer), tensor in odd.items():
        assert torch.equal(run.read(layer, 0, target=target), tensor)


def test_an_interrupt_between_a_file_and_its_note_does_not_stand_in_the_way(
    create, snapshot, monkeypatch
):
    w = create()
    w.append(snapshot(0))
    real = files.write_new

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_new", interrupted)
        with pytest.raises(KeyboardInterrupt):
            w.commit()
    assert not list((w.path / "segments").iterdir())
    w.close()
    assert store.open(w.path).steps == [0]


def test_an_interrupt_while_the_manifest_is_renewed(create, snapshot, monkeypatch):
    """It stays the interrupt that it was, and the next commit goes on."""
    w = create()
    w.append(snapshot(0))
    w._manifest._suspect = True  # as after a sync that failed
    real = Path.open

    def interrupted(path, *args, **kwargs):
        if path.name == "MANIFEST" and args == ("r+b",):
            raise KeyboardInterrupt
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            w.commit()
    w.close()
    assert store.open(w.path).steps == [0]


def test_an_interrupt_after_a_frame_is_durable_does_not_write_it_twice(
    create, snapshot, monkeypatch
):
    w = create()
    for step in range(3):
        w.append(snapshot(step))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "Batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            w.commit()
    w.close()
    assert [seen.step for seen in store.open(w.path).snapshots()] == [0, 1, 2]
