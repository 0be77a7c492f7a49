"""From stores to figures: the same results over seeds, drawn by ``repscope.plots``.

Runs are grouped by optimizer; their seeds make the mean and the interval. A run that
diverged is left out of a figure and named in its caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repscope import plots
from repscope.analysis import (
    accuracy_matrix,
    example_labels,
    measure,
    never_updated_weights,
    optimizer_of,
    sparsity_curves,
    task_ends,
)
from repscope.errors import UnknownLayer, UnknownName, UsageError, suggest
from repscope.metrics.alignment import class_cosine
from repscope.metrics.comparison import band, mean_interval
from repscope.metrics.continual import average_accuracy, learning_accuracy
from repscope.metrics.spectra import spectra
from repscope.metrics.weights import weight_histogram as histogram_of
from repscope.results import Band, ClassCosine, Histogram
from repscope.store import Run
from repscope.studies.summary import OPTIMIZER_ORDER

if TYPE_CHECKING:
    import pandas as pd

_GRID_PER_TASK = 10


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure with its numbers.

    Attributes:
        kind: A row of ``FIGURES``.
        title: Heading.
        caption: What is drawn, on which inputs, over how many seeds.
        figure: A matplotlib figure, for `repscope.plots.save`.
        table: The numbers, tidy.
    """

    kind: str
    title: str
    caption: str
    figure: Any
    table: pd.DataFrame


def draw(kind: str, runs: Sequence[Run], *, layer: str | None = None) -> Drawn:
    """Return a figure of some runs.

    Args:
        kind: A row of ``FIGURES``.
        runs: Stores, of one study.
        layer: Which recorded layer; by default the last one before the output.

    Returns:
        The figure with its caption and numbers.

    Raises:
        UnknownName: If there is no such kind.
        UsageError: If no run can be drawn, or a store lacks what the kind needs.
    """
    if kind not in FIGURES:
        raise UnknownName(
            f"unknown plot {kind!r}{suggest(kind, FIGURES)} "
            f"(known: {', '.join(FIGURES)})"
        )
    whole = [run for run in runs if "diverged" not in run.tags]
    if not whole:
        raise UsageError(f"nothing to draw: all {len(runs)} runs diverged")
    groups: dict[str, list[Run]] = {}
    for run in sorted(whole, key=run_order):
        groups.setdefault(optimizer_of(run), []).append(run)
    drawn = FIGURES[kind](groups, layer)
    lost = len(runs) - len(whole)
    note = f" {lost} diverged run(s) left out." if lost else ""
    return Drawn(kind, drawn.title, drawn.caption + note, drawn.figure, drawn.table)


# -- shared by the kinds --------------------------------------------------------
Groups = Mapping[str, Sequence[Run]]


def run_order(run: Run) -> tuple[int, str, str]:
    """Return a sort key: optimizers in the order used everywhere, then by name."""
    name = optimizer_of(run)
    known = OPTIMIZER_ORDER
    return (known.index(name) if name in known else len(known), name, run.name)


def _layer(groups: Groups, layer: str | None, *, target: str = "outputs") -> str:
    first = next(iter(groups.values()))[0]
    layers = [name for kind, name in first.streams if kind == target]
    if layer is None:
        if not layers:
            raise UsageError(f"{first.name} has no recorded activations to draw")
        hidden = [name for name in layers if name.startswith("hidden")]
        return (hidden or layers)[-1]
    if layer not in layers:
        raise UnknownLayer(
            f"{first.name} has no layer {layer!r}{suggest(layer, layers)}"
        )
    return layer


def _spectral(groups: Groups, layer: str | None) -> str:
    """Return the target to take spectra of: outputs, or moments where only they are."""
    streams = next(iter(groups.values()))[0].streams
    known = {kind for kind, name in streams if layer in (None, name)}
    return "moments" if "moments" in known and "outputs" not in known else "outputs"


def _seeds(groups: Groups) -> str:
    counts = sorted({len(runs) for runs in groups.values()})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts == [1]:
        return "n = 1 run, no interval"
    return f"mean and 95 % t interval over n = {n} seeds"


def _frames(results: Mapping[str, Any]) -> pd.DataFrame:
    import pandas as pd

    frames = {name: result.to_frame() for name, result in results.items()}
    table: pd.DataFrame = pd.concat(frames, names=["optimizer"])
    return table.reset_index("optimizer").reset_index(drop=True)


