"""The thread that writes: bounded, never silent, and safe to interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import repscope as rs
from repscope.errors import (
    CaptureError,
    ForkedRecorder,
    QueueFull,
    RepScopeWarning,
    UsageError,
)
from repscope.recorder import worker
from repscope.recorder.worker import Worker


class Slow:
    """A job that lasts until it is told to end."""

    def __init__(self):
        self.go = threading.Event()
        self.ran = 0

    def __call__(self):
        assert self.go.wait(20)
        self.ran += 1


def asynchronous(monkeypatch, **options):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    options = {"policy": "block", "queue_bytes": 100, "waits": False} | options
    return Worker(**options)


def test_jobs_run_in_order(monkeypatch):
    thread, seen = asynchronous(monkeypatch), []
    for i in range(50):
        assert thread.put(lambda i=i: seen.append(i), nbytes=1)
    thread.call(lambda: seen.append("end"))
    assert seen == [*range(50), "end"]
    thread.stop()


def test_where_no_core_is_free_every_job_is_done_at_once(monkeypatch):
    monkeypatch.setattr(worker, "has_spare_core", lambda: False)
    thread, seen = Worker(policy="raise", queue_bytes=1, waits=False), []
    for i in range(5):
        assert thread.put(lambda i=i: seen.append(i), nbytes=10)
        assert seen[-1] == i
    with pytest.raises(ZeroDivisionError):
        thread.put(lambda: 1 / 0, nbytes=1)
    assert thread.error is None  # whoever waits has it
    thread.stop()


def test_block_waits_for_room(monkeypatch):
    thread, slow = asynchronous(monkeypatch), Slow()
    assert thread.put(slow, nbytes=80)
    threading.Timer(0.3, slow.go.set).start()
    start = time.monotonic()
    assert thread.put(slow, nbytes=80)
    assert time.monotonic() - start > 0.2
    assert slow.ran >= 1
    thread.stop()


def test_drop_step_drops_and_raise_raises(monkeypatch):
    for policy in ("drop_step", "raise"):
        thread, slow = asynchronous(monkeypatch, policy=policy), Slow()
        assert thread.put(slow, nbytes=80)
        assert thread.put(slow, nbytes=20)
        if policy == "raise":
            with pytest.raises(QueueFull, match=r"100 bytes wait .* queue_bytes=100"):
                thread.put(slow, nbytes=1)
        else:
            assert not thread.put(slow, nbytes=1)
        slow.go.set()
        thread.call(lambda: None)
        assert thread.put(slow, nbytes=500)  # nothing waits: it goes alone
        thread.call(lambda: None)
        assert slow.ran == 3
        thread.stop()


def test_the_first_error_comes_out_at_the_next_call(monkeypatch):
    thread = asynchronous(monkeypatch)
    thread.put(lambda: 1 / 0, nbytes=1)
    thread.put(lambda: int("x"), nbytes=1)
    thread.call(lambda: None)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            thread.put(lambda: None, nbytes=1)
    thread.stop()


def test_a_thread_that_ended_is_noticed(monkeypatch):
    thread = asynchronous(monkeypatch)
    thread.put(lambda: None, nbytes=90)
    thread.stop()
    thread._thread.join()
    with pytest.raises(
        CaptureError, match="the thread that writes the store has ended"
    ):
        thread.call(lambda: None)
    thread.put(lambda: None, nbytes=90)  # cannot be known yet
    with pytest.raises(CaptureError, match="has ended"):
        thread.put(lambda: None, nbytes=90)


def test_waiting_has_an_end(monkeypatch):
    thread, slow = asynchronous(monkeypatch), Slow()
    with pytest.raises(CaptureError, match=r"could not be written within 0.1 s"):
        thread.call(slow, timeout=0.1)
    slow.go.set()
    thread.stop()


def test_cores(monkeypatch):
    for cores, threads, spare in (
        ({0}, 1, False),
        ({0, 1}, 1, True),
        ({0, 1}, 2, False),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, c=cores: c)
        monkeypatch.setattr(torch, "get_num_threads", lambda t=threads: t)
        assert worker.has_spare_core() is spare
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert not worker.has_spare_core()


# -- in a recorder ------------------------------------------------------------
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def hold(recorder):
    """Keep the thread of a recorder busy; return what lets it go on."""
    slow = Slow()
    recorder._delivery.worker.put(slow, nbytes=0)
    return slow.go


def train(model, recorder, steps):
    for _ in range(steps):
        loss = model(torch.randn(8, 16)).sum()
        loss.backward()
        recorder.step(loss=loss)


@pytest.mark.parametrize("name", ["policy", "queue_bytes"])
def test_options_are_checked(tmp_path, name):
    with pytest.raises(UsageError, match=name):
        rs.Recorder(net(), tmp_path / "run", **{name: 0 if "_" in name else "wait"})
    assert not (tmp_path / "run").exists()


def test_dropped_steps_are_whole_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    model = net()
    recorder = rs.Recorder(
        model, tmp_path / "run", every=1, policy="drop_step", queue_bytes=20_000
    )
    train(model, recorder, 2)
    recorder.commit()
    go = hold(recorder)
    train(model, recorder, 10)  # 4.3 kB each
    go.set()
    recorder.commit()
    train(model, recorder, 2)
    recorder.close()
    run = rs.open(tmp_path / "run")
    dropped = run.meta["dropped_steps"]
    assert 4 <= len(dropped) <= 8
    assert sorted(run.steps + dropped) == list(range(14))
    assert run.scalars()["loss"].dropna().index.tolist() == list(range(14))
    for step in run.steps:
        assert all(len(run.read(layer, step)) == 8 for layer in ("0", "1", "2"))


def test_raise_stops_the_recording_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    model = net()
    recorder = rs.Recorder(
        model, tmp_path / "run", every=1, policy="raise", queue_bytes=9_000
    )
    go = hold(recorder)
    with pytest.warns(RepScopeWarning, match="QueueFull"):
        train(model, recorder, 5)
    go.set()
    with pytest.raises(QueueFull):
        recorder.close()
    assert rs.open(tmp_path / "run").steps == [0, 1]


def test_what_waits_is_written_by_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    model = net()
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        go = hold(recorder)
        train(model, recorder, 20)
        threading.Timer(0.2, go.set).start()
        recorder.commit()
        run = rs.open(tmp_path / "run")
        assert run.steps == list(range(20))
        assert len(run.scalars()) == 20


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_the_death_of_the_thread_surfaces_at_the_next_step(
    tmp_path, monkeypatch, on_error
):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    model = net()
    recorder = rs.Recorder(model, tmp_path / "run", every=1, on_error=on_error)

    def fail(snapshot):
        raise OSError(5, "the disk is gone")

    recorder.commit()
    go = hold(recorder)
    recorder._delivery._writer.append = fail
    train(model, recorder, 1)
    go.set()
    recorder._delivery.worker.call(lambda: None)
    if on_error == "raise":
        with pytest.raises(OSError, match="the disk is gone"):
            train(model, recorder, 1)
    else:
        with pytest.warns(RepScopeWarning, match="the disk is gone"):
            train(model, recorder, 3)
    del recorder._delivery._writer.append
    with pytest.raises(OSError, match="the disk is gone"):
        recorder.close()
    assert rs.open(tmp_path / "run").closed


def test_memory_is_used_again(tmp_path):
    model = net()
    with rs.Recorder(model, tmp_path / "run", every=1) as recorder:
        places = set()
        for _ in range(6):
            train(model, recorder, 1)
            waiting = recorder._delivery._writer._pending.records
            places |= {t.data_ptr() for r in waiting for t in r.tensors.values()}
            recorder.commit()
        assert len(places) <= 6  # 3 layers; the first commit may come late
    run = rs.open(tmp_path / "run")
    rows = [run.read("0", step) for step in run.steps]
    assert len({tuple(r[0].tolist()) for r in rows}) == 6


def test_a_fork_cannot_record(tmp_path):
    model = net()
    with rs.Recorder(model, tmp_path / "run", every=1, on_error="raise") as recorder:
        train(model, recorder, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                recorder.step()
            except ForkedRecorder:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        train(model, recorder, 1)
    assert rs.open(tmp_path / "run").steps == [0, 1]


SCRIPT = """
import os, signal, sys, threading, time, torch, repscope as rs
from torch import nn
from repscope.recorder import worker
torch.set_num_threads(1)
worker.has_spare_core = lambda: {spare}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
x = torch.randn(8, 16)
rec = rs.Recorder(model, sys.argv[1], every=1, capture=("outputs", "moments"))
{handler}
print("ready", flush=True)
while True:
    model(x).sum().backward()
    rec.step(loss=0.5)
    print(rec.step_number, flush=True)
