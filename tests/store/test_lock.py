"""One writer: the lock, and what forked children may do."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
import warnings

import pytest

from repscope import store
from repscope.errors import ForkedRecorder, StoreExists, StoreLocked
from repscope.store.lock import Lock, holder


def test_the_lock_is_held_from_create_to_close(create):
    w = create()
    with pytest.raises(StoreLocked, match=rf"process {os.getpid()} on \S+ since \d+ s"):
        Lock(w.path / "LOCK")
    w.close()
    Lock(w.path / "LOCK").release()


def test_an_unsigned_lock_still_locks(tmp_path):
    lock = Lock(tmp_path / "LOCK")
    (tmp_path / "LOCK").write_text("")
    with pytest.raises(StoreLocked, match="another process"):
        Lock(tmp_path / "LOCK")
    lock.release()
    lock.release()


def test_to_create_where_somebody_records_is_refused_by_name(create, tmp_path):
    """As two ranks do that were given one path."""
    w = create()
    one = store.create(tmp_path / "one.h5", meta={})
    before = (w.path / "LOCK").read_bytes()
    for path in (w.path, tmp_path / "one.h5"):
        with pytest.raises(StoreLocked, match=r"process \d+ on .*every rank a path"):
            store.create(path, meta={})
    assert (w.path / "LOCK").read_bytes() == before
    one.close()
    w.close()
    for path in (w.path, tmp_path / "one.h5"):
        with pytest.raises(StoreExists):
            store.create(path, meta={})


def test_who_holds_a_lock_without_flock(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks")

    assert holder(tmp_path / "LOCK") is None
    lock = Lock(tmp_path / "LOCK")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert holder(tmp_path / "LOCK") is None
    (tmp_path / "LOCK.excl").write_text("1 here")
    assert f"process {os.getpid()}" in holder(tmp_path / "LOCK")
    lock.release()


def in_a_fork(function):
    """Return what ``function`` returns in a forked child."""

    def work():
        queue.put(function())

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with warnings.catch_warnings():
        # Python >= 3.12 warns about forking with threads; that is the point here
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=work)
        child.start()
    child.join(30)
    assert child.exitcode == 0
    return queue.get()


def test_a_forked_child_cannot_write_and_disturbs_nothing(create, snapshot):
    w = create()
    w.append(snapshot(0))

    def misuse():
        caught = []
        for use in (lambda: w.append(snapshot(5)), w.commit, w.close, w.abort):
            try:
                use()
            except ForkedRecorder as error:
                caught.append(str(error))
        return caught

    messages = in_a_fork(misuse)
    assert len(messages) == 4
    assert all(f"belongs to process {os.getpid()}" in text for text in messages)
    with pytest.raises(StoreLocked):
        Lock(w.path / "LOCK")
    w.append(snapshot(1))
    w.close()
    assert store.open(w.path).steps == [0, 1]


def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    path, alive = tmp_path / "run", []

    def parent_that_dies():
        alive.append(store.create(path, meta={}))
        worker = os.fork()
        if not worker:
            time.sleep(20)
            os._exit(0)
        queue.put(worker)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parent = context.Process(target=parent_that_dies)
        parent.start()
    worker = queue.get()
    parent.join()
    try:
        Lock(path / "LOCK").release()
    finally:
        os.kill(worker, signal.SIGKILL)
