"""Spectra of covariances and weights, and their rank over training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from repscope.errors import UsageError
from repscope.plots._axes import (
    GREY,
    Array,
    check_drawable,
    check_known,
    current,
    draw_line,
    entry,
    finish,
    labelled,
    numbers,
    small,
)
from repscope.plots.palette import style
from repscope.results import Band, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DECADES = 8
_KINDS = {
    "covariance": "covariance eigenvalue",
    "second_moment": "second-moment eigenvalue",
    "weight": "squared singular value",
}


def spectrum(
    results: Spectrum | Band | Mapping[str, Spectrum | Band],
    *,
    ax: Axes | None = None,
    marks: Mapping[str, float | Tensor] | None = None,
    band: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    normalize: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw eigenvalues against their index, with the effective rank marked.

    The axis is logarithmic and shows at most 8 decades below the largest value; values
    that are not positive have no place on it and are left out. Raw spectra also show
    scale: draw a second panel with ``normalize=True`` before comparing shapes.

    Args:
        results: One spectrum or ``label -> Spectrum``. A ``Band`` over seeds has the
            index (from 1) as ``x`` and the mean eigenvalue as ``estimate``.
        ax: Where to draw; by default the current axes.
        marks: ``label -> effective rank``; a spectrum brings its own.
        band: ``label -> (low, high)``, each of shape ``(n_features,)``.
        normalize: Divide each line and its band by the sum of the line.
        title: Title of the axes.

    Returns:
        The axes drawn on.

    Raises:
        UsageError: If spectra of different kinds are mixed.

    Example:
        >>> import torch, repscope.plots as plots
        >>> fig, ax = plots.figure()
        >>> index = torch.arange(1, 4)
        >>> mean = torch.tensor([4.0, 2.0, 1.0])
        >>> curve = Band(index, mean, mean * 0.9, mean * 1.1, torch.full((3,), 5))
        >>> plots.spectrum({"sgd": curve}, ax=ax, marks={"sgd": 2.6}).get_yscale()
        'log'
    """
    ax = current(ax)
    lines: dict[str, Spectrum | Band]
    lines = labelled(results, Spectrum, Band, what="spectrum")
    check_known(marks or {}, lines, name="marks")
    check_known(band or {}, lines, name="band")
    kinds = {r.kind for r in lines.values() if isinstance(r, Spectrum)}
    if len(kinds) > 1:
        raise UsageError(
            f"plots.spectrum got {' and '.join(sorted(kinds))} spectra together: their "
            f"values are not comparable, draw one figure for each kind"
        )
    curves = {
        label: _curve(label, result, (band or {}).get(label), normalize=normalize)
        for label, result in lines.items()
    }
    check_drawable(
        {label: bool(np.isfinite(y).any()) for label, (_, y, _) in curves.items()},
        what="spectrum",
        need="finite positive eigenvalues",
    )
    ranks = {label: _rank(label, result, marks) for label, result in lines.items()}
    ax.set_yscale("log")
    for label, (x, y, edges) in curves.items():
        _draw_spectrum(ax, label, x, y, edges, rank=ranks[label])
    _limit_decades(ax)
    quantity = _KINDS[kinds.pop()] if kinds else "eigenvalue"
    ax.set_ylabel(f"{quantity} / sum" if normalize else quantity)
    marked = any(rank is not None for rank in ranks.values())
    ax.set_xlabel("index (marked: effective rank)" if marked else "index")
    ax.set_xlim(left=0)
    finish(ax, title=title)
    return ax