def _inputs(groups: Groups, *, target: str = "outputs") -> str:
    first = next(iter(groups.values()))[0]
    if target == "moments":
        return "the rows streamed since the record before"
    probe = first.meta.get("recorder", {}).get("probe")
    return f"{probe['n_samples']} probe inputs" if probe else "the last training batch"


# -- one function a kind --------------------------------------------------------
def accuracy(groups: Groups, layer: str | None) -> Drawn:
    """Return bars of average and learning accuracy."""
    bars: dict[str, dict[str, Any]] = {"average": {}, "right after learning": {}}
    for name, runs in groups.items():
        matrices = [_matrix(run) for run in runs]
        for group, reading in zip(
            bars, (average_accuracy, learning_accuracy), strict=True
        ):
            bars[group][name] = mean_interval([float(reading(A)) for A in matrices])
    fig, ax = plots.figure()
    plots.accuracy(bars, ax=ax)
    tables = {
        group: _frames(intervals).assign(reading=group)
        for group, intervals in bars.items()
    }
    caption = (
        "Test accuracy after the whole sequence, averaged over its tasks, and the "
        f"accuracy on each task right after learning it; {_seeds(groups)}."
    )
    import pandas as pd

    table = pd.concat(tables.values(), ignore_index=True)
    return Drawn("accuracy", "Accuracy", caption, fig, table)


def spectrum(groups: Groups, layer: str | None) -> Drawn:
    """Return covariance spectra, raw and as shares, with the effective rank marked.

    Raises:
        UsageError: If the seeds differ in the width of the layer.
    """
    target = _spectral(groups, layer)
    chosen = _layer(groups, layer, target=target)
    bands: dict[str, Band] = {}
    shares: dict[str, Band] = {}
    marks: dict[str, float] = {}
    for name, runs in groups.items():
        read = Run.moments if target == "moments" else Run.read
        found = spectra([read(run, chosen) for run in runs])
        if len({s.n_features for s in found}) > 1:
            raise UsageError(f"the runs of {name!r} differ in the width of {chosen!r}")
        index = torch.arange(1, found[0].n_features + 1)
        values = [s.eigenvalues for s in found]
        bands[name] = band(values, x=index)
        shares[name] = band([v / v.sum() for v in values], x=index)
        marks[name] = float(torch.stack([s.effective_rank for s in found]).mean())
    fig, (left, right) = plots.figure(1, 2, width="double")
    plots.spectrum(bands, ax=left, marks=marks)
    plots.spectrum(shares, ax=right, marks=marks, normalize=True)
    caption = (
        f"Eigenvalues of the centred covariance of {chosen} at the last record, on "
        f"{_inputs(groups, target=target)}: raw (left) and as shares of the trace "
        f"(right). Marks: effective rank, exp of the entropy of the shares; "
        f"{_seeds(groups)}."
    )
    return Drawn("spectrum", "Covariance spectra", caption, fig, _frames(bands))


def alignment(groups: Groups, layer: str | None) -> Drawn:
    """Return heat maps of the cosine between class means, side by side.

    Raises:
        UsageError: If no run has features that point anywhere.
    """
    chosen = _layer(groups, layer)
    cosines: dict[str, ClassCosine] = {}
    for name, runs in groups.items():
        found = [_class_cosine(run, chosen) for run in runs]
        cosines[name] = ClassCosine(
            torch.stack([c.matrix for c in found]).nanmean(0),
            found[0].classes,
            torch.stack([c.norms for c in found]).mean(0),
            torch.stack([c.mean_share for c in found]).mean(),
            sum(c.n_excluded for c in found),
        )
    # A dead network has zero features everywhere, and no cosine.
    dead = [name for name, c in cosines.items() if not c.matrix.isfinite().any()]
    for name in dead:
        del cosines[name]
    if not cosines:
        raise UsageError(f"all features of {chosen} are zero in every run")
    fig, axes = plots.figure(1, len(cosines), width="double")
    low = min(float(c.matrix[c.matrix.isfinite()].min()) for c in cosines.values())
    panels = _each(axes)
    for ax, (name, cosine) in zip(panels, cosines.items(), strict=True):
        plots.alignment(
            cosine,
            ax=ax,
            vmin=low,
            vmax=1.0,
            colorbar=ax is panels[-1],
            title=_titled(name, cosine),
        )
    caption = (
        f"Uncentred cosine between class-mean features of {chosen} at the last "
        f"record, on {_inputs(groups)}, averaged over the seeds; in the titles the "
        f"mean off the diagonal. ReLU features are non-negative, so no cosine is below "
        f"0. One colour scale for all."
        f"{_without(dead)}"
    )
    return Drawn("alignment", "Class cosine", caption, fig, _frames(cosines))