"""
HANDLERS = {
    "documented": "signal.signal(signal.SIGTERM, lambda *_: sys.exit(rec.commit()))",
    # The handler returns, the program goes on and is killed.
    "commit": "signal.signal(signal.SIGTERM, lambda *_: rec.commit())",
}


def interrupted(path, *, handler, spare, after, number=signal.SIGTERM):
    """Run the script, signal it after some time; return the steps it had done."""
    code = textwrap.dedent(SCRIPT).format(spare=spare, handler=handler)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(child.stdout))
    reader.start()
    time.sleep(after)
    child.send_signal(number)
    if "exit" not in handler:
        time.sleep(0.5)
        child.kill()
    code = child.wait(30)
    reader.join()
    said = child.stderr.read()
    child.stdout.close()
    child.stderr.close()
    return code, len(lines), said


@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("handler", HANDLERS)
def test_commit_in_a_signal_handler(tmp_path, handler, spare):
    path = tmp_path / "run"
    code, done, said = interrupted(
        path, handler=HANDLERS[handler], spare=spare, after=0.3
    )
    steps = whole(path)
    if handler == "documented":
        assert code == 0, said
        # The step that was interrupted may be on either side.
        assert abs(len(steps) - done) <= 1
        assert "never closed" in said
    assert rs.open(path).moments("0").count


def whole(path):
    """Return the steps of a store, which are all up to the last one."""
    run = rs.open(path)
    steps = [snapshot.step for snapshot in run.snapshots(target="outputs")]
    assert steps == list(range(len(steps)))
    assert run.scalars().index.tolist()[: len(steps) - 1] == steps[:-1]
    assert steps
    return steps


def test_an_interrupt_while_it_writes_ends_the_program_and_loses_nothing(tmp_path):
    code, done, said = interrupted(
        tmp_path / "run", handler="'exit'", spare=False, after=0.3, number=signal.SIGINT
    )
    assert code != 0
    assert "KeyboardInterrupt" in said
    assert abs(len(whole(tmp_path / "run")) - done) <= 1


def test_what_waits_at_the_end_of_the_program_is_written(tmp_path):
    code = """
