"""Curves in TensorBoard while a run is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from repscope.capture import Schedule
from repscope.integrations.extras import load
from repscope.integrations.scalars import METRICS, ScalarSink


class TensorBoardSink(ScalarSink):
    """Write metrics and scalars of what is recorded as TensorBoard curves.

    Give it to ``Recorder(sinks=[...])``. The names of the curves are those of
    `repscope.integrations.scalars.scalars`; x is the step, in optimizer updates.

    Args:
        writer_or_logdir: A ``SummaryWriter`` (anything with ``add_scalar``), which
            stays open, or the folder for a new one, which `close` closes.
        metrics: What to compute of every stream, named as in `repscope.measure`.
        every: Which steps to write of those that are recorded: a number of steps or a
            schedule, as in `repscope.Recorder`.

    Raises:
        MissingExtra: If a folder is given and TensorBoard is not installed.
        UnknownName: If a metric is not known, or needs a whole run.
    """

    def __init__(
        self,
        writer_or_logdir: Any,
        *,
        metrics: str | Iterable[str] = METRICS,
        every: int | Schedule = 1,
    ) -> None:
        super().__init__(metrics, every)
        self._own = isinstance(writer_or_logdir, str | Path)
        if self._own:
            tensorboard = load("torch.utils.tensorboard", extra="tensorboard")
            writer_or_logdir = tensorboard.SummaryWriter(str(writer_or_logdir))
        self.writer = writer_or_logdir

    def write(self, points: Mapping[str, float], step: int) -> None:
        """Add one point to each curve.

        Args:
            points: Name of the curve -> value.
            step: Optimizer updates done.
        """
        for name, value in points.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the writer if it was made here; called by the recorder's `close`."""
        if self._own:
            self.writer.close()
        else:
            self.writer.flush()