def forgetting(groups: Groups, layer: str | None) -> Drawn:
    """Return the accuracy on each task at the end of the sequence."""
    bands: dict[str, Band] = {}
    for name, runs in groups.items():
        final = [_matrix(run)[-1] for run in runs]
        bands[name] = band(final, x=torch.arange(1, len(final[0]) + 1))
    first = next(iter(groups.values()))[0]
    names = first.meta.get("tasks")
    fig, ax = plots.figure()
    short = names if names and max(map(len, names)) < 6 else None
    plots.forgetting(
        bands, ax=ax, ticks=short, xlabel="class pair" if short else "task"
    )
    caption = (
        "Test accuracy on each task after the last one was learned, all classes "
        f"competing; {_seeds(groups)}. A t interval knows no upper end of accuracy."
    )
    return Drawn("forgetting", "Accuracy per task", caption, fig, _frames(bands))


def rank_over_time(groups: Groups, layer: str | None) -> Drawn:
    """Return the effective rank over training, task by task."""
    target = _spectral(groups, layer)
    chosen = _layer(groups, layer, target=target)
    bands: dict[str, Band] = {}
    n_tasks = 0
    for name, runs in groups.items():
        frame = measure(runs, metrics=["effective_rank"], layers=chosen)
        frame = frame[frame["target"] == target]
        paths = [_rank_path(run, frame) for run in runs]
        n_tasks = max(n_tasks, *(_n_tasks(run) for run in runs))
        grid = torch.unique(torch.cat([x for x, _ in paths]))
        if n_tasks:
            grid = torch.linspace(0, n_tasks, n_tasks * _GRID_PER_TASK + 1).double()
            paths = [(grid, _interpolate(grid, x, y)) for x, y in paths]
        bands[name] = band([_at(grid, x, y) for x, y in paths], x=grid)
    fig, ax = plots.figure()
    inner = list(range(1, n_tasks))
    plots.rank_over_time(bands, ax=ax, boundaries=inner or None)
    ax.set_xlabel("tasks completed" if n_tasks else "updates")
    axis = (
        "Progress within a task is updates over the updates that the seed took, "
        "interpolated between captures, because seeds stop at different times. "
        if n_tasks
        else ""
    )
    caption = (
        f"Effective rank (eigenvalues, centred) of {chosen} on "
        f"{_inputs(groups, target=target)}. "
        f"{axis}{_seeds(groups).capitalize()}."
    )
    return Drawn(
        "rank_over_time", "Effective rank over training", caption, fig, _frames(bands)
    )


def weight_histogram(groups: Groups, layer: str | None) -> Drawn:
    """Return weight-magnitude histograms, pooled over layers and seeds."""
    results = {}
    for name, runs in groups.items():
        pairs = [pair for run in runs for pair in _matrices(run)]
        results[name] = histogram_of(
            [w for w, _ in pairs], exclude=[mask for _, mask in pairs]
        )
    fig, ax = plots.figure()
    plots.weight_histogram(results, ax=ax)
    caption = (
        "Magnitudes of all weights of matrices (biases left out) at the last record, "
        f"pooled over layers and n = {len(next(iter(groups.values())))} seeds; equal "
        f"edges for all.{_left_out(results)}"
    )
    return Drawn(
        "weight_histogram", "Weight magnitudes", caption, fig, _frames(results)
    )


def sparsity(groups: Groups, layer: str | None) -> Drawn:
    """Return accuracy against the share of weights set to zero."""
    import pandas as pd

    scopes = {"global": "all layers at once", "balanced": "layers scaled to equal RMS"}
    fig, axes = plots.figure(1, 2, width="double", sharey=True)
    tables = []
    for ax, (scope, title) in zip(_each(axes), scopes.items(), strict=True):
        bands = {name: _sparsity_band(runs, scope) for name, runs in groups.items()}
        plots.sparsity(bands, ax=ax, title=title)
        tables.append(_frames(bands).assign(scope=scope))
    caption = (
        "Test accuracy with the smallest weights set to zero, without retraining: "
        "one threshold for all layers (left), and with each layer first divided by "
        f"its root mean square (right); {_seeds(groups)}."
    )
    table = pd.concat(tables, ignore_index=True)
    return Drawn("sparsity", "Accuracy against sparsity", caption, fig, table)


