"""``durability="append"``: what append returned from is there, whatever happens."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time

import pytest
import torch

from repscope import store
from repscope.errors import CorruptSegment, StoreFull, StoreWriteError, UsageError
from repscope.snapshot import Snapshot
from repscope.store import manifest, onefile, wal


@pytest.fixture
def open_writer(tmp_path):
    made = []

    def make(name="run", **options):
        made.append(store.create(tmp_path / name, meta={}, durability="append"))
        return made[-1]

    def again(path, **options):
        made.append(store.reopen(path, **options))
        return made[-1]

    make.again = again
    yield make
    for each in made:
        each.abort()


def check(path, snapshot, same, steps):
    run = store.open(path)
    seen = list(run.snapshots())
    assert [s.step for s in seen] == steps
    for each in seen:
        same(each, snapshot(each.step))
    assert run.scalars()["loss"].tolist() == [1 / (1 + step) for step in steps]


def logs(path):
    return [f.name for f in (path / "wal").iterdir()]


def test_every_append_is_read_without_a_commit(open_writer, snapshot, same):
    w = open_writer()
    for step in range(5):
        w.append(snapshot(step))
        check(w.path, snapshot, same, list(range(step + 1)))
        assert w.acked_rows("outputs", "fc1") == 6 * (step + 1)
    assert not list((w.path / "segments").iterdir())
    assert logs(w.path) == ["00000001.log"]
    w.commit()
    assert logs(w.path) == []
    assert w.acked_rows("outputs", "fc1") == 30
    check(w.path, snapshot, same, list(range(5)))
    w.append(snapshot(5))
    check(w.path, snapshot, same, list(range(6)))
    w.close()
    assert logs(w.path) == []
    check(w.path, snapshot, same, list(range(6)))


def test_a_killed_writer_is_read_as_it_is_and_gone_on_with(open_writer, snapshot, same):
    w = open_writer()
    w.append(snapshot(0))
    w.commit()
    for step in (1, 2, 3):
        w.append(snapshot(step, tags=("now",)) if step == 3 else snapshot(step))
    w.abort()
    before = {f: f.read_bytes() for f in w.path.rglob("*") if f.is_file()}
    run = store.open(w.path)
    assert run.steps == [0, 1, 2, 3]
    assert run.tags == {"now": 3}
    same(list(run.snapshots())[3], snapshot(3, tags=("now",)))
    assert {f: f.read_bytes() for f in w.path.rglob("*") if f.is_file()} == before
    again = open_writer.again(w.path, durability="append")
    assert again.recovered == {}
    assert again.acked_rows("outputs", "fc1") == 24
    assert logs(w.path) == []
    same(list(store.open(w.path).snapshots())[3], snapshot(3, tags=("now",)))
    again.append(snapshot(4))
    again.abort()
    assert store.open(w.path).steps == [0, 1, 2, 3, 4]
    rewound = open_writer.again(w.path, at=2)
    assert store.open(w.path).steps == [0, 1, 2]
    rewound.close()


def test_a_log_torn_at_any_byte(open_writer, snapshot, same):
    w = open_writer()
    w.append(snapshot(0))
    first = (w.path / "wal" / "00000001.log").stat().st_size
    w.append(snapshot(1))
    w.abort()
    log = w.path / "wal" / "00000001.log"
    whole = log.read_bytes()
    for length in range(first, len(whole), 7):
        log.write_bytes(whole[:length])
        check(w.path, snapshot, same, [0])
    for at in range(first, len(whole), 11):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        log.write_bytes(damaged)
        check(w.path, snapshot, same, [0])
    again = open_writer.again(w.path)
    assert again.recovered == {"torn_log_bytes": len(whole) - first}
    assert (w.path / "quarantine" / "00000001.log").read_bytes() == damaged
    assert logs(w.path) == []
    again.append(snapshot(1))
    again.close()
    check(w.path, snapshot, same, [0, 1])


def test_a_log_that_was_folded_already_counts_once(open_writer, snapshot, same):
    """Killed between the frame of a commit and the removal of its log."""
    w = open_writer()
    for step in range(3):
        w.append(snapshot(step))
    log = (w.path / "wal" / "00000001.log").read_bytes()
    w.commit()
    w.abort()
    (w.path / "wal" / "00000001.log").write_bytes(log)
    (w.path / "wal" / "00000009.log").write_bytes(b"of nobody")
    check(w.path, snapshot, same, [0, 1, 2])
    open_writer.again(w.path).close()
    check(w.path, snapshot, same, [0, 1, 2])
    assert logs(w.path) == []
    assert [f.name for f in (w.path / "quarantine").iterdir()] == ["00000009.log"]


def test_a_log_behind_a_frame_that_is_not_there_is_damage(open_writer, snapshot):
    """Its rows were acknowledged: to go on without them would give them up."""
    w = open_writer()
    w.append(snapshot(0))
    w.abort()
    (w.path / "wal" / "00000001.log").rename(w.path / "wal" / "00000002.log")
    for use in (store.open, open_writer.again):
        with pytest.raises(CorruptSegment, match=r"lost its end.*00000002\.log"):
            use(w.path)
    assert store.check(w.path).damaged
    store.repair(w.path)
    assert store.open(w.path).steps == [0]


def test_a_reader_from_before_the_fold_finds_the_rows_again(
    open_writer, snapshot, same
):
    w = open_writer()
    w.append(snapshot(0))
    run = store.open(w.path)
    w.append(snapshot(1))
    same.tensor(run.read("fc1"), snapshot(0).streams["outputs", "fc1"])
    w.commit()
    same.tensor(run.read("fc1", 0), snapshot(0).streams["outputs", "fc1"])


def test_every_dtype_and_shape(open_writer, same):
    streams = {
        ("outputs", "bf"): torch.randn(3, 2).bfloat16(),
        ("outputs", "none"): torch.ones(0, 4),
        ("outputs", "flat"): torch.arange(3),
        ("weights", "bool"): torch.tensor([[True, False]]),
        ("weights", "0-dim"): torch.tensor(2.5, dtype=torch.float64),
        ("weights", "nothing"): torch.ones(0),
    }
    w = open_writer()
    w.append(Snapshot(0, streams, scalars={"nan": float("nan")}))
    for _ in range(2):
        (found,) = store.open(w.path).snapshots()
        for key, tensor in streams.items():
            same.tensor(found.streams[key], tensor)
        assert found.scalars["nan"] != found.scalars["nan"]
        w.commit()


# -- failures ----------------------------------------------------------------
def test_a_full_disk_keeps_the_record_for_the_next_attempt(
    open_writer, snapshot, same, monkeypatch
):
    w = open_writer()
    w.append(snapshot(0))
    write, room = os.write, [50]

    def full(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "full")
        done = write(fd, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreFull):
        w.append(snapshot(1))
    assert w.acked_rows("outputs", "fc1") == 6
    check(w.path, snapshot, same, [0])
    monkeypatch.setattr(os, "write", write)
    w.append(snapshot(2))  # logs both, in order
    assert w.acked_rows("outputs", "fc1") == 18
    check(w.path, snapshot, same, [0, 1, 2])


def test_a_log_that_does_not_sync_is_not_used_again(
    open_writer, snapshot, same, monkeypatch
):
    w = open_writer()
    w.append(snapshot(0))

    def fail(fd):
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(manifest, "_sync_data", fail)
    with pytest.raises(StoreWriteError):
        w.append(snapshot(1))
    assert w.acked_rows("outputs", "fc1") == 6
    monkeypatch.undo()
    w.append(snapshot(2))  # goes into a segment
    assert logs(w.path) == []
    assert w.acked_rows("outputs", "fc1") == 18
    check(w.path, snapshot, same, [0, 1, 2])


def test_damage_after_the_log_was_opened(open_writer, snapshot):
    w = open_writer()
    w.append(snapshot(0))
    run = store.open(w.path)
    log = w.path / "wal" / "00000001.log"
    data = bytearray(log.read_bytes())
    data[-1:] = bytes([data[-1] ^ 1])
    log.write_bytes(data)
    with pytest.raises(CorruptSegment, match="step 0"):
        run.labels()
    log.write_bytes(data[:10])
    with pytest.raises(CorruptSegment, match="bytes instead of"):
        run.read("fc1")


def test_nonsense_with_good_checksums_ends_the_log(open_writer, snapshot, monkeypatch):
    w = open_writer()
    w.append(snapshot(0))
    dumps = wal.json.dumps
    for text in ("[]", "{", '{"segments":[]}', '{"segments":[{"bytes":"x"}]}'):
        monkeypatch.setattr(wal.json, "dumps", lambda *_a, text=text, **_k: text)
        w.append(snapshot(1))
        monkeypatch.setattr(wal.json, "dumps", dumps)
        assert store.open(w.path).steps == [0]
        w._log.size, w._log._seq = 0, 0
        w._logged = 0
        w._pending.clear()
        w.append(snapshot(0))


def test_durability_is_one_of_two(tmp_path):
    with pytest.raises(UsageError, match="'always'"):
        store.create(tmp_path / "run", meta={}, durability="always")
    assert not (tmp_path / "run").exists()


# -- kills -------------------------------------------------------------------
def _write_until_killed(path, acked):
    w = store.create(path, meta={}, durability="append")
    step = 0
    while True:
        g = torch.Generator().manual_seed(step)
        w.append(Snapshot(step, {("outputs", "a"): torch.randn(4, 8, generator=g)}))
        acked.value = step
        step += 1
        if step % 50 == 0:
            w.commit()


def test_kills_lose_nothing_that_append_returned_from(tmp_path):
    context = multiprocessing.get_context("spawn")
    for trial in range(2):
        acked = context.Value("q", -1, lock=False)
        path = tmp_path / f"run-{trial}"
        child = context.Process(target=_write_until_killed, args=(path, acked))
        child.start()
        until = time.monotonic() + 60
        while acked.value < 60 + 17 * trial and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        run = store.open(path)
        assert run.steps[-1] >= acked.value >= 60
        assert run.steps == list(range(len(run.steps)))
        for step in run.steps:
            g = torch.Generator().manual_seed(step)
            assert torch.equal(run.read("a", step), torch.randn(4, 8, generator=g))


@pytest.mark.parametrize("how", ["packing", "closing frame"])
def test_what_is_logged_after_a_close_that_failed_is_kept(
    tmp_path, snapshot, same, monkeypatch, how
):
    """The closing frame may be there: a log from before it would not be read."""
    path = tmp_path / ("run.h5" if how == "packing" else "run")
    w = store.create(path, meta={}, durability="append")
    w.append(snapshot(0))
    w.commit()
    with monkeypatch.context() as patch:
        if how == "packing":
            patch.setattr(onefile, "finish", lambda path: 1 / 0)
        else:
            patch.setattr(manifest, "_sync_data", lambda fd: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            w.close()
    for step in (1, 2, 3):
        w.append(snapshot(step))
    assert w.acked_rows("outputs", "fc1") == 24
    w._let_go()  # as a kill does
    check(path, snapshot, same, [0, 1, 2, 3])
    store.reopen(path).abort()
    check(path, snapshot, same, [0, 1, 2, 3])
