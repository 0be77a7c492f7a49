"""From stores to tidy tables: every metric of every layer at every captured step."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repscope import parallel, store
from repscope._checks import is_finite
from repscope.errors import (
    MetricError,
    NonFiniteError,
    UnknownLayer,
    UnknownName,
    UsageError,
    suggest,
)
from repscope.landscape import SPARSITY_METRICS
from repscope.linalg import Moments
from repscope.metrics.alignment import ALIGNMENT_METRICS
from repscope.metrics.collapse import COLLAPSE_METRICS, neural_collapse
from repscope.metrics.continual import CONTINUAL_METRICS
from repscope.metrics.probe import PROBE_METRICS
from repscope.metrics.spectra import SPECTRUM_METRICS, invariants, spectra
from repscope.metrics.units import OVERLAP_METRICS, UNIT_METRICS
from repscope.metrics.weights import WEIGHT_METRICS
from repscope.results import SparsityCurve
from repscope.snapshot import EXAMPLES, Snapshot
from repscope.store import ROW_TARGETS, Run

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "run",
    "optimizer",
    "seed",
    "task",
    "step",
    "layer",
    "target",
    "metric",
    "value",
    "n_samples",
    "note",
)
STREAM_METRICS = (
    *SPECTRUM_METRICS,
    *ALIGNMENT_METRICS,
    *COLLAPSE_METRICS,
    *UNIT_METRICS,
    *OVERLAP_METRICS,
    *WEIGHT_METRICS,
)
METRICS = (*STREAM_METRICS, *CONTINUAL_METRICS, *SPARSITY_METRICS)
# Fitted, not read: up to a second a record, so only where asked for by name.
ON_REQUEST = tuple(PROBE_METRICS)
_LABELLED = {**ALIGNMENT_METRICS, **OVERLAP_METRICS, **PROBE_METRICS}

# Tensors in the shape of parameters: what is read of weights can be read of them.
_OF_PARAMETERS = ("weights", "weight_gradients", "updates")
# Square roots lift what float32 has lost of the small eigenvalues.
_OF_SMALL_EIGENVALUES = frozenset({"effective_rank_sigma"})
_NO_SPECTRUM = "no spectrum: not finite, or fewer than 2 rows"
# These need no eigenvalues at all.
_INVARIANT: dict[str, Callable[[Any], Tensor]] = {
    "participation_ratio": attrgetter("participation_ratio"),
    "trace": attrgetter("trace"),
}
# Activations held at once, in bytes, before their spectra are computed together.
_BATCH_BYTES = 32 * 2**20

Row = dict[str, Any]
_Stream = tuple[Row, Tensor, Tensor | None]  # what is known of it, rows, labels
_Waiting = tuple[Row, Tensor | Moments | None]
Runs = str | Path | Run | Iterable[str | Path | Run]


def measure(
    runs: Runs,
    *,
    metrics: Sequence[str] | None = None,
    layers: str = "*",
    jobs: int = 1,
) -> pd.DataFrame:
    """Return every metric of some stores as one tidy table.

    The spectra of layers, steps and runs are decomposed together, one call per matrix
    size for some megabytes of activations, so memory does not grow with the steps. In
    float32 where ``effective_rank_sigma`` is not among the metrics: ranks are right to
    1e-5 then. Where a metric has no meaning (non-finite activations, a single
    class, a run that diverged) its value is NaN and ``note`` says why. Readings of
    weights leave out those that were never updated, see `never_updated_weights`; the
    note says how many.

    Args:
        runs: A store, its path, or several.
        metrics: Names to compute; ``None`` takes all that the stores have data for,
            except ``linear_probe_accuracy``, which is fitted and slow.
        layers: Glob over the recorded layer and parameter names.
        jobs: Worker processes over runs.

    Returns:
        Columns ``run, optimizer, seed, task, step, layer, target, metric, value,
        n_samples, note``; rows in the order of the runs, then as recorded. Readings
        of the accuracy matrix have target ``"accuracy"``, those of a sparsity curve
        target ``"pruned"`` and the scope as layer.

    Raises:
        UsageError: If no run is given.
    """
    import pandas as pd

    opened = as_runs(runs)
    if not opened:
        raise UsageError("measure needs at least one store")
    wanted = frozenset(METRICS if metrics is None else check_metrics(metrics))
    _check_layers(opened, layers)
    work = partial(_measure, wanted=wanted, layers=layers)
    size = math.ceil(len(opened) / max(jobs, 1))
    parts = [opened[i : i + size] for i in range(0, len(opened), size)]
    rows = [row for part in parallel.run(work, parts, jobs=jobs) for row in part]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def as_runs(runs: Runs) -> list[Run]:
    """Return stores, opened where only a path was given.

    Args:
        runs: A store, its path, or several.

    Returns:
        A list of `Run`.
    """
    single = isinstance(runs, str | Path | Run)
    several: Iterable[str | Path | Run] = [runs] if single else runs  # type: ignore[list-item, assignment]
    return [run if isinstance(run, Run) else store.open(run) for run in several]


def optimizer_of(run: Run) -> str:
    """Return the label of a run's optimizer: ``meta["optimizer"]``, or its class.

    Args:
        run: A store.

    Returns:
        The label, ``"unknown"`` when the store does not say.
    """
    described = run.meta.get("recorder", {}).get("optimizer") or {}
    return str(run.meta.get("optimizer") or described.get("class", "unknown").lower())


def task_ends(run: Run) -> dict[int, int]:
    """Return the step at which each task of a sequence ended.

    Read from the tags ``task-<i>``, counted from 1.

    Args:
        run: A store.

    Returns:
        Task number -> step, ascending; empty when nothing is tagged so.
    """
    tagged = {t: step for t, step in run.tags.items() if t.startswith("task-")}
    return dict(sorted((int(t[5:]), step) for t, step in tagged.items()))


def accuracy_matrix(run: Run) -> Tensor | None:
    """Return ``A[i, j]``, the accuracy on task j after task i, from the scalars.

    Read from the scalars ``accuracy/<j>`` at the step tagged ``task-<i>``, both
    counted from 1.

    Args:
        run: A store.

    Returns:
        Float64 ``(n_tasks, n_tasks)``, NaN where a task was never finished; ``None``
        when the store has no such scalars or tags.
    """
    table = run.scalars()
    n_tasks = sum(name.startswith("accuracy/") for name in table.columns)
    ends = task_ends(run)
    if not n_tasks or not (ends or "diverged" in run.tags):
        return None
    matrix = torch.full((n_tasks, n_tasks), math.nan, dtype=torch.float64)
    for i, step in ends.items():
        for j in range(1, n_tasks + 1):
            matrix[i - 1, j - 1] = table[f"accuracy/{j}"].loc[step]
    return matrix


def sparsity_curves(run: Run) -> dict[str, SparsityCurve]:
    """Return the recorded sparsity curves of a run, one per pruning scope.

    Read from the scalars ``pruned/<scope>/<sparsity>``; thresholds are not recorded.

    Args:
        run: A store.

    Returns:
        Scope -> curve; empty when the store has none.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for name, column in run.scalars().items():
        kind, _, rest = str(name).partition("/")
        if kind == "pruned":
            scope, _, share = rest.partition("/")
            score = float(column.dropna().iloc[-1])
            points.setdefault(scope, []).append((float(share), score))
    curves = {}
    for scope, pairs in points.items():
        values = torch.tensor(sorted(pairs), dtype=torch.float64)
        unknown = torch.full_like(values[:, 0], math.nan)
        curves[scope] = SparsityCurve(
            values[:, 0], unknown, values[:, 1], float(values[0, 1])
        )
    return curves


