"""Curves in Weights & Biases while a run is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from repscope.capture import Schedule
from repscope.errors import UsageError
from repscope.integrations.extras import load
from repscope.integrations.scalars import METRICS, ScalarSink

_STEP = "repscope/step"


class WandbSink(ScalarSink):
    """Write metrics and scalars of what is recorded as curves of a W&B run.

    Give it to ``Recorder(sinks=[...])``. The names of the curves are those of
    `repscope.integrations.scalars.scalars`. They have an axis of their own,
    ``repscope/step`` in optimizer updates, as W&B drops what arrives behind the
    counter of its own. Points count as rows of that counter: if you log with an
    explicit ``step=`` yourself, give your curves an axis in the same way
    (``run.define_metric``).

    Args:
        run: A run; ``None`` takes the active one. It stays open.
        metrics: What to compute of every stream, named as in `repscope.measure`.
        every: Which steps to write of those that are recorded: a number of steps or a
            schedule, as in `repscope.Recorder`.

    Raises:
        MissingExtra: If ``run`` is left out and wandb is not installed.
        UsageError: If ``run`` is left out and no run is active.
        UnknownName: If a metric is not known, or needs a whole run.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        metrics: str | Iterable[str] = METRICS,
        every: int | Schedule = 1,
    ) -> None:
        super().__init__(metrics, every)
        self.run = load("wandb", extra="wandb").run if run is None else run
        if self.run is None:
            raise UsageError(
                "no W&B run is active: call wandb.init() first, or give run="
            )
        self.run.define_metric(_STEP, hidden=True)
        self.run.define_metric("repscope/*", step_metric=_STEP)

    def write(self, points: Mapping[str, float], step: int) -> None:
        """Log the points of one step as one row.

        Args:
            points: Name of the curve -> value.
            step: Optimizer updates done.
        """
        self.run.log({**points, _STEP: step})
