"""What is to be recorded: checked and described before anything is attached."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from repscope import __version__
from repscope._checks import check_choice
from repscope.capture import (
    REDUCTIONS,
    TARGETS,
    Choice,
    Pool,
    Probe,
    Selected,
    Settings,
    as_probe,
    check_targets,
    select,
)
from repscope.capture.selection import LayerSpec
from repscope.errors import UsageError
from repscope.optim import describe

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_OURS = frozenset(
    {
        "recorder",
        "unlabelled",
        "never_fired",
        "passed_over",
        "dropped_steps",
        "interrupted",
    }
)
_VERSIONS = ("torch", "numpy", "scipy", "scikit-learn", "h5py")


@dataclass(frozen=True)
class Plan:
    """What one recorder records.

    Attributes:
        targets: Names of capture targets.
        chosen: Layers whose forwards are copied.
        probe: The fixed batch, or None for the batches of training.
        settings: How values become rows.
        facts: What the store says about it.
    """

    targets: tuple[str, ...]
    chosen: list[Selected]
    probe: Probe | None
    settings: Settings
    facts: dict[str, Any]

    @property
    def live(self) -> bool:
        """Whether forwards of training are copied."""
        return self.probe is None and self.sees_forwards

    @property
    def sees_forwards(self) -> bool:
        """Whether a target is there in forwards only."""
        return any(TARGETS[target].moment == "forward" for target in self.targets)

    @property
    def keeps_moments(self) -> bool:
        """Whether moments of rows are kept."""
        return "moments" in self.targets

    def looks_at(self, target: str) -> bool:
        """Return whether a target can be read between two steps."""
        moment = TARGETS[target].moment
        return moment == "state" or (moment == "forward" and self.probe is not None)

    def silent(self, *, sharded: bool, own_rows: bool) -> Plan:
        """Return the plan of a rank that records nothing itself.

        Args:
            sharded: It has parts of the parameters, so that the others need it to read
                them or to run the model.
            own_rows: Moments are of its rows too.
        """
        moments = frozenset({"moments"}) & set(self.targets)
        targets = self.targets if sharded else tuple(moments)
        wanted = moments if own_rows else frozenset[str]()
        settings = dataclasses.replace(self.settings, targets=wanted)
        chosen = self.chosen if wanted else []
        return dataclasses.replace(
            self, targets=targets, settings=settings, chosen=chosen
        )


def make(
    model: nn.Module,
    *,
    layers: LayerSpec,
    capture: str | Sequence[str],
    probe: Any,
    max_rows: int | None,
    reduce: str,
    dtype: str | torch.dtype | None,
    optimizer: torch.optim.Optimizer | None,
    meta: Mapping[str, Any] | None,
    reuse: bool,
) -> Plan:
    """Return the plan that the arguments of a recorder make.

    Args:
        model: The model.
        layers: Which layers.
        capture: Which targets.
        probe: A probe, or what can be made one.
        max_rows: Rows of a layer and step that are kept.
        reduce: One of `REDUCTIONS`.
        dtype: Of recorded rows.
        optimizer: Of the run.
        meta: The user's own facts.
        reuse: Whether memory of rows is used again.

    Returns:
        A plan.

    Raises:
        UsageError: If an argument cannot be understood.
    """
    check_choice(reduce, REDUCTIONS, name="reduce")
    if max_rows is not None and max_rows < 1:
        raise UsageError(f"max_rows must be positive, got {max_rows}")
    targets = check_targets(capture, optimizer=optimizer)
    if any(is_lazy(value) for value in _state(model)):
        raise UsageError(
            "the model has parameters that its first forward will make; run one batch "
            "through it before the recorder is built"
        )
    batch = as_probe(probe)
    if batch is not None and "output_gradients" in targets:
        raise UsageError(
            "output_gradients come from the backward passes of training: leave "
            "probe= out, or take them out of capture="
        )
    if taken := _OURS.intersection(meta or {}):
        raise UsageError(
            f"meta= may not hold {', '.join(sorted(taken))}: the recorder writes that"
        )
    kind = _as_dtype(dtype)
    forward = frozenset(t for t in targets if TARGETS[t].moment == "forward")
    chosen = select(model, layers) if forward else []
    about = {
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _VERSIONS},
        "targets": list(targets),
        "layers": {item.name: type(item.module).__name__ for item in chosen},
        "optimizer": None if optimizer is None else describe(optimizer),
        "inputs": "training batches" if batch is None else "probe",
        "probe": None
        if batch is None
        else {"n_samples": batch.n_samples, "sha256": batch.sha256},
        # By construction the same for every record of a run.
        "training": batch is None,
        "grad": batch is None,
        "reduce": reduce,
        "dtype": None if kind is None else str(kind).removeprefix("torch."),
        "max_rows": max_rows,
    }
    choice = None if max_rows is None else Choice(max_rows)
    settings = Settings(forward, reduce, kind, choice, Pool(reuse=reuse))
    facts = {**(meta or {}), "recorder": about}
    return Plan(targets, chosen, batch, settings, facts)


def _state(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a dtype that rows can be recorded in, or refuse it."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    check_choice(name, _DTYPES, name="dtype")
    found: torch.dtype = getattr(torch, name)
    return found