def never_updated_weights(
    run: Run, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Return which weights no update reached, such as those of always dark pixels.

    Those that are the same, bit for bit, in the first record and the last; and, as
    weight decay moves weights without a gradient, those whose second moment in Adam
    (``exp_avg_sq``) is zero at the end, where ``optimizer_state`` was recorded. A
    tensor that never changed at all is frozen, not dark: it has no mask.

    Args:
        run: A store.
        names: Parameters to look at; ``None`` takes all.

    Returns:
        Parameter name -> boolean mask, of the tensors with at least one such weight.
    """
    if "weights" not in run.targets:
        return {}
    first = next(run.snapshots(target="weights"))
    masks = {}
    for _, name in first.streams:
        if names is not None and name not in names:
            continue
        start, last = first.streams["weights", name], run.read(name, target="weights")
        mask = (start == last) | _without_moment(run, name, like=last)
        if mask.any() and not mask.all():
            masks[name] = mask
    return masks


def readings(snapshot: Snapshot, *, metrics: Iterable[str]) -> list[Row]:
    """Return metrics of the streams of one snapshot, as `measure` does of stores.

    Args:
        snapshot: What was seen at one step.
        metrics: Names in `STREAM_METRICS`.

    Returns:
        Rows with ``step, layer, target, metric, value, n_samples, note``.
    """
    return _stream_rows(_streams(snapshot), frozenset(metrics))


def example_labels(run: Run, snapshot: Snapshot, layer: str) -> Tensor | None:
    """Return one label a row: token rows take the label of their example.

    Args:
        run: Its ``meta["unlabelled"]`` names streams whose rows are in another order.
        snapshot: Where the rows and the labels are.
        layer: The stream of outputs.

    Returns:
        Labels ``(n_rows,)``, or ``None`` when there are none that belong to the rows.
    """
    return _as_known(run, snapshot).labels_of(layer)


def check_metrics(
    metrics: str | Iterable[str], known: Sequence[str] = (*METRICS, *ON_REQUEST)
) -> tuple[str, ...]:
    """Return metric names, all of them known.

    Args:
        metrics: A name, or several.
        known: Names that would be understood.

    Returns:
        The names.

    Raises:
        UnknownName: If one of them is not known.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in names:
        if name not in known:
            raise UnknownName(
                f"unknown metric {name!r}{suggest(name, known)} "
                f"(known: {', '.join(known)})"
            )
    return names


# -- one worker's share -------------------------------------------------------
def _measure(runs: Sequence[Run], *, wanted: frozenset[str], layers: str) -> list[Row]:
    place = itertools.count()
    of_runs: list[Row] = []

    def placed() -> Iterator[_Stream]:
        for run in runs:
            of_runs.extend(_run_rows(run, wanted, next(place)))
            base, known = _base(run), {layer for _, layer in run.streams}
            names = {name for name in known if fnmatch.fnmatchcase(name, layers)}
            reading = wanted.intersection(WEIGHT_METRICS)
            dark = never_updated_weights(run, names) if reading else {}
            for snapshot in run.snapshots(layers=names):
                for row, X, y in _streams(_as_known(run, snapshot)):
                    if row["target"] == "weights" and row["layer"] in dark:
                        row, X = _updated(row, X, dark[row["layer"]])
                    yield base | row | {"place": next(place)}, X, y

    of_streams = _stream_rows(placed(), wanted)
    return sorted(of_runs + of_streams, key=itemgetter("place"))


def _stream_rows(streams: Iterable[_Stream], wanted: frozenset[str]) -> list[Row]:
    """Return every metric of some streams; as many spectra together as memory holds."""
    rows: list[Row] = []
    waiting: list[_Waiting] = []
    held = 0
    for base, X, y in streams:
        if base["target"] in _OF_PARAMETERS:
            rows += _apply(WEIGHT_METRICS, wanted, base, X)
        if base["target"] not in (*ROW_TARGETS, "moments"):
            continue
        if wanted.intersection(SPECTRUM_METRICS):
            waiting.append(_with_spectrum(base, X))
            held += X.nbytes
        if base["target"] == "outputs":
            rows += _unit_rows(wanted, base, X)
        if y is not None:
            rows += _apply(_LABELLED, wanted, base, X, y)
            rows += _collapse_rows(wanted, base, X, y)
        if held > _BATCH_BYTES:
            rows += _spectrum_rows(waiting, wanted)
            waiting, held = [], 0
    return rows + _spectrum_rows(waiting, wanted)


def _without_moment(run: Run, name: str, *, like: Tensor) -> Tensor:
    key = f"{name}:exp_avg_sq"
    if ("optimizer_state", key) not in run.streams:
        return torch.zeros_like(like, dtype=torch.bool)
    return run.read(key, target="optimizer_state") == 0


def _updated(base: Row, X: Tensor, dark: Tensor) -> tuple[Row, Tensor]:
    text = f"{int(dark.sum())} of {dark.numel()} weights never updated, left out"
    return _note(base, text), X[~dark]


def _streams(snapshot: Snapshot) -> Iterator[_Stream]:
    note = "" if not snapshot.tags else f"tag {', '.join(snapshot.tags)}"
    for (target, layer), X in snapshot.streams.items():
        if target == EXAMPLES:
            continue
        row = {
            "step": snapshot.step,
            "layer": layer,
            "target": target,
            "n_samples": _n_samples(target, X),
            "n_examples": _n_examples(snapshot, target, layer),
            "note": note,
        }
        yield row, X, snapshot.labels_of(layer) if target == "outputs" else None


def _as_known(run: Run, snapshot: Snapshot) -> Snapshot:
    unlabelled = frozenset(run.meta.get("unlabelled", ()))
    return dataclasses.replace(snapshot, unlabelled=unlabelled)


def _base(run: Run) -> Row:
    return {
        "run": run.name,
        "optimizer": optimizer_of(run),
        "seed": run.meta.get("seed"),
        "task": run.meta.get("task", ""),
    }


def _run_rows(run: Run, wanted: frozenset[str], place: int) -> list[Row]:
    """Return the readings that belong to a whole run: accuracies and pruning."""
    base = _base(run) | {
        "place": place,
        "step": max(run.steps, default=0),
        "layer": "",
        "n_samples": 0,
        "note": "diverged" if "diverged" in run.tags else "",
    }
    rows: list[Row] = []
    if wanted.intersection(CONTINUAL_METRICS):
        matrix = accuracy_matrix(run)
        if matrix is not None:
            base |= {"target": "accuracy"}
            rows += _apply(CONTINUAL_METRICS, wanted, base, matrix)
    if wanted.intersection(SPARSITY_METRICS):
        for scope, curve in sparsity_curves(run).items():
            base |= {"target": "pruned", "layer": scope}
            rows += _apply(SPARSITY_METRICS, wanted, base, curve)
    return rows


def _apply(
    table: Any, wanted: frozenset[str], base: Row, *arguments: object
) -> list[Row]:
    return [
        _row(base, name, partial(function, *arguments))
        for name, function in table.items()
        if name in wanted
    ]


def _row(base: Row, metric: str, compute: Callable[[], Tensor]) -> Row:
    try:
        return base | {"metric": metric, "value": float(compute())}
    except MetricError as error:
        return _note(base, str(error)) | {"metric": metric, "value": math.nan}


def _unit_rows(wanted: frozenset[str], base: Row, X: Tensor) -> list[Row]:
    if not wanted.intersection(UNIT_METRICS):
        return []
    silent = int((~X.any(-1)).sum())
    if silent:
        base = _note(base, f"no active unit in {silent} of {len(X)} samples")
    return _apply(UNIT_METRICS, wanted, base, X)


def _collapse_rows(
    wanted: frozenset[str], base: Row, X: Tensor, y: Tensor
) -> list[Row]:
    """Return the readings of neural collapse, whose classes are looked at once."""
    names = [name for name in COLLAPSE_METRICS if name in wanted]
    if not names:
        return []
    try:
        found = neural_collapse(X, y)
    except MetricError as error:
        base = _note(base, str(error)) | {"value": math.nan}
        return [base | {"metric": name} for name in names]
    return _apply(COLLAPSE_METRICS, wanted, _note(base, found.note), found)


def _n_samples(target: str, X: Tensor) -> int:
    if target == "moments":  # whose count is NaN where they diverged
        return int(X.flatten()[:1].nan_to_num(0.0, 0.0, 0.0).sum())
    return len(X) if target in ROW_TARGETS else 0


def _n_examples(snapshot: Snapshot, target: str, layer: str) -> int:
    """Return how many examples the rows are of; their own number where unknown."""
    X = snapshot.streams[target, layer]
    if target not in ROW_TARGETS:
        return _n_samples(target, X)
    which = snapshot.streams.get((EXAMPLES, f"{target}:{layer}"))
    if which is not None:
        return len(which.unique())
    n = 0 if snapshot.labels is None else len(snapshot.labels)
    return n if n and len(X) % n == 0 else len(X)


def _with_spectrum(base: Row, X: Tensor) -> _Waiting:
    """Return rows, or the moments of some, or a note why they have no spectrum."""
    streamed = base["target"] == "moments"
    if base["n_samples"] < 2 or not X.numel() or (streamed and not is_finite(X)):
        return _note(base, _NO_SPECTRUM), None
    if not streamed:
        return base, X  # whoever multiplies them finds out whether they are finite
    try:
        return base, Moments.from_tensor(X)
    except MetricError as error:
        return _note(base, str(error)), None


def _spectrum_rows(waiting: Sequence[_Waiting], wanted: frozenset[str]) -> list[Row]:
    """Return every metric of all waiting spectra, decomposed together."""
    table: dict[str, Callable[[Any], Tensor]] = SPECTRUM_METRICS
    read: Callable[[list[Any]], Any]
    if wanted.intersection(SPECTRUM_METRICS) <= _INVARIANT.keys():
        table, read = _INVARIANT, invariants
    elif wanted & _OF_SMALL_EIGENVALUES:
        read = spectra
    else:
        read = partial(spectra, accuracy="ranks")
    done = iter(_each(read, [X for _, X in waiting if X is not None]))
    rows: list[Row] = []
    for base, X in waiting:
        one = None if X is None else next(done)
        if one is None or isinstance(one, MetricError):
            if one is not None:
                not_finite = isinstance(one, NonFiniteError)
                base = _note(base, _NO_SPECTRUM if not_finite else str(one))
            rows += [
                base | {"metric": name, "value": math.nan}
                for name in SPECTRUM_METRICS
                if name in wanted
            ]
            continue
        if one.degenerate:
            base = _note(base, f"degenerate: {one.degenerate}")
        if one.n_samples < 5 * one.n_features:
            base = _note(base, "n_samples < 5 n_features")
        elif base["n_examples"] < 5 * one.n_features:
            # Rows of one example, as tokens, are not independent.
            base = _note(base, f"{base['n_examples']} examples < 5 n_features")
        rows += _apply(table, wanted, base, one)
    return rows


def _each(read: Callable[[list[Any]], Any], Xs: list[Any]) -> list[Any]:
    """Return what is read of each, or the error; together, unless there is one."""
    try:
        return list(read(Xs))
    except MetricError as error:
        if len(Xs) == 1:
            return [error]
    return [one for X in Xs for one in _each(read, [X])]


def _note(base: Row, text: str) -> Row:
    return base | {"note": "; ".join(filter(None, [base["note"], text]))}


# -- checks -------------------------------------------------------------------
def _check_layers(runs: Sequence[Run], layers: str) -> None:
    known = {layer for run in runs for _, layer in run.streams}
    if known and not any(fnmatch.fnmatchcase(name, layers) for name in known):
        raise UnknownLayer(
            f"no recorded layer matches {layers!r}{suggest(layers, known)}"
        )
