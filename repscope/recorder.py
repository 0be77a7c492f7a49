"""The recorder: a schedule, hooks and a store, attached to a training run."""

from __future__ import annotations

import atexit
import importlib.metadata
import operator
import os
import platform
import warnings
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from repscope import __version__, store
from repscope._checks import as_labels, check_choice
from repscope.capture import (
    REDUCTIONS,
    TARGETS,
    Probe,
    Schedule,
    Taken,
    Taps,
    Updates,
    as_schedule,
    select,
)
from repscope.capture.probe import as_probe
from repscope.capture.selection import LayerSpec
from repscope.capture.targets import check_targets
from repscope.errors import (
    CaptureError,
    ClosedStore,
    ProbeMismatch,
    RepScopeWarning,
    UsageError,
)
from repscope.optim import describe
from repscope.snapshot import Snapshot, StreamKey

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_IDLE_CALLS = 1000
_VERSIONS = ("torch", "numpy", "scipy", "scikit-learn", "h5py")


class Recorder:
    """Record what a model looks like while it trains, without changing the run.

    Hooks attach in the constructor, so build the recorder after ``model.to(device)``
    and after loading weights. Step ``k`` means ``k`` optimizer updates done.

    * With ``probe=``, the fixed batch is run (eval mode, no gradients, everything
      restored) at construction for step 0 and inside `step()` number ``k`` for ``k``.
    * Without it, the training batches are recorded: the forward that runs at step
      ``k``, with the labels and the loss given to the `step()` that follows it.
      Forwards in eval mode or without gradients are passed over. Several
      micro-batches of one step become more rows.
    * ``weights`` and ``optimizer_state`` are those after ``k`` updates; the gradients
      of step ``k`` are those at these weights, and its ``updates`` lead to ``k + 1``.
      A live run of ``n`` updates therefore
      ends with outputs at ``n - 1`` and weights at ``n``.

    Rows: ``(N, D)`` as they are; maps of convolutions ``(N, C, *S)`` averaged over
    space, and what follows them in the same shape likewise; other ``(N, *T, D)`` as
    tokens, one row each. Labels are one per example, and a token takes that of its
    example. Time-first outputs are turned around where the batch size shows; rows that
    do not follow the examples are recorded without labels and named in the store's
    ``meta["unlabelled"]``.

    Args:
        model: Any module; it is only weakly referenced.
        path: Where the store goes; it must not exist, unless ``resume`` is given. A
            name that ends in ``.h5`` becomes one file: it is recorded into the
            directory ``<path>.rscope`` and packed by `close()`; `rs.open` finds
            whichever is there.
        layers: A glob over leaf modules, an exact name (containers too), a module
            type, a predicate ``(name, module) -> bool``, or a list of these.
        capture: Targets. Of the selected layers: ``"outputs"``, ``"inputs"``, and
            ``"output_gradients"`` (of training batches only, as autograd saw them:
            under gradient scaling they are scaled). Of every parameter of the model:
            ``"weights"``; and with ``optimizer=`` ``"weight_gradients"`` (as the
            optimizer is given them: reduced over ranks, unscaled, clipped),
            ``"updates"`` (what it did: the parameter after minus before) and
            ``"optimizer_state"`` (every tensor it keeps).
        every: Steps between captures, or a schedule: `rs.every`, `rs.log_spaced`,
            `rs.at_steps`, or a function of the step. Step 0 is always captured.
        probe: ``(inputs, labels)`` or `rs.Probe`; ``None`` records training batches.
        reduce: How values of three and more dimensions become rows. ``"auto"`` averages
            maps over space and takes tokens one by one; ``"pool"`` averages both,
            ``"positions"`` takes every position of a map, ``"tokens"`` reads the last
            dimension as features whatever the layer, ``"flatten"`` makes one row an
            example.
        dtype: What activations and their gradients are recorded in: ``"float32"``,
            ``"float16"`` (beyond 65504 it is infinite), ``"bfloat16"``, ``"float64"``;
            ``None`` keeps what each layer returned, bit for bit. Weights, their
            gradients and updates always keep theirs.
        optimizer: Its updates are the steps, and its class and hyper-parameters are
            written into the store.
        meta: Facts about the run, such as ``{"seed": 0, "optimizer": "sgd"}``.
        durability: ``"batch"`` makes the record durable every 10 s or 64 MiB;
            ``"append"`` every step before `step` returns (it then waits for the disk,
            and for the GPU if a scalar is there).
        resume: ``True`` goes on with the run at ``path`` after its last acknowledged
            step, or makes it if nothing is there. An int is the step of the
            checkpoint that was loaded: what was recorded after it stays on disk and
            is hidden from now on. Call `commit` where you save a checkpoint.
        max_store_bytes: Recording stops (`StoreFull`) before the store is larger.
        on_error: ``"warn"`` never breaks a training run: the first error stops the
            recording, is warned about once, kept in `error`, and raised by
            `commit()` and `close()`. ``"raise"`` raises it at `step()`.

    Attributes:
        error: The first error met while recording, or ``None``.
        step_number: Optimizer updates counted so far.
        path: Where the store is.

    Raises:
        UnknownLayer: If a name or pattern matches nothing.
        LayerNeverFired: If a layer named exactly does not run on the probe.
        AlreadyAttached: If the model has a recorder.
        MissingOptimizer: If a target needs ``optimizer=``.
        StoreExists: If something is at ``path``; it is left untouched.
        StoreLocked: If the run to resume is being recorded by somebody.
        ProbeMismatch: If the run to resume was recorded with another probe.
        UsageError: If an argument cannot be understood, or the run to resume was
            recorded with other layers or targets.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> folder = tempfile.TemporaryDirectory()
        >>> with Recorder(model, f"{folder.name}/run", every=2, probe=(x, y)) as rec:
        ...     for _ in range(4):
        ...         loss = model(x).square().mean()
        ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...         rec.step(loss=loss)
        >>> store.open(f"{folder.name}/run").steps
        [0, 2, 4]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        layers: LayerSpec = "*",
        capture: str | tuple[str, ...] | list[str] = ("outputs",),
        every: int | Schedule = 100,
        probe: Probe | tuple[Any, Any] | Tensor | None = None,
        reduce: str = "auto",
        dtype: str | torch.dtype | None = "float32",
        optimizer: torch.optim.Optimizer | None = None,
        meta: Mapping[str, Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        durability: Literal["batch", "append"] = "batch",
        resume: bool | int = False,
        max_store_bytes: int | None = None,
    ) -> None:
        if on_error not in ("warn", "raise"):
            raise UsageError(f"on_error is 'warn' or 'raise', got {on_error!r}")
        self._targets = check_targets(capture, optimizer=optimizer)
        self._due = as_schedule(every)
        self._probe = as_probe(probe)
        self._on_error = on_error
        forward = [t for t in self._targets if TARGETS[t].moment == "forward"]
        if self._probe is not None and "output_gradients" in forward:
            raise UsageError(
                "output_gradients come from the backward passes of training: leave "
                "probe= out, or take them out of capture="
            )
        check_choice(reduce, REDUCTIONS, name="reduce")
        dtype = _as_dtype(dtype)
        chosen = select(model, layers) if forward else []
        facts = dict(meta or {})
        facts["recorder"] = self._describe(chosen, optimizer) | {
            "reduce": reduce,
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        }

        self.error: Exception | None = None
        self.step_number = 0
        self._due_now = True
        self._unlabelled: set[str] = set()
        self._model = weakref.ref(model)
        self._checked = not chosen
        self._closed = False
        self._held = _Held()
        self._updates: Updates | None = None
        self._taps = Taps(model, chosen, targets=forward, reduce=reduce, dtype=dtype)
        self.optimizer = optimizer
        try:
            self._writer, new = _writer(
                Path(path),
                facts,
                resume,
                durability=durability,
                max_store_bytes=max_store_bytes,
            )
        except BaseException:
            self._detach()
            raise
        self.path = self._writer.one_file or self._writer.path
        try:
            self._start(new)
        except BaseException:
            # Nothing half-written stays behind a constructor that failed.
            self._detach()
            (self._writer.discard if new else self._writer.abort)()
            raise
        # Runs when the recorder is dropped or the program ends without close(). Not by
        # its own atexit flag: that would come after HDF5 has shut itself down.
        self._finalizer = weakref.finalize(
            self, _close_abandoned, self._taps, self._writer, os.getpid()
        )
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def _start(self, new: bool) -> None:
        """Capture the step to start from, unless the store has it."""
        step = self.step_number = self._first = self._writer.progress or 0
        self._writer.progress = step
        if new:
            self._writer.append(Snapshot(0, *self._look()))
        self._due_now = self._due(step)
        if not new and self._due_now:
            seen = {target for target, _ in self._writer.recorded}
            if any(self._looks_at(t) and t not in seen for t in self._targets):
                self._add(Snapshot(step, *self._look()))
        self._follow()

    def _looks_at(self, target: str) -> bool:
        moment = TARGETS[target].moment
        return moment == "state" or (moment == "forward" and self._probe is not None)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer whose updates are the steps, or None: then calls of `step` are.

        Set it when training makes a new one.
        """
        return None if self._optimizer is None else self._optimizer()

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self._updates is not None:
            self._updates.detach()
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        model = self._model()
        if optimizer is None or model is None:
            self._updates = None
            return
        self._updates = Updates(model, optimizer, self._targets, taps=self._taps)
        self._updates.due = self._due_now

    def _detach(self) -> None:
        self._taps.detach()
        if self._updates is not None:
            self._updates.detach()

    def _add(self, snapshot: Snapshot) -> None:
        """Record a snapshot, without what a resumed store has of this step."""
        known = self._writer.recorded if snapshot.step == self._first else ()
        streams = {k: v for k, v in snapshot.streams.items() if k not in known}
        scalars = {k: v for k, v in snapshot.scalars.items()
                   if ("scalars", k) not in known}  # fmt: skip
        if streams or scalars:
            labels = snapshot.labels if streams else None
            self._writer.append(Snapshot(snapshot.step, streams, labels, scalars))

    def _describe(
        self, chosen: list[Any], optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        probe = self._probe
        return {
            "version": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in _VERSIONS},
            "targets": list(self._targets),
            "layers": {item.name: type(item.module).__name__ for item in chosen},
            "optimizer": None if optimizer is None else describe(optimizer),
            "inputs": "training batches" if probe is None else "probe",
            "probe": None
            if probe is None
            else {"n_samples": probe.n_samples, "sha256": probe.sha256},
        }

    # -- what the user calls --------------------------------------------------
    def step(
        self,
        *,
        loss: Tensor | float | None = None,
        labels: Any = None,
        **scalars: Tensor | float,
    ) -> None:
        """Tell the recorder that one iteration of training is done.

        With ``optimizer=`` a step is an update of that optimizer: calls after which it
        made none (gradient accumulation, a step that gradient scaling skipped) belong
        to the same step, whose loss is the mean of theirs and whose rows and labels are
        all of theirs. Without, every call is a step.

        Args:
            loss: The loss of the forward before this update: it belongs to the step
                before. A tensor stays on its device until the store is written.
            labels: Integer labels of the training rows of that forward (live
                recording; a probe brings its own).
            **scalars: Numbers measured now, after this update.

        Raises:
            ClosedStore: If the recorder was closed.
            Exception: With ``on_error="raise"``, whatever went wrong.
        """  # noqa: DOC502 - re-raised as it was
        if self._closed:
            raise ClosedStore(f"step() after close() of the recorder at {self.path}")
        before = self.step_number
        try:
            done, streams = 1, dict[StreamKey, Tensor]()
            if self._updates is not None:
                done, streams = self._updates.drain()
            self.step_number += done
            if self.error is not None:
                return
            self._held.add(loss, labels, _detached(scalars))
            if not done:
                self._held.warn_if_idle()
                return
            loss, labels, scalars = self._held.drain()
            self._writer.progress = self.step_number
            self._finish_forward(before, loss, labels, streams)
            self._due_now = self._due(self.step_number)  # asked once a step
            streams, y = self._look() if self._due_now else ({}, None)
            if streams or scalars:
                self._writer.append(Snapshot(self.step_number, streams, y, scalars))
            self._follow()
        except Exception as error:  # noqa: BLE001 - the policy decides what happens
            self._fail(error)

    def capture_now(self, tag: str | None = None, **scalars: Tensor | float) -> None:
        """Capture at once, whatever the schedule says, under an optional name.

        With a probe this records its activations; without one, the weights only
        (the next training forward follows the schedule).

        Args:
            tag: A name for this moment, such as ``"task-2"``.
            **scalars: Numbers measured now.

        Raises:
            ClosedStore: If the recorder was closed.
            Exception: With ``on_error="raise"``, whatever went wrong.
        """  # noqa: DOC502 - re-raised as it was
        if self._closed:
            raise ClosedStore(
                f"capture_now() after close() of the recorder at {self.path}"
            )
        if self.error is not None:
            return
        try:
            streams, y = self._look()
            tags = () if tag is None else (tag,)
            self._writer.append(
                Snapshot(self.step_number, streams, y, _detached(scalars), tags)
            )
        except Exception as error:  # noqa: BLE001 - the policy decides what happens
            self._fail(error)

    def commit(self) -> None:
        """Make everything recorded so far durable.

        Raises:
            Exception: The first error met while recording, whatever ``on_error`` says.
        """  # noqa: DOC502 - re-raised as it was
        self._writer.commit()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Detach every hook, make the record durable and end it; twice is once.

        Raises:
            Exception: The first error met while recording, whatever ``on_error`` says.
        """  # noqa: DOC502 - re-raised as it was
        if self._closed:
            return
        self._detach()
        self._writer.close()  # may raise on a full disk: then close() can be retried
        self._closed = True
        self._finalizer.detach()
        atexit.unregister(self._finalizer)
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            if not self._closed:
                self._writer.annotate(interrupted=type(error).__name__)
            self.close()
        except Exception as ours:  # noqa: BLE001 - the user's error must come through
            error.add_note(f"The recorder at {self.path} also failed: {ours}")

    # -- one step -------------------------------------------------------------
    def _look(self) -> tuple[dict[StreamKey, Tensor], Tensor | None]:
        """Return what the probe and the model's state show right now.

        Raises:
            CaptureError: If the model was deleted.
        """
        model = self._model()
        if model is None:
            raise CaptureError(
                "the recorded model no longer exists; close() the recorder before "
                "deleting it"
            )
        streams: dict[StreamKey, Tensor] = {}
        probe = self._probe
        if probe is not None and self._sees_forwards:
            with self._taps.collecting():
                probe.run(model, before=self._taps.begin)
                taken = self._taps.drain()
            self._check_fired()
            streams |= self._outputs(taken)
        for target in self._targets:
            kind = TARGETS[target]
            if kind.moment == "state" and kind.read is not None:
                found = kind.read(model, self.optimizer)
                streams |= {(target, name): value for name, value in found.items()}
        return streams, None if probe is None else probe.labels

    def _follow(self) -> None:
        live = self._probe is None and self._sees_forwards
        self._taps.follow_training(live and self._due_now)
        if self._updates is not None:
            self._updates.due = self._due_now

    @property
    def _sees_forwards(self) -> bool:
        return any(TARGETS[target].moment == "forward" for target in self._targets)

    def _finish_forward(
        self,
        step: int,
        loss: Tensor | float | None,
        labels: Any,
        streams: dict[StreamKey, Tensor],
    ) -> None:
        """Record what the training forward and the update at ``step`` left."""
        y: Tensor | None = None
        if self._probe is None:
            taken = self._taps.drain()
            if self._due_now and self._sees_forwards:
                self._check_fired()
            streams = self._outputs(taken) | streams
            if streams and labels is not None:
                n, cpu = taken.n_examples, torch.device("cpu")
                y = as_labels(labels, n_samples=n, device=cpu)
        scalars = {} if loss is None else _detached({"loss": loss})
        if streams or scalars:
            self._add(Snapshot(step, streams, y, scalars))

    def _outputs(self, taken: Taken) -> dict[StreamKey, Tensor]:
        """Return the streams; name those that the labels do not belong to."""
        if not taken.unlabelled <= self._unlabelled:
            self._unlabelled |= taken.unlabelled
            self._writer.annotate(unlabelled=sorted(self._unlabelled))
        return dict(taken.rows)

    def _check_fired(self) -> None:
        if self._checked:
            return
        self._checked = True
        silent = self._taps.check_fired()
        if silent:
            self._writer.annotate(never_fired=silent)
            warnings.warn(
                f"{len(silent)} of the layers selected by a pattern never ran in the "
                f"first captured step and are not recorded: {', '.join(silent[:5])}"
                f"{', ...' if len(silent) > 5 else ''}",
                RepScopeWarning,
                stacklevel=4,
            )

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._detach()
        if self._on_error == "raise":
            raise error
        warnings.warn(
            f"recording into {self.path} stopped at step {self.step_number}: "
            f"{type(error).__name__}: {error}. Training goes on; close() will raise "
            f"this error",
            RepScopeWarning,
            stacklevel=3,
        )


class _Held:
    """What `Recorder.step` was told since the last update of the optimizer."""

    def __init__(self) -> None:
        self._losses: list[Tensor | float] = []
        self._labels: list[Any] = []
        self._scalars: dict[str, Tensor | float] = {}
        self._idle = 0

    def add(
        self,
        loss: Tensor | float | None,
        labels: Any,
        scalars: dict[str, Tensor | float],
    ) -> None:
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if labels is not None:
            self._labels.append(labels)
        self._scalars |= scalars

    def drain(self) -> tuple[Tensor | float | None, Any, dict[str, Tensor | float]]:
        """Return the mean loss, all labels and the latest scalars, and keep nothing."""
        losses, labels, scalars = self._losses, self._labels, self._scalars
        self._losses, self._labels, self._scalars, self._idle = [], [], {}, 0
        loss: Tensor | float | None = losses[0] if losses else None
        if len(losses) > 1:
            loss = sum(losses[1:], losses[0]) / len(losses)  # on the device they are on
        if len(labels) > 1:
            return loss, torch.cat([torch.as_tensor(y) for y in labels]), scalars
        return loss, labels[0] if labels else None, scalars

    def warn_if_idle(self) -> None:
        self._idle += 1
        if self._idle == _IDLE_CALLS:
            warnings.warn(
                f"step() was called {_IDLE_CALLS} times and the optimizer given to the "
                "recorder made no update in between, so that the step number stands "
                "still. If training made a new optimizer, set recorder.optimizer to it",
                RepScopeWarning,
                stacklevel=4,
            )


def _close_abandoned(taps: Taps, writer: store.Writer, pid: int) -> None:
    if os.getpid() != pid:  # a forked child inherits the object, not the run
        return
    taps.detach()
    if writer.closed:
        return
    writer.annotate(interrupted="never closed")
    writer.close()
    warnings.warn(
        f"the recorder at {writer.one_file or writer.path} was never closed; what it "
        f"had was saved now. "
        f"Use it as `with rs.Recorder(...) as rec:`, or call close()",
        RepScopeWarning,
        stacklevel=2,
    )


def _writer(
    path: Path,
    facts: dict[str, Any],
    resume: bool | int,
    **options: Any,
) -> tuple[store.Writer, bool]:
    """Return a writer for the run at ``path``, and whether that is a new store."""
    if resume is False:
        return store.create(path, meta=facts, **options), True
    at = None if resume is True else operator.index(resume)
    if not at and store.is_stillborn(path):
        store.remove(path)
    if not at and not store.exists(path):
        return store.create(path, meta=facts, **options), True
    run = store.open(path)
    _check_same(run, facts["recorder"])
    writer = store.reopen(path, at=at, **options)
    if at is not None and at > run.progress:
        warnings.warn(
            f"{path} was last made durable at step {run.progress}, and goes on at step "
            f"{at}: what was recorded in between is missing; commit() where you save a "
            "checkpoint",
            RepScopeWarning,
            stacklevel=3,
        )
    writer.annotate(**{name: facts[name] for name in facts if name != "recorder"})
    return writer, False


def _check_same(run: store.Run, now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that recorded something else.

    Raises:
        ProbeMismatch: If it had another probe, or none.
        UsageError: If it had other layers or targets.
    """
    was = run.meta.get("recorder") or {}
    if was.get("probe") != now["probe"]:
        raise ProbeMismatch(
            f"{run.path} was recorded on {_inputs(was)}, not on {_inputs(now)}: one "
            "run has one probe; give the same, or record into a new store"
        )
    for what in ("reduce", "dtype"):
        if was.get(what, now[what]) != now[what]:
            raise UsageError(
                f"{run.path} was recorded with {what}={was[what]!r}, not "
                f"{now[what]!r}; give the same, or record into a new store"
            )
    for what in ("layers", "targets"):
        if sorted(was.get(what, ())) != sorted(now[what]):
            raise UsageError(
                f"{run.path} was recorded with {what} {sorted(was.get(what, ()))}, not "
                f"{sorted(now[what])}; select the same, or record into a new store"
            )


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a dtype that rows can be recorded in, or refuse it."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    check_choice(name, _DTYPES, name="dtype")
    found: torch.dtype = getattr(torch, name)
    return found


def _inputs(facts: Mapping[str, Any]) -> str:
    probe = facts.get("probe")
    if probe is None:
        return "training batches"
    return f"a probe of {probe['n_samples']} samples (sha256 {probe['sha256'][:12]})"


def _detached(scalars: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    # A copy: the user's loop may reuse the tensor before the store reads it.
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else float(value)
        for name, value in scalars.items()
    }
