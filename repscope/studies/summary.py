"""From the table of measurements to the headline numbers and their differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repscope.metrics.comparison import mean_interval, paired_difference
from repscope.results import Interval

if TYPE_CHECKING:
    import pandas as pd

OPTIMIZER_ORDER = ("sgd", "adamw", "adam", "shampoo", "p-sgd", "p-adam")
# Whom a row is compared with, where the study has both.
COMPARISONS = (
    ("shampoo", "sgd"),
    ("shampoo", "adamw"),
    ("shampoo", "adam"),
    ("p-sgd", "sgd"),
    ("p-adam", "adamw"),
)


@dataclass(frozen=True)
class Quantity:
    """A number of a study: its inputs and layer are part of its name.

    Attributes:
        title: Column heading.
        study: A row of ``STUDIES``.
        metric: A metric of `measure`.
        layer: Recorded layer, pruning scope, or ``""`` for whole-run readings.
        percent: Whether to print it times 100.
        digits: Decimals.
        about: What exactly it is, for notes under a table.
    """

    title: str
    study: str
    metric: str
    layer: str
    percent: bool
    digits: int
    about: str

    def show(
        self,
        interval: Interval | None,
        *,
        signed: bool = False,
        compact: bool = False,
    ) -> str:
        """Return an interval as text, a dash when there is none.

        Args:
            interval: A symmetric (t) interval in units of the metric.
            signed: Write the plus sign of a difference.
            compact: ``mean ±half-width`` instead of ``mean [low, high]``.

        Returns:
            For example ``"66.9 [61.4, 72.3]"`` or ``"66.9 ±5.4"``.
        """
        if interval is None or math.isnan(interval.estimate):
            return "–"
        scale = 100 if self.percent else 1
        sign = "+" if signed else ""
        half = (interval.high - interval.low) / 2
        mean, low, high = (
            f"{scale * value:{sign}.{self.digits}f}"
            for value in (interval.estimate, interval.low, interval.high)
        )
        if math.isnan(half):
            return mean
        if compact:
            return f"{mean} ±{scale * half:.{self.digits}f}"
        return f"{mean} [{low}, {high}]"


HEADLINE = (
    Quantity(
        "average acc. %",
        "permuted",
        "average_accuracy",
        "",
        True,
        1,
        "mean test accuracy over the tasks after the last one",
    ),
    Quantity(
        "learning acc. %",
        "permuted",
        "learning_accuracy",
        "",
        True,
        1,
        "mean test accuracy on each task right after learning it",
    ),
    Quantity(
        "forgetting %",
        "permuted",
        "forgetting",
        "",
        True,
        1,
        "learning accuracy lost on earlier tasks by the end, in points",
    ),
    Quantity(
        "effective rank",
        "permuted",
        "effective_rank",
        "hidden1",
        False,
        2,
        "of the eigenvalues of the centred covariance of hidden1 after its ReLU, on "
        "the pooled test inputs of all tasks, at the end",
    ),
    Quantity(
        "class cosine",
        "pairs",
        "class_cosine",
        "hidden2",
        False,
        3,
        "mean over class pairs of the uncentred cosine of class-mean features of "
        "hidden2 after its ReLU, on all test inputs, at the end",
    ),
    Quantity(
        "acc. % at 90 % sparse",
        "sparsity",
        "accuracy_at_90",
        "global",
        True,
        1,
        "test accuracy with the smallest 90 % of all weights set to zero at once",
    ),
    Quantity(
        "acc. % at 95 % sparse",
        "sparsity",
        "accuracy_at_95",
        "global",
        True,
        1,
        "the same with 95 %",
    ),
)
# Shown below the headline: the same questions, other readings.
FURTHER = (
    Quantity(
        "old pairs %",
        "pairs",
        "old_task_accuracy",
        "",
        True,
        1,
        "mean test accuracy on all but the last pair, at the end (all classes compete)",
    ),
    Quantity(
        "last pair %",
        "pairs",
        "last_task_accuracy",
        "",
        True,
        1,
        "test accuracy on the last pair, at the end (all classes compete)",
    ),
    Quantity(
        "mean share",
        "pairs",
        "mean_share",
        "hidden2",
        False,
        3,
        "share of the common mean in the class means: a cosine near 1 may say no "
        "more than that",
    ),
    Quantity(
        "acc. % at 95 %, balanced",
        "sparsity",
        "accuracy_at_95",
        "balanced",
        True,
        1,
        "as above, each layer first divided by its RMS: global pruning alone is not "
        "invariant to rescaling two layers against each other",
    ),
)


def final_values(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the last recorded row of every run, layer and metric.

    Args:
        frame: From `repscope.measure`.

    Returns:
        A table with one row each, plus a column ``study``.
    """
    keys = ["run", "layer", "target", "metric"]
    last = frame.groupby(keys, sort=False, dropna=False).tail(1)
    return last.assign(study=last["task"].str.split().str[0])


