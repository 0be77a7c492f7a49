"""The recorder: a schedule, hooks and a store, attached to a training run."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from repscope import store
from repscope._checks import as_labels, check_choice
from repscope.capture import (
    TARGETS,
    LayerSpec,
    Probe,
    Schedule,
    Taken,
    Taps,
    Updates,
    as_schedule,
    original,
)
from repscope.errors import (
    CaptureError,
    ClosedStore,
    LabelMismatch,
    RepScopeWarning,
    StoreError,
    UsageError,
)
from repscope.recorder import plan
from repscope.recorder import resume as earlier
from repscope.recorder.delivery import Delivery, Sink
from repscope.recorder.held import Held, Number, Told, copied, own_number
from repscope.recorder.ranks import (
    MODES,
    Mode,
    Ranks,
    compare_probes,
    connect,
    rank_and_world,
    refuse_parts,
)
from repscope.recorder.worker import POLICIES, Policy, Worker
from repscope.snapshot import Snapshot, StreamKey

_EXIT_SECONDS = 60.0
_log = logging.getLogger("repscope")


class _Seen(NamedTuple):
    """What one look at the model showed."""

    streams: dict[StreamKey, Tensor]
    labels: Tensor | None = None
    rows: Mapping[str, Tensor] = {}


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
    ``meta["unlabelled"]``. Padded tokens are left out where a mask says so: an
    ``attention_mask`` or ``src_key_padding_mask`` that the model is given, ``mask=`` of
    `step` or of the probe.

    A process that may be stopped from outside saves what it has by one line,
    ``signal.signal(signal.SIGTERM, lambda *_: sys.exit(rec.commit()))``.

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
            under gradient scaling they are scaled); ``"moments"`` (count, mean and
            scatter in float64 of all their rows, which are not kept: one record at each
            `capture_now`, `commit` and `close`, of the captured steps since the one
            before; `Run.moments` reads it). Of every parameter of the model:
            ``"weights"``; and with ``optimizer=`` ``"weight_gradients"`` (as the
            optimizer is given them: reduced over ranks, unscaled, clipped),
            ``"updates"`` (what it did: the parameter after minus before) and
            ``"optimizer_state"`` (every tensor it keeps).
        every: Steps between captures, or a schedule: `rs.every`, `rs.log_spaced`,
            `rs.at_steps`, or a function of the step. Step 0 is always captured.
        probe: ``(inputs, labels)`` or `rs.Probe`; ``None`` records training batches.
        max_rows: At most so many rows of a layer are recorded at a step, a fixed random
            choice that is the same at every step and for every layer with as many rows.
            Moments are of all rows.
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
        ranks: What a distributed job records. ``"reduce"``: rank 0 records its own
            rows, and moments are of the rows of all ranks (those of a probe that
            several ranks have count once). ``"shards"``: every rank records into
            ``path/rank-<i>``, and `rs.open` of ``path`` shows them as one run. Build
            the recorder on every rank, after ``fully_shard``, and call its methods on
            all of them alike; with ``"reduce"``, without moments and sharded
            parameters, rank 0 may be alone. A rank whose recorder stops is waited for
            by no other; theirs stop with a `CaptureError` that names it.
        policy: What happens when the disk is slower than what is recorded, and more
            than ``queue_bytes`` would wait: ``"block"`` waits, ``"drop_step"`` leaves
            the step out and counts it in the store's ``meta["dropped_steps"]``,
            ``"raise"`` is an error (`QueueFull`).
        queue_bytes: Memory for what waits to be written. Nothing waits where no core is
            free to write while training goes on.
        sinks: Called with every `Snapshot` that is recorded, in the thread that
            writes; closed with the recorder if they have ``close()``. One that fails is
            warned about and called no more.
        max_store_bytes: Recording stops (`StoreFull`) before the store is larger.
        on_error: ``"warn"`` never breaks a training run: the first error stops the
            recording, is warned about once, kept in `error`, and raised by
            `commit()` and `close()`. ``"raise"`` raises it at `step()`.

    Attributes:
        error: The first error met while recording, or ``None``.
        step_number: Optimizer updates counted so far.
        path: Where the store is.
        bytes_per_capture: Bytes that a captured step adds, once the first is recorded.

    Raises:
        UnknownLayer: If a name or pattern matches nothing.
        LayerNeverFired: If a layer named exactly does not run on the probe.
        AlreadyAttached: If the model has a recorder.
        MissingOptimizer: If a target needs ``optimizer=``.
        UnsupportedModule: If hooks do not work on a module.
        CompiledFullgraph: If training batches are recorded inside a model compiled with
            ``fullgraph=True``.
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
        max_rows: int | None = None,
        reduce: str = "auto",
        dtype: str | torch.dtype | None = "float32",
        optimizer: torch.optim.Optimizer | None = None,
        meta: Mapping[str, Any] | None = None,
        durability: Literal["batch", "append"] = "batch",
        on_error: Literal["warn", "raise"] = "warn",
        resume: bool | int = False,
        ranks: Mode = "reduce",
        policy: Policy = "block",
        queue_bytes: int = 2**28,
        max_store_bytes: int | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._ranks = connect(ranks, model, capture)
        with contextlib.ExitStack() as undo:  # nothing half-built stays behind
            if self._ranks is not None:
                undo.callback(self._ranks.leave)
            check_choice(on_error, ("warn", "raise"), name="on_error")
            check_choice(ranks, MODES, name="ranks")
            check_choice(policy, POLICIES, name="policy")
            if queue_bytes < 1:
                raise UsageError(f"queue_bytes must be positive, got {queue_bytes}")
            self._plan = plan.make(
                model,
                layers=layers,
                capture=capture,
                probe=probe,
                max_rows=max_rows,
                reduce=reduce,
                dtype=dtype,
                optimizer=optimizer,
                meta=meta,
                reuse=not sinks,
            )
            self._due = as_schedule(every)
            self._next: Callable[[int], int] | None = getattr(self._due, "next", None)
            self._quiet_until = 0  # up to this step only scalars have to be kept
            self._on_error = on_error
            self.error: Exception | None = None
            self.step_number = 0
            self.bytes_per_capture: int | None = None
            self._due_now, self._closed = True, False
            self._unlabelled: set[str] = set()
            self._held = Held()
            self._notices: list[str] = []
            place, resume = self._take_part(Path(path), ranks, resume)
            self._attach(model, optimizer)
            undo.callback(self._detach_hooks)
            append = durability == "append"
            worker = Worker(policy=policy, queue_bytes=queue_bytes, waits=append)
            undo.callback(worker.stop)
            options = {"durability": durability, "max_store_bytes": max_store_bytes}
            writer, new = self._open(place, resume, options)
            self.path = place if writer is None else writer.one_file or writer.path
            self._delivery = Delivery(
                writer,
                worker,
                pool=self._plan.settings.pool,
                sinks=sinks,
                ranks=self._ranks if ranks == "reduce" else None,
            )
            undo.callback(self._delivery.undo, new=new)
            self._start(new)
            undo.pop_all()
        # Runs when the recorder is dropped or the program ends without close(). Not by
        # its own atexit flag: that would come after HDF5 has shut itself down.
        self._finalizer = weakref.finalize(
            self,
            _close_abandoned,
            self._taps,
            self._delivery,
            self.path,
            os.getpid(),
            self._ranks,
        )
        self._finalizer.atexit = False
        atexit.register(self._finalizer)
        self._give_notice()

    def _take_part(
        self, path: Path, mode: Mode, resume: bool | int
    ) -> tuple[Path, bool | int]:
        """Settle what this rank records.

        Returns:
            Where, and from which step.
        """
        rank, world = rank_and_world()
        self._silent = mode == "reduce" and rank > 0
        if world == 1:
            return path, resume
        if mode == "shards":
            self._plan.facts["recorder"]["ranks"] = {"rank": rank, "world": world}
            path /= f"rank-{rank}"
        done = earlier.progress(path, resume)
        own_rows = sharded = False
        if self._ranks is not None:
            self._ranks.meet("Recorder()")
            sharded = self._ranks.sharded
            own_rows = compare_probes(self._ranks, mode, self._plan.probe)
            if mode == "shards" and (least := min(self._ranks.gather(done))) < done:
                resume = least  # what came after it is not there on every rank
        if self._silent:
            self._plan = self._plan.silent(sharded=sharded, own_rows=own_rows)
            self.step_number = done
        return path, resume

    def _attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._model = weakref.ref(model)
        chosen, settings = self._plan.chosen, self._plan.settings
        self._warned = False
        # Layers are found by their names: the model alone keeps them.
        self._plan = dataclasses.replace(self._plan, chosen=[])
        self._taps = Taps(model, chosen, settings=settings, live=self._plan.live)
        self._updates: Updates | None = None
        self.optimizer = optimizer

    def _open(
        self, path: Path, resume: bool | int, options: dict[str, Any]
    ) -> tuple[store.Writer | None, bool]:
        """Return a writer, and whether its store is new; None where another has it."""
        if self._silent:
            return None, False
        facts = self._plan.facts
        writer, new = earlier.open_or_create(path, facts, resume, **options)
        self.step_number = writer.progress or 0
        return writer, new

    def _start(self, new: bool) -> None:
        """Capture the step to start from, unless the store has it."""
        delivery, plan, step = self._delivery, self._plan, self.step_number
        looks = [target for target in plan.targets if plan.looks_at(target)]
        lacks = not (self._silent or all(map(delivery.has, looks)))
        if self._ranks is not None:
            self._ranks.meet("Recorder()")
            # One that records nothing follows the first.
            steps, news, all_lack = zip(
                *self._ranks.gather((step, new, lacks)), strict=True
            )
            step, new, lacks = steps[0], any(news), any(all_lack)
        self.step_number = delivery.progress = step
        self._due_now = self._due(step)
        if new or (self._due_now and lacks):
            self._send(step, self._look())
        self._follow()
        if self._ranks is not None:
            self._ranks.meet("Recorder()")

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
        meet: Callable[[], None] | None = None
        if self._ranks is not None and self._ranks.sharded:
            meet = partial(self._ranks.meet, "optimizer.step()")
        self._updates = Updates(
            model, optimizer, self._plan.targets, taps=self._taps, meet=meet
        )
        self._updates.due = self._due_now

    # -- what the user calls --------------------------------------------------
    def step(
        self,
        *,
        loss: Number | None = None,
        labels: Any = None,
        mask: Any = None,
        **scalars: Number,
    ) -> None:
        """Tell the recorder that one iteration of training is done.

        With ``optimizer=`` a step is an update of that optimizer: calls after which it
        made none (gradient accumulation, a step that gradient scaling skipped) belong
        to the same step, whose loss is the mean of theirs and whose rows and labels are
        all of theirs. Without, every call is a step.

        Args:
            loss: The loss of the forward before this update: it belongs to the step
                before. A tensor stays on its device until the store is written.
            labels: Integer labels of the training examples of that forward (live
                recording; a probe brings its own).
            mask: Which tokens ``(n_examples, T)`` of that forward count: true or 1. The
                rows of the others are not recorded. A mask that the model itself is
                given as ``attention_mask`` needs no mention.
            **scalars: Numbers measured now, after this update.

        Raises:
            ClosedStore: If the recorder was closed.
            Exception: With ``on_error="raise"``, whatever went wrong.
        """  # noqa: DOC502 - re-raised as it was
        if self.step_number + 1 < self._quiet_until and self._step_quietly(
            loss, scalars
        ):
            return
        if self._closed:
            raise ClosedStore(f"step() after close() of the recorder at {self.path}")
        try:
            done, streams = 1, dict[StreamKey, Tensor]()
            if self._updates is not None:
                done, streams = self._updates.drain()
            before = self.step_number
            self.step_number += done
            if self.error is not None:
                return
            self._delivery.worker.check()
            own = {name: own_number(value) for name, value in scalars.items()}
            wanted = self._due_now and self._plan.live
            told = Told(
                None if loss is None else own_number(loss),
                copied(labels) if wanted else None,
                copied(mask) if wanted else None,
                own,
            )
            if not done:
                self._quiet_until = 0
                self._taps.settle()  # what comes next is another micro-batch
                self._held.add(told)
                return
            self._end_step(before, self._held.drain(told), streams)
        except Exception as error:  # noqa: BLE001 - the policy decides what happens
            self._fail(error)
        self._give_notice()

    def capture_now(self, tag: str | None = None, **scalars: Number) -> None:
        """Capture at once, whatever the schedule says, under an optional name.

        With a probe this records its activations; without one, the state of the model
        and the moments only (the next training forward follows the schedule).

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
            own = {name: own_number(value) for name, value in scalars.items()}
            tags = () if tag is None else (tag,)
            self._send(self.step_number, self._look(), own, tags, moments=True)
        except Exception as error:  # noqa: BLE001 - the policy decides what happens
            self._fail(error)
        self._give_notice()

    def commit(self) -> None:
        """Make everything recorded so far durable.

        Safe in a signal handler, whatever line of the program that interrupts.

        Raises:
            Exception: The first error met while recording, whatever ``on_error`` says.
        """  # noqa: DOC502 - re-raised as it was
        self._finish(self._delivery.commit)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Detach every hook, make the record durable and end it; twice is once.

        Raises:
            Exception: The first error met while recording, whatever ``on_error`` says.
        """  # noqa: DOC502 - re-raised as it was
        self._close()

    def _close(self, interrupted: str | None = None) -> None:
        if self._closed:
            return
        # After an exception the other ranks may be far from here: nothing is done
        # together, and what they do together goes on without this one.
        if self._ranks is not None and interrupted is not None:
            self._ranks.leave()

        facts = self._facts()
        if interrupted is not None:
            facts["interrupted"] = interrupted

        def end(**options: bool) -> None:
            self._quiet_until = 0
            self._detach_hooks()
            self._delivery.close(facts=facts, **options)

        # May raise on a full disk: then close() can be retried.
        self._finish(end, together=interrupted is None)
        self._closed = True
        self._finalizer.detach()
        atexit.unregister(self._finalizer)
        if self._ranks is not None and self.error is None and interrupted is None:
            try:
                self._ranks.meet("close()")
            except CaptureError as error:
                self.error = error
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
            self._close(interrupted=type(error).__name__)
        except Exception as ours:  # noqa: BLE001 - the user's error must come through
            error.add_note(f"The recorder at {self.path} also failed: {ours}")

    # -- one step -------------------------------------------------------------
    def _step_quietly(self, loss: Number | None, scalars: Mapping[str, Number]) -> bool:
        """Do the little there is to do at most steps.

        Nothing is due and no call waits for an update. Few lines, because training has
        just driven all of this out of the caches.

        Returns:
            Whether that was all.
        """
        delivery, updates = self._delivery, self._updates
        worker = delivery.worker
        if worker.error is not None or worker.pid != os.getpid():
            return False
        if updates is not None and not updates.take_one():
            return False
        step = self.step_number
        self.step_number = delivery.progress = step + 1
        try:
            if loss is not None:
                delivery.scalars(step, {"loss": own_number(loss)})
            if scalars:
                own = {name: own_number(value) for name, value in scalars.items()}
                delivery.scalars(step + 1, own)
        except Exception as error:  # noqa: BLE001 - the policy decides what happens
            self._fail(error)
        return True

    def _end_step(
        self, before: int, told: Told, streams: dict[StreamKey, Tensor]
    ) -> None:
        """Record what the forward and the update at ``before`` left, and look again."""
        step, loss = self.step_number, {} if told.loss is None else {"loss": told.loss}
        was_due, self._due_now = self._due_now, self._due(step)  # asked once a step
        self._delivery.progress = step
        if was_due:
            seen = self._training_rows(told) if self._plan.live else _Seen({})
            seen = seen._replace(streams=seen.streams | streams)
            self._send(before, seen, loss)
        elif loss:
            self._delivery.scalars(before, loss)
        if self._due_now:
            self._send(step, self._look(), told.scalars)
        elif told.scalars:
            self._delivery.scalars(step, told.scalars)
        self._follow()

    def _training_rows(self, told: Told) -> _Seen:
        """Return what the forwards of the step that ended left.

        Raises:
            LabelMismatch: If there are not as many labels as examples.
        """
        mask = None if told.mask is None else torch.as_tensor(told.mask)
        taken = self._taps.drain(mask)
        if not taken.n_forwards:
            self._warn_of_no_forward()
            return _Seen({})
        self._check_fired()
        n, cpu = taken.n_examples, torch.device("cpu")
        if told.labels is None or not n:
            return self._seen(taken, None)
        if len(told.labels) != n:
            raise LabelMismatch(
                f"{len(told.labels)} labels were given for the {n} examples that went "
                "through the model since the last step, as the length of its first "
                "input says; one label is needed for each, of all micro-batches. A "
                "model that takes time first is recorded with probe="
            )
        return self._seen(taken, as_labels(told.labels, n_samples=n, device=cpu))

    def _warn_of_no_forward(self) -> None:
        if self._warned:
            return
        self._warned = True
        self._notices.append(
            "a step was due, and the model ran no forward in training mode with "
            "gradients since the call of step() before it: nothing is recorded of such "
            "steps. Call model.train() after an evaluation, and step() before the next "
            "forward, or give the recorder probe="
        )

    def _look(self) -> _Seen:
        """Return what the probe and the model's state show right now.

        Raises:
            CaptureError: If the model was deleted.
        """
        ranks = self._ranks
        if ranks is not None:
            ranks.look("step() or capture_now()")
        model = self._model()
        if model is None:
            raise CaptureError(
                "the recorded model no longer exists; close() the recorder before "
                "deleting it"
            )
        seen, probe = _Seen({}), self._plan.probe
        together = ranks is not None and ranks.sharded
        if not together:
            refuse_parts(model)
        if probe is not None and (self._taps.watches or together):
            with self._taps.collecting():
                probe.run(original(model), before=self._taps.begin)
                taken = self._taps.drain()
            self._check_fired()
            seen = self._seen(taken, probe.labels)
            if ranks is not None and ranks.sharded:
                ranks.meet("step() or capture_now()")  # what was taken may have failed
        for target in self._plan.targets:
            kind = TARGETS[target]
            if kind.moment == "state" and kind.read is not None:
                found = kind.read(model, self.optimizer)
                seen.streams.update({(target, name): v for name, v in found.items()})
        return seen

    def _seen(self, taken: Taken, labels: Tensor | None) -> _Seen:
        """Return what was taken; name the streams that labels do not belong to."""
        if not taken.unlabelled <= self._unlabelled:
            self._unlabelled |= taken.unlabelled
            self._delivery.note(unlabelled=sorted(self._unlabelled))
        return _Seen(dict(taken.rows), labels, taken.moments)

    def _send(
        self,
        step: int,
        seen: _Seen,
        scalars: Mapping[str, Number] | None = None,
        tags: tuple[str, ...] = (),
        *,
        moments: bool = False,
    ) -> None:
        labels = seen.labels if seen.streams or seen.rows else None
        moved = frozenset(self._unlabelled)
        snapshot = Snapshot(step, seen.streams, labels, scalars or {}, tags, moved)
        moments = moments and self._plan.keeps_moments
        if not (seen.streams or seen.rows or scalars or tags or moments):
            return
        self._delivery.send(snapshot, rows=seen.rows, moments=moments)
        if self.bytes_per_capture is None and seen.streams and not self._silent:
            self.bytes_per_capture = sum(t.nbytes for t in seen.streams.values())
            self._announce(self.bytes_per_capture)

    def _announce(self, nbytes: int) -> None:
        """Say how large the store will be, where that is known, before it is too late.

        Without a probe this is after the first step.
        """
        steps = getattr(self._due, "steps", None)
        if steps is None:
            _log.info("%s: %.3g MB a captured step", self.path, nbytes / 1e6)
            return
        whole = nbytes * len(steps)
        _log.info("%s: about %.3g MB at %d steps", self.path, whole / 1e6, len(steps))
        free = shutil.disk_usage(self.path.parent).free
        if whole > free:
            self._notices.append(
                f"recording {len(steps)} steps into {self.path} takes about "
                f"{whole / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there"
            )

    def _follow(self) -> None:
        """Prepare for what comes next."""
        self._quiet_until = 0
        if self._next is not None and not self._due_now and self.error is None:
            self._quiet_until = self._next(self.step_number)
        self._taps.follow_training(self._plan.live and self._due_now)
        if self._updates is not None:
            self._updates.due = self._due_now

    def _check_fired(self) -> None:
        if self._taps.checked:
            return
        silent = self._taps.check_fired()
        if silent:
            self._notices.append(
                f"{len(silent)} of the layers selected by a pattern did not run in the "
                f"first captured step: {', '.join(silent[:5])}"
                f"{', ...' if len(silent) > 5 else ''}. What never runs is not "
                "recorded"
            )

    def _give_notice(self) -> None:
        """Warn of what was noticed, now that a warning made an error spoils nothing."""
        while self._notices:
            warnings.warn(self._notices.pop(0), RepScopeWarning, stacklevel=3)

    # -- the end, good or bad -------------------------------------------------
    def _detach_hooks(self) -> None:
        self._taps.detach()
        if self._updates is not None:
            self._updates.detach()

    def _facts(self) -> dict[str, Any]:
        """Return what the store should say about layers that are not in it."""
        passed = {why: dict(each) for why, each in self._taps.passed_over.items()}
        silent = self._taps.silent if self._taps.checked else []
        facts = {"passed_over": passed, "never_fired": silent}
        return {name: value for name, value in facts.items() if value}

    def _finish(self, end: Callable[..., None], *, together: bool = True) -> None:
        """Commit or close, with the moments kept so far."""
        moments = self._plan.keeps_moments and self.error is None
        try:
            end(moments=moments, together=together)
        except Exception as error:
            if self._ranks is None:
                # What the disk did not take waits in memory: the call can be repeated.
                if not isinstance(error, StoreError):
                    self.error = self.error or error
                raise
            self._stop(error)
            end(moments=False, together=False)  # what needs no other rank
        failed = self._delivery.worker.error
        if failed is not None:
            self._stop(failed)

    def _stop(self, error: Exception) -> None:
        """Record nothing more; let no other rank wait."""
        self.error = self.error or error
        self._quiet_until = 0
        if self._ranks is not None:
            self._ranks.leave()
        self._taps.detach()
        if self._updates is not None:  # steps are still counted
            self._updates.due = False

    def _fail(self, error: Exception) -> None:
        self._stop(error)
        if self._on_error == "raise":
            raise error
        warnings.warn(
            f"recording into {self.path} stopped at step {self.step_number}: "
            f"{type(error).__name__}: {error}. Training goes on; close() will raise "
            f"this error",
            RepScopeWarning,
            stacklevel=3,
        )


def _close_abandoned(
    taps: Taps, delivery: Delivery, path: Path, pid: int, ranks: Ranks | None
) -> None:
    if os.getpid() != pid:  # a forked child inherits the object, not the run
        return
    if ranks is not None:
        ranks.leave()
    taps.detach()
    if delivery.closed:
        return
    end = "what it had was saved now"
    try:
        delivery.close(
            moments=True,
            together=False,
            timeout=_EXIT_SECONDS,
            facts={"interrupted": "never closed"},
        )
    except Exception as error:  # noqa: BLE001 - the program is ending
        end = f"not all could be saved: {type(error).__name__}: {error}"
    warnings.warn(
        f"the recorder at {path} was never closed; {end}. "
        f"Use it as `with rs.Recorder(...) as rec:`, or call close()",
        RepScopeWarning,
        stacklevel=2,
    )
