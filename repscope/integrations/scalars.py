"""The numbers of a snapshot that are worth a curve, and when to write them.

Metrics have the names and the definitions that they have in `repscope.measure`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from repscope.analysis import STREAM_METRICS, check_metrics, readings
from repscope.capture import Schedule, as_schedule
from repscope.snapshot import Snapshot

METRICS = ("effective_rank", "participation_ratio", "class_cosine")


def scalars(
    snapshot: Snapshot, *, metrics: str | Iterable[str] = METRICS
) -> dict[str, float]:
    """Return the metrics of every stream of a snapshot, and its own scalars.

    A stream that a metric has no meaning for (non-finite values, a single sample or
    class, no labels that belong to its rows) gives no number.

    Args:
        snapshot: What was seen at one step.
        metrics: Names as in `repscope.measure`, of metrics that need one stream only.

    Returns:
        ``repscope/<metric>/<layer>`` for outputs, with ``<target>/<layer>`` for other
        targets, and ``repscope/<name>`` for scalars.

    Example:
        >>> import torch
        >>> X = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
        >>> seen = Snapshot(0, {("outputs", "fc"): X}, scalars={"loss": 0.5})
        >>> found = scalars(seen, metrics="effective_rank")
        >>> {name: round(value, 6) for name, value in found.items()}
        {'repscope/loss': 0.5, 'repscope/effective_rank/fc': 2.0}
    """
    names = check_metrics(metrics, STREAM_METRICS)
    found = {f"repscope/{name}": float(v) for name, v in snapshot.scalars.items()}
    for row in readings(snapshot, metrics=names):
        if not math.isnan(row["value"]):
            target = "" if row["target"] == "outputs" else f"{row['target']}/"
            name = f"repscope/{row['metric']}/{target}{row['layer']}"
            found[name] = row["value"]
    return found


class ScalarSink:
    """Turn snapshots into points of curves; where they go is up to `write`.

    Args:
        metrics: What to compute of every stream, as in `scalars`.
        every: Which steps to write of those that are recorded: a number of steps or a
            schedule, as in `repscope.Recorder`.

    Raises:
        UnknownName: If a metric is not known, or needs a whole run.
        UsageError: If ``every`` cannot be understood.
    """

    def __init__(
        self, metrics: str | Iterable[str] = METRICS, every: int | Schedule = 1
    ) -> None:
        self.metrics = check_metrics(metrics, STREAM_METRICS)
        self._due = as_schedule(every)

    def __call__(self, snapshot: Snapshot) -> None:
        """Write the numbers of a snapshot.

        Args:
            snapshot: What the recorder handed to its store.
        """
        if not self._due(snapshot.step):
            return
        points = scalars(snapshot, metrics=self.metrics)
        if points:
            self.write(points, snapshot.step)

    def write(self, points: Mapping[str, float], step: int) -> None:
        """Put the points of one step where they are looked at.

        Args:
            points: Name of the curve -> value.
            step: Optimizer updates done.

        Raises:
            NotImplementedError: Unless a subclass says where.
        """
        raise NotImplementedError