# -- pieces ---------------------------------------------------------------------
def _each(axes: Any) -> list[Any]:
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def _matrix(run: Run) -> Tensor:
    matrix = accuracy_matrix(run)
    if matrix is None:
        raise UsageError(
            f"{run.name} has no accuracy matrix (scalars accuracy/<j> at the tags "
            f"task-<i>)"
        )
    return matrix


def _class_cosine(run: Run, layer: str) -> ClassCosine:
    *_, last = run.snapshots(target="outputs", layers=[layer])
    X = last.streams["outputs", layer]
    y = example_labels(run, last, layer)
    if y is None:
        raise UsageError(f"{run.name} has no labels for the rows of {layer!r}")
    return class_cosine(X, y)


def _without(dead: Sequence[str]) -> str:
    names = ", ".join(map(plots.display_name, dead))
    return f" Zero features, hence no cosine: {names}." if dead else ""


def _titled(name: str, cosine: ClassCosine) -> str:
    off = ~torch.eye(len(cosine.classes), dtype=torch.bool)
    mean = float(cosine.matrix[off].nanmean())
    return f"{plots.display_name(name)}: {mean:.3f}"


def _matrices(run: Run) -> list[tuple[Tensor, Tensor]]:
    names = [layer for target, layer in run.streams if target == "weights"]
    if not names:
        raise UsageError(f"{run.name} has no weights; record with capture='weights'")
    dark = never_updated_weights(run)
    weights = {name: run.read(name, target="weights") for name in names}
    return [
        (w, dark.get(name, torch.zeros_like(w, dtype=torch.bool)))
        for name, w in weights.items()
        if w.ndim >= 2
    ]


def _left_out(results: Mapping[str, Histogram]) -> str:
    counts = {name: h.n_excluded for name, h in results.items() if h.n_excluded}
    if not counts:
        return ""
    said = ", ".join(f"{count:,} ({name})" for name, count in counts.items())
    return f" Weights that were never updated are left out: {said}."


def _sparsity_band(runs: Sequence[Run], scope: str) -> Band:
    curves = [sparsity_curves(run).get(scope) for run in runs]
    found = [curve for curve in curves if curve is not None]
    if len(found) < len(curves):
        raise UsageError(
            f"{runs[0].name} has no sparsity curve; run `repscope study sparsity`, "
            f"or call rs.sparsity_curve on a model"
        )
    return band([curve.score for curve in found], x=found[0].sparsity)


def _n_tasks(run: Run) -> int:
    """Return the number of tasks of a sequence, 0 when there is no sequence."""
    n = len(task_ends(run))
    return n if n > 1 else 0


def _rank_path(run: Run, frame: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """Return where on the x axis a run was looked at, and its rank there."""
    rows = frame[frame["run"] == run.name].drop_duplicates("step", keep="last")
    steps = torch.tensor(rows["step"].tolist(), dtype=torch.float64)
    ranks = torch.tensor(rows["value"].tolist(), dtype=torch.float64)
    if not _n_tasks(run):
        return steps, ranks
    bounds = torch.tensor([0, *task_ends(run).values()], dtype=torch.float64)
    return _interpolate(steps, bounds, torch.arange(len(bounds)).double()), ranks


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    import numpy as np

    return torch.as_tensor(np.interp(at.numpy(), x.numpy(), y.numpy()))


def _at(grid: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return ``y`` on the grid, NaN where this run has no record."""
    values = torch.full_like(grid, torch.nan)
    values[torch.searchsorted(grid, x)] = y
    return values


FIGURES: Mapping[str, Callable[[Groups, str | None], Drawn]] = {
    "accuracy": accuracy,
    "spectrum": spectrum,
    "alignment": alignment,
    "forgetting": forgetting,
    "rank_over_time": rank_over_time,
    "weight_histogram": weight_histogram,
    "sparsity": sparsity,
}
