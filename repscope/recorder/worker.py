"""The thread that writes: jobs in order, bounded by bytes, never a lock to wait for.

All work on the store is done by one thread. Where a core is free for it, training goes
on meanwhile; elsewhere it waits for each job, and nothing competes with it. Either way
an interrupt or a signal handler in the training thread never meets a half-done commit:
a handler that calls `Recorder.commit` waits until the thread comes to it.

A handler may interrupt any line of the thread it runs in, so nothing here takes a lock
that the interrupted line could be holding.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Literal

import torch

from repscope.errors import CaptureError, ForkedRecorder, QueueFull, StoreError

Policy = Literal["block", "drop_step", "raise"]
Job = Callable[[], None]

POLICIES = ("block", "drop_step", "raise")
_POLL_SECONDS = 0.001


class Worker:
    """Runs jobs one after another in a daemon thread.

    Args:
        policy: What `put` does when more than ``queue_bytes`` would wait.
        queue_bytes: How much may wait.
        waits: `put` waits for every job, as it does where no core is free.

    Attributes:
        error: The first error of a job that nobody waited for.
        waits_always: As given.
        pid: The process it belongs to.
    """

    def __init__(self, *, policy: Policy, queue_bytes: int, waits: bool) -> None:
        self.error: Exception | None = None
        self.waits_always = waits
        self._waits = waits or not has_spare_core()
        self._policy, self._queue_bytes = policy, queue_bytes
        self._jobs: SimpleQueue[_Task | None] = SimpleQueue()
        # Each is written by one thread only, so that no lock has to guard them.
        self._given = self._done = 0
        self.pid = os.getpid()
        self._thread = threading.Thread(
            target=_run, args=(self._jobs, self), name="repscope", daemon=True
        )
        self._thread.start()

    def put(self, job: Job, *, nbytes: int) -> bool:
        """Have a job done.

        Args:
            job: What to do.
            nbytes: Bytes it keeps in memory until then.

        Returns:
            False if it was dropped because the queue is full.

        Raises:
            ForkedRecorder: If this is a child that was forked.
            QueueFull: If it is full and the policy is ``"raise"``.
            Exception: What went wrong in an earlier job that nobody waited for, or in
                this one if it is waited for.
        """  # noqa: DOC502 - re-raised as it was
        self.check()
        if self._waits:
            self.call(job)
            return True
        if not self._has_room(nbytes):
            return False
        self._given += nbytes
        self._jobs.put(_Task(job, nbytes))
        return True

    def call(self, job: Job, *, timeout: float = float("inf")) -> None:
        """Have a job done after those before it, and wait.

        Args:
            job: What to do.
            timeout: Seconds to wait.

        Raises:
            CaptureError: If the thread is gone, or the time is over.
            ForkedRecorder: If this is a child that was forked.
            Exception: What went wrong in the job.
        """  # noqa: DOC502 - re-raised as it was
        self._check_process()
        if threading.current_thread() is self._thread:  # a sink, or the collector
            job()
            return
        task = _Task(job, 0)
        task.awaited = True
        end = time.monotonic() + timeout
        self._jobs.put(task)
        while not task.finished.acquire(timeout=0.05):
            self._check_alive()
            if time.monotonic() > end:
                raise CaptureError(
                    f"what was recorded could not be written within {timeout:g} s"
                )
        if task.error is not None:
            raise task.error

    def check(self) -> None:
        """Raise what went wrong in a job that nobody waited for.

        Raises:
            ForkedRecorder: If this is a child that was forked.
            Exception: The first error.
        """  # noqa: DOC502 - re-raised as it was
        self._check_process()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread after the jobs it has."""
        self._jobs.put(None)

    def _has_room(self, nbytes: int) -> bool:
        """Return whether a job may wait now, after what the policy says.

        Raises:
            QueueFull: If it says so.
        """
        while (waiting := self._given - self._done) + nbytes > self._queue_bytes:
            # What takes no room is never refused; what is larger than the whole queue
            # goes alone.
            if not nbytes or not waiting:
                return True
            if self._policy == "drop_step":
                return False
            if self._policy == "raise":
                raise QueueFull(
                    f"{waiting} bytes wait to be written, and with {nbytes} more "
                    f"queue_bytes={self._queue_bytes} would be passed: the disk is "
                    "slower than what is recorded; record less, or choose "
                    "policy='block' or 'drop_step'"
                )
            self._check_alive()
            time.sleep(_POLL_SECONDS)
        return True

    def _check_process(self) -> None:
        if os.getpid() != self.pid:
            raise ForkedRecorder(
                f"this recorder belongs to process {self.pid}, and this is its forked "
                f"child {os.getpid()}: record in the parent, or build a recorder here"
            )

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            raise CaptureError(
                "the thread that writes the store has ended; what was acknowledged "
                "before is safe"
            )


class _Task:
    """A job and how it ended."""

    __slots__ = ("awaited", "error", "finished", "job", "nbytes")

    def __init__(self, job: Job, nbytes: int) -> None:
        self.job, self.nbytes, self.awaited = job, nbytes, False
        self.error: Exception | None = None
        self.finished = threading.Lock()
        self.finished.acquire()


def _run(jobs: SimpleQueue[_Task | None], worker: Worker) -> None:
    while (task := jobs.get()) is not None:
        try:
            if task.awaited or worker.error is None or _can_wait(worker.error):
                task.job()
        except Exception as error:  # noqa: BLE001 - raised where the user can see it
            task.error = error
            if not task.awaited:
                worker.error = worker.error or error
        worker._done += task.nbytes
        task.finished.release()


def _can_wait(error: Exception) -> bool:
    """Return whether jobs after this error are done: those that a full disk keeps."""
    return isinstance(error, StoreError)


def has_spare_core() -> bool:
    """Return whether this process may use more cores than torch computes with."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return cores > torch.get_num_threads()
