"""Magnitudes of weights, and what is left of a model when the small ones go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from repscope.errors import UsageError
from repscope.plots._axes import (
    Array,
    check_drawable,
    current,
    draw_line,
    entry,
    finish,
    labelled,
    numbers,
)
from repscope.plots.palette import style
from repscope.results import Band, Histogram, SparsityCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SPARSITY_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def weight_histogram(
    results: Histogram | Mapping[str, Histogram],
    *,
    ax: Axes | None = None,
    normalize: bool = True,
    title: str | None = None,
) -> Axes:
    """Draw how many weights have which magnitude.

    Both axes are logarithmic: few weights are near zero, and they are the question.
    Weights outside the edges, exact zeros among them, are counted in the legend.

    Args:
        results: One histogram or ``label -> Histogram`` with equal edges.
        ax: Where to draw; by default the current axes.
        normalize: Show shares of all weights of a label instead of counts.
        title: Title of the axes.

    Returns:
        The axes drawn on.

    Raises:
        UsageError: If the edges or the units differ.

    Example:
        >>> import torch, repscope.plots as plots
        >>> fig, ax = plots.figure()
        >>> edges = torch.tensor([0.1, 1.0, 10.0])
        >>> counts = Histogram(torch.tensor([3, 5]), edges, 2, 0, 0)
        >>> plots.weight_histogram({"p-sgd": counts}, ax=ax).get_xscale()
        'log'
    """
    ax = current(ax)
    items = labelled(results, Histogram, what="weight_histogram")
    edges = numbers(next(iter(items.values())).edges)
    if any(not np.array_equal(numbers(h.edges), edges) for h in items.values()):
        raise UsageError(
            "plots.weight_histogram got histograms with different edges: their bins "
            "are not comparable, make them with the same bins"
        )
    units = {histogram.unit for histogram in items.values()}
    if len(units) > 1:
        raise UsageError(
            f"plots.weight_histogram got histograms in different units, "
            f"{sorted(units)}; make them all with the same unit="
        )
    totals = {label: _total(histogram) for label, histogram in items.items()}
    drawable = {label: total > 0 for label, total in totals.items()}
    check_drawable(drawable, what="weight_histogram", need="weights")
    for label, histogram in items.items():
        look = style(label)
        ax.stairs(
            numbers(histogram.counts) / (max(totals[label], 1) if normalize else 1),
            edges,
            color=look.color,
            linestyle=look.dash,
            linewidth=1.2,
            label=entry(label, *_outside(histogram, drawn=drawable[label])),
            zorder=3,
        )
    _magnitude_axis(ax, items, edges)
    # What tells optimizers apart near zero is a share of 1e-4, not of 1e-1.
    ax.set_yscale("log")
    ax.set_ylabel(f"{'share of weights' if normalize else 'weights'} per bin")
    finish(ax, title=title)
    return ax


def _total(histogram: Histogram) -> float:
    inside = float(histogram.counts.sum())
    return inside + histogram.n_zero + histogram.underflow + histogram.overflow


def _outside(histogram: Histogram, *, drawn: bool) -> list[str]:
    if not drawn:
        return ["no weights"]
    parts = {
        "zero": histogram.n_zero,
        "below": histogram.underflow,
        "above": histogram.overflow,
    }
    return [f"{count:,} {name}" for name, count in parts.items() if count]


def _magnitude_axis(ax: Axes, items: Mapping[str, Histogram], edges: Array) -> None:
    """Show the occupied bins, and say how wide a bin is."""
    used = np.flatnonzero(sum(numbers(h.counts) for h in items.values()))
    if used.size:
        ax.set_xlim(
            edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, len(edges) - 1)]
        )
    if edges[0] > 0:
        ax.set_xscale("log")
        width = f"{np.log10(edges[1] / edges[0]):.2g} decades"
    else:
        width = f"{edges[1] - edges[0]:.2g}"
    over = next(iter(items.values())).unit == "rms"
    what = "weight magnitude / RMS of its tensor" if over else "weight magnitude"
    ax.set_xlabel(f"{what} (bins of {width})")


def sparsity(
    results: SparsityCurve | Band | Mapping[str, SparsityCurve | Band],
    *,
    ax: Axes | None = None,
    ylabel: str = "accuracy",
    title: str | None = None,
) -> Axes:
    """Draw the score of a model against the share of its weights set to zero.

    The axis is logarithmic in the weights that remain, so that 90, 95 and 99 % are as
    far apart as they are hard. A level with no weight left has no place on it. The
    untouched model is a point at 0 %.

    Args:
        results: ``label -> SparsityCurve``, or ``Band`` with sparsities as ``x``; or
            one of them.
        ax: Where to draw; by default the current axes.
        ylabel: What ``evaluate`` returned.
        title: Title of the axes.

    Returns:
        The axes drawn on.

    Example:
        >>> import torch, repscope.plots as plots
        >>> fig, ax = plots.figure()
        >>> levels = torch.tensor([0.5, 0.9])
        >>> curve = SparsityCurve(levels, levels / 10, torch.tensor([0.9, 0.7]), 0.95)
        >>> plots.sparsity({"adam": curve}, ax=ax).get_ylabel()
        'accuracy'
    """
    ax = current(ax)
    curves: dict[str, SparsityCurve | Band]
    curves = labelled(results, SparsityCurve, Band, what="sparsity")
    parts = {label: _parts(curve) for label, curve in curves.items()}
    drawable = {k: bool(np.isfinite(y).any()) for k, (_, y, _) in parts.items()}
    check_drawable(drawable, what="sparsity", need="finite scores below 100 % sparsity")
    for label, (x, y, band) in parts.items():
        text = entry(label, "" if drawable[label] else "no finite values")
        every = max(1, len(x) // 8)
        draw_line(ax, label, x, y, band=band, text=text, markevery=every)
        curve = curves[label]
        if isinstance(curve, SparsityCurve):
            look = style(label)
            ax.plot([0.0], [curve.dense_score], look.marker, color=look.color, ms=4)
    _sparsity_axis(ax, max(float(x.max()) for x, _, _ in parts.values() if x.size))
    ax.set_ylabel(ylabel)
    finish(ax, title=title)
    return ax


def _parts(
    curve: SparsityCurve | Band,
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    if isinstance(curve, SparsityCurve):
        x = numbers(curve.sparsity)
        return x[x < 1], numbers(curve.score)[x < 1], None
    x = numbers(curve.x)
    y, low, high = (numbers(v)[x < 1] for v in (curve.estimate, curve.low, curve.high))
    return x[x < 1], y, (low, high)


def _remaining(sparsity: Array) -> Array:
    return -np.log10(np.clip(1 - np.asarray(sparsity), 1e-12, None))


def _removed(position: Array) -> Array:
    return 1 - 10.0 ** -np.asarray(position)


def _sparsity_axis(ax: Axes, top: float) -> None:
    ax.set_xscale("function", functions=(_remaining, _removed))
    end = _remaining(np.array(top))
    pad = 0.03 * max(float(end), 0.3)
    ax.set_xlim(*_removed(np.array([-pad, end + pad])))
    ticks = [tick for tick in _SPARSITY_TICKS if tick <= top + 1e-9]
    ax.set_xticks(ticks, [f"{100 * tick:.3g}" for tick in ticks])
    ax.set_xlabel("weights set to zero (%)")


WEIGHT_PLOTS: dict[str, Callable[..., Any]] = {
    "weight_histogram": weight_histogram,
    "sparsity": sparsity,
}