import sys, time, torch, repscope as rs
from torch import nn
from repscope.recorder import worker
worker.has_spare_core = lambda: True
model = nn.Sequential(nn.Linear(4, 4))
rec = rs.Recorder(model, sys.argv[1], every=1)
rec._delivery.worker.put(lambda: time.sleep(0.5), nbytes=0)
for _ in range(30):
    model(torch.ones(2, 4)).sum().backward()
    rec.step()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "was never closed" in done.stderr
    run = rs.open(tmp_path / "run")
    assert run.steps == list(range(30))
    assert run.meta["interrupted"] == "never closed"


def test_a_disk_that_hangs_does_not_hold_the_program_for_ever(tmp_path):
    code = """
import sys, time, torch, repscope as rs
from torch import nn
from repscope.recorder import recorder, worker
worker.has_spare_core = lambda: True
recorder._EXIT_SECONDS = 1.0
model = nn.Sequential(nn.Linear(4, 4))
rec = rs.Recorder(model, sys.argv[1], every=1)
rec._delivery.worker.put(lambda: time.sleep(100), nbytes=0)
rec.step()
"""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert time.monotonic() - start < 30
    assert "could not be written within 1 s" in done.stderr


# -- scalars stay where they are ----------------------------------------------
class Distant(torch.Tensor):
    """Pretends that every look at its value would wait for a device."""

    waited = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        looks = ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy")
        cls.waited += func.__name__ in looks
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("every", [1, 100])
def test_step_never_looks_at_a_scalar(tmp_path, monkeypatch, every):
    monkeypatch.setattr(worker, "has_spare_core", lambda: True)
    monkeypatch.setattr(Distant, "waited", 0)
    model = net()
    with rs.Recorder(model, tmp_path / "run", every=every) as recorder:
        recorder.commit()
        go = hold(recorder)  # whatever happens now happens in step()
        for i in range(10):
            model(torch.randn(8, 16)).sum().backward()
            recorder.step(
                loss=torch.tensor(float(i)).as_subclass(Distant),
                norm=torch.tensor(float(i)).as_subclass(Distant),
            )
        assert Distant.waited == 0
        go.set()
    table = rs.open(tmp_path / "run").scalars()
    assert table["loss"].tolist()[:10] == list(range(10))
    assert table["norm"].tolist()[1:] == list(range(10))