def by_seed(
    frame: pd.DataFrame, quantity: Quantity, optimizer: str
) -> dict[int, float]:
    """Return ``seed -> value`` of a quantity for one optimizer, NaN where diverged.

    A run that diverged has no value at the end, whatever was still finite when it
    stopped and whatever it never came to record.

    Args:
        frame: From `final_values`.
        quantity: What to look up.
        optimizer: Its label.

    Returns:
        Empty when the study has no such run.
    """
    runs = frame[(frame["study"] == quantity.study) & (frame["optimizer"] == optimizer)]
    rows = runs[(runs["metric"] == quantity.metric) & (runs["layer"] == quantity.layer)]
    seeds, values = rows["seed"].tolist(), rows["value"].tolist()
    found = {int(s): float(v) for s, v in zip(seeds, values, strict=True)}
    return found | dict.fromkeys(_diverged_seeds(runs), math.nan)


def _diverged_seeds(rows: pd.DataFrame) -> set[int]:
    marked = rows[rows["note"].str.contains("diverged")]
    return {int(seed) for seed in marked["seed"]}


def finite(values: Mapping[int, float]) -> dict[int, float]:
    """Return the seeds whose value is a number.

    Args:
        values: Seed -> value.

    Returns:
        The same without NaN and infinities.
    """
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def interval_of(
    frame: pd.DataFrame, quantity: Quantity, optimizer: str
) -> Interval | None:
    """Return mean and interval over the seeds that have a value.

    Args:
        frame: From `final_values`.
        quantity: What to look up.
        optimizer: Its label.

    Returns:
        ``None`` when there is no finite value.
    """
    values = finite(by_seed(frame, quantity, optimizer))
    return mean_interval(list(values.values())) if values else None


def difference(
    frame: pd.DataFrame, quantity: Quantity, first: str, second: str
) -> Interval | None:
    """Return the paired difference ``first - second`` over the seeds both have.

    Args:
        frame: From `final_values`.
        quantity: What to look up.
        first: Optimizer label.
        second: Optimizer label.

    Returns:
        ``None`` when fewer than 2 seeds have both values.
    """
    a = finite(by_seed(frame, quantity, first))
    b = finite(by_seed(frame, quantity, second))
    shared = sorted(a.keys() & b.keys())
    if len(shared) < 2:
        return None
    return paired_difference({s: a[s] for s in shared}, {s: b[s] for s in shared})


def optimizers_in(frame: pd.DataFrame) -> list[str]:
    """Return the optimizers of a table in the order used everywhere.

    Args:
        frame: From `repscope.measure`.

    Returns:
        Labels, known ones first.
    """
    present = set(frame["optimizer"])
    known = [name for name in OPTIMIZER_ORDER if name in present]
    return known + sorted(present - set(known))


def diverged_in(frame: pd.DataFrame, optimizer: str, studies: set[str]) -> int:
    """Return for how many seeds a run of an optimizer diverged.

    Args:
        frame: From `final_values`.
        optimizer: Its label.
        studies: The studies to look at.

    Returns:
        A count of seeds.
    """
    chosen = (frame["optimizer"] == optimizer) & frame["study"].isin(studies)
    return len(_diverged_seeds(frame[chosen]))


def headline_table(
    frame: pd.DataFrame, quantities: tuple[Quantity, ...], *, compact: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return a table with one row an optimizer, each number with its interval.

    Args:
        frame: From `final_values`.
        quantities: The columns; those that no run has are left out.
        compact: Write ``mean ±half-width`` instead of ``mean [low, high]``.

    Returns:
        Header and rows of text.
    """
    shown = [q for q in quantities if (frame["study"] == q.study).any()]
    rows = []
    for optimizer in optimizers_in(frame):
        intervals = [interval_of(frame, q, optimizer) for q in shown]
        runs = [by_seed(frame, q, optimizer) for q in shown]
        if not any(runs):
            continue
        n = str(max(len(values) for values in runs))
        lost = diverged_in(frame, optimizer, {q.study for q in shown})
        cells = [
            q.show(i, compact=compact) for q, i in zip(shown, intervals, strict=True)
        ]
        rows.append([optimizer, f"{n} ({lost} diverged)" if lost else n, *cells])
    return ["optimizer", "n", *(q.title for q in shown)], rows


def difference_table(
    frame: pd.DataFrame, quantities: tuple[Quantity, ...], *, compact: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return the paired differences between optimizers, one row a comparison.

    Args:
        frame: From `final_values`.
        quantities: The columns; those that no run has are left out.
        compact: Write ``mean ±half-width`` instead of ``mean [low, high]``.

    Returns:
        Header and rows of text.
    """
    shown = [q for q in quantities if (frame["study"] == q.study).any()]
    rows = []
    for first, second in COMPARISONS:
        found = [difference(frame, q, first, second) for q in shown]
        if any(found):
            cells = [
                q.show(d, signed=True, compact=compact)
                for q, d in zip(shown, found, strict=True)
            ]
            n = str(max(d.n for d in found if d is not None))
            rows.append([f"{first} - {second}", n, *cells])
    return ["paired difference", "n", *(q.title for q in shown)], rows