def _curve(
    label: str,
    result: Spectrum | Band,
    band: tuple[Tensor, Tensor] | None,
    *,
    normalize: bool,
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    if isinstance(result, Band):
        x, y = numbers(result.x), numbers(result.estimate)
        band = band or (result.low, result.high)
    else:
        y = numbers(result.eigenvalues)
        x = np.arange(1.0, y.shape[-1] + 1)
    if y.ndim != 1:
        raise UsageError(
            f"plots.spectrum draws one spectrum per label, got a batch of shape "
            f"{y.shape} under {label!r}: index it first"
        )
    total = np.nansum(y) if normalize and np.nansum(y) > 0 else 1.0
    edges = None
    if band is not None:
        # The lower edge may reach zero or less: there the band meets the axis.
        low, high = (numbers(edge) / total for edge in band)
        edges = np.where(low <= 0, np.finfo(np.float64).tiny, low), high
    return x, np.where(y > 0, y, np.nan) / total, edges


def _rank(
    label: str,
    result: Spectrum | Band,
    marks: Mapping[str, float | Tensor] | None,
) -> float | None:
    if marks is not None and label in marks:
        return float(marks[label])
    return float(result.effective_rank) if isinstance(result, Spectrum) else None


def _draw_spectrum(
    ax: Axes,
    label: str,
    x: Array,
    y: Array,
    band: tuple[Array, Array] | None,
    *,
    rank: float | None,
) -> None:
    drawn = np.isfinite(y)
    note = f"{rank:.1f}" if rank is not None and np.isfinite(rank) else ""
    text = entry(label, note if drawn.any() else "no positive values")
    # The only marker on the line is the rank; the legend shows it with the line.
    draw_line(ax, label, x, y, band=band, text=text, markevery=[])
    if rank is None or not rank > 0 or not drawn.any():
        return
    look = style(label)
    height = np.exp(np.interp(rank, x[drawn], np.log(y[drawn])))
    ax.vlines(rank, 0, height, color=look.color, linewidth=0.7, alpha=0.6, zorder=1)
    ax.plot(
        [rank],
        [height],
        marker=look.marker,
        color=look.color,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=4,
    )


def _limit_decades(ax: Axes) -> None:
    """Fit the axis to the lines, not to bands or rules that run off it."""
    values = np.concatenate([numbers(line.get_ydata()) for line in ax.get_lines()])
    values = values[np.isfinite(values) & (values > 0)]
    top = values.max()
    ax.set_ylim(max(values.min(), top * 10.0**-_DECADES) / 1.6, top * 2.2)


def rank_over_time(
    results: Band | Mapping[str, Band],
    *,
    ax: Axes | None = None,
    boundaries: Sequence[float] | None = None,
    ylabel: str = "effective rank",
    title: str | None = None,
) -> Axes:
    """Draw a reading of the spectrum against training steps, with its band over seeds.

    Args:
        results: ``label -> Band`` with steps as ``x``, or one ``Band``.
        ax: Where to draw; by default the current axes.
        boundaries: Where tasks end, ascending; each stretch is named by its number.
            The end of the last task may be left out.
        ylabel: What was read.
        title: Title of the axes.

    Returns:
        The axes drawn on.

    Example:
        >>> import torch, repscope.plots as plots
        >>> fig, ax = plots.figure()
        >>> mean = torch.tensor([40.0, 9.0, 25.0])
        >>> band = Band(torch.arange(3), mean, mean - 1, mean + 1, torch.full((3,), 5))
        >>> plots.rank_over_time({"adamw": band}, ax=ax).get_ylabel()
        'effective rank'
    """
    ax = current(ax)
    lines = labelled(results, Band, what="rank_over_time")
    drawable = {
        k: bool(np.isfinite(numbers(r.estimate)).any()) for k, r in lines.items()
    }
    check_drawable(drawable, what="rank_over_time", need="finite values")
    for label, result in lines.items():
        x, y = numbers(result.x), numbers(result.estimate)
        draw_line(
            ax,
            label,
            x,
            y,
            band=(numbers(result.low), numbers(result.high)),
            text=entry(label, "" if drawable[label] else "no finite values"),
            markevery=max(1, len(x) // 8),
        )
    ax.set_xlabel("training step")
    ax.set_ylabel(ylabel)
    if boundaries:
        steps = np.concatenate([numbers(result.x) for result in lines.values()])
        _draw_tasks(ax, boundaries, start=steps.min(), end=steps.max())
    finish(ax, title=title)
    return ax


def _draw_tasks(
    ax: Axes, boundaries: Sequence[float], *, start: float, end: float
) -> None:
    for step in boundaries:
        ax.axvline(step, color=GREY, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
    ax.margins(y=0.12)
    ends = [*boundaries, end] if boundaries[-1] < end else list(boundaries)
    for number, (left, right) in enumerate(pairwise([start, *ends]), 1):
        ax.annotate(
            f"task {number}" if len(ends) < 6 else str(number),
            ((left + right) / 2, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, -2),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=small(ax),
            color=GREY,
        )


SPECTRUM_PLOTS: dict[str, Callable[..., Any]] = {
    "spectrum": spectrum,
    "rank_over_time": rank_over_time,
}
