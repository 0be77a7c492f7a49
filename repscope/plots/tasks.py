"""Accuracy: overall, and per task at the end of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from repscope.errors import UsageError
from repscope.plots._axes import (
    GREY,
    Array,
    check_drawable,
    current,
    entry,
    finish,
    inches,
    labelled,
    numbers,
    small,
)
from repscope.plots.palette import display_name, style
from repscope.results import Band, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def forgetting(
    results: Band | Mapping[str, Band],
    *,
    ax: Axes | None = None,
    ticks: Sequence[str] | None = None,
    xlabel: str = "task",
    ylabel: str = "accuracy at the end",
    title: str | None = None,
) -> Axes:
    """Draw the accuracy on each task after the last one, with its interval over seeds.

    Args:
        results: ``label -> Band`` with task numbers (from 1) as ``x``, or one ``Band``.
        ax: Where to draw; by default the current axes.
        ticks: A name for each task, such as ``"0/1"``; by default its number.
        xlabel: What the tasks are.
        ylabel: What was scored.
        title: Title of the axes.

    Returns:
        The axes drawn on.

    Raises:
        UsageError: If ``ticks`` does not name every task.

    Example:
        >>> import torch, repscope.plots as plots
        >>> fig, ax = plots.figure()
        >>> task, mean = torch.tensor([1, 2]), torch.tensor([0.6, 0.9])
        >>> band = Band(task, mean, mean - 0.1, mean + 0.1, torch.tensor([5, 5]))
        >>> plots.forgetting({"sgd": band}, ax=ax).get_xlabel()
        'task'
    """
    ax = current(ax)
    bands = labelled(results, Band, what="forgetting")
    drawable = {
        k: bool(np.isfinite(numbers(b.estimate)).any()) for k, b in bands.items()
    }
    check_drawable(drawable, what="forgetting", need="finite values")
    tasks = sorted({int(task) for band in bands.values() for task in band.x})
    if ticks is not None and len(ticks) != len(tasks):
        raise UsageError(f"ticks must name {len(tasks)} tasks, got {len(ticks)} names")
    offsets = (np.arange(len(bands)) - (len(bands) - 1) / 2) * 0.72 / len(bands)
    for offset, (label, band) in zip(offsets, bands.items(), strict=True):
        x, y = numbers(band.x) + offset, numbers(band.estimate)
        text = entry(label, "" if drawable[label] else "no finite values")
        low, high = numbers(band.low), numbers(band.high)
        _draw_points(ax, label, x, y, low, high, text=text)
    for task in tasks[::2]:
        ax.axvspan(task - 0.5, task + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
    ax.set_xlim(tasks[0] - 0.5, tasks[-1] + 0.5)
    ax.set_xticks(tasks, ticks if ticks is not None else [str(task) for task in tasks])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    finish(ax, title=title, handle=1.0)
    return ax


def _draw_points(
    ax: Axes,
    label: str,
    x: Array,
    y: Array,
    low: Array,
    high: Array,
    *,
    text: str,
) -> None:
    look = style(label)
    ax.vlines(x, low, high, color=look.color, linewidth=1.0, zorder=3)
    for end in (low, high):
        ax.plot(x, end, "_", color=look.color, markersize=4.5, zorder=3)
    ax.plot(
        x,
        y,
        linestyle="none",
        marker=look.marker,
        color=look.color,
        markersize=5,
        markeredgewidth=0,
        label=text,
        zorder=4,
    )


def accuracy(
    results: Interval | Mapping[str, Interval] | Mapping[str, Mapping[str, Interval]],
    *,
    ax: Axes | None = None,
    ylabel: str = "accuracy",
    title: str | None = None,
) -> Axes:
    """Draw bars with interval whiskers, the number of seeds named below or beside.

    Args:
        results: ``label -> Interval``, or ``group -> label -> Interval``; or one
            ``Interval``.
        ax: Where to draw; by default the current axes.
        ylabel: What was scored.
        title: Title of the axes.

    Returns:
        The axes drawn on.

    Example:
        >>> import repscope.plots as plots
        >>> fig, ax = plots.figure()
        >>> bar = Interval(0.9, 0.88, 0.92, 5, "t, 95 %")
        >>> plots.accuracy({"sgd": bar, "adamw": bar}, ax=ax).get_ylabel()
        'accuracy'
    """
    ax = current(ax)
    groups = _groups(results)
    bars = [bar for group in groups.values() for bar in group.items()]
    check_drawable(
        {label: bool(np.isfinite(bar.estimate)) for label, bar in bars},
        what="accuracy",
        need="finite estimates",
    )
    places = _places([len(group) for group in groups.values()])
    n_differs = len({bar.n for _, bar in bars}) > 1
    named: set[str] = set()
    for place, (label, bar) in zip(np.concatenate(places), bars, strict=True):
        new = "" not in groups and label not in named
        _draw_bar(ax, float(place), label, bar, text=entry(label) if new else "")
        named.add(label)
    _write_bars(ax, np.concatenate(places), [bar for _, bar in bars], n=n_differs)
    if "" in groups:
        _name_slots(ax, places[0], [display_name(label) for label, _ in bars])
    else:
        _name_slots(ax, np.array([p.mean() for p in places]), list(groups))
    ax.set_xlim(-0.7, places[-1][-1] + 0.7)
    ax.set(xlabel=_caption([bar for _, bar in bars]), ylabel=ylabel)
    finish(ax, title=title, handle=1.0)
    return ax


def _groups(results: Any) -> dict[str, dict[str, Interval]]:
    """Return ``group -> label -> interval``; without groups, one with no name."""
    nested = isinstance(results, Mapping) and any(
        isinstance(value, Mapping) for value in results.values()
    )
    if not nested:
        return {"": labelled(results, Interval, what="accuracy")}
    return {
        group: labelled(members, Interval, what="accuracy", at=f" in group {group!r}")
        for group, members in results.items()
    }


def _places(sizes: list[int]) -> list[Array]:
    """Return bar positions: one slot a bar, one empty slot between groups."""
    starts = np.cumsum([0, *(size + 1 for size in sizes[:-1])])
    return [start + np.arange(float(n)) for start, n in zip(starts, sizes, strict=True)]


def _draw_bar(ax: Axes, place: float, label: str, bar: Interval, *, text: str) -> None:
    color = style(label).color
    ax.bar(place, bar.estimate, width=0.8, color=color, alpha=0.35, linewidth=0)
    at, y, low, high = (
        np.array([value]) for value in (place, bar.estimate, bar.low, bar.high)
    )
    _draw_points(ax, label, at, y, low, high, text=text)


def _name_slots(ax: Axes, at: Array, names: list[str]) -> None:
    """Write names below the bars, slanted where they would run into each other."""
    room = 72 * inches(ax)[0] / len(names)
    if room < 0.66 * small(ax) * max(map(len, names)):
        ax.set_xticks(at, names, rotation=30, ha="right", rotation_mode="anchor")
    else:
        ax.set_xticks(at, names)
    ax.tick_params(axis="x", length=0)


def _write_bars(ax: Axes, places: Array, bars: list[Interval], *, n: bool) -> None:
    """Write each number above its whisker and, where it differs, n at the foot."""
    size = 0.86 * small(ax)
    slot = inches(ax)[0] * 72 / (places[-1] + 1.4)
    upright = slot < 3.2 * size  # about the width of "0.923"
    values = [bar.estimate for bar in bars if np.isfinite(bar.estimate)]
    digits = 3 if max(map(abs, values)) <= 1 else 1
    ax.margins(y=(3.6 if upright else 1.6) * size / (72 * inches(ax)[1]))
    for place, bar in zip(places, bars, strict=True):
        finite = np.isfinite(bar.estimate)
        top = np.nanmax([bar.estimate, bar.high]) if finite else 0.0
        ax.annotate(
            f"{bar.estimate:.{digits}f}" if finite else "no finite value",
            (place, top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90 if upright or not finite else 0,
            fontsize=size,
            color="#222222" if finite else GREY,
        )
        if n and finite:
            ax.annotate(
                f"n={bar.n}",
                (place, 0),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90 if upright else 0,
                fontsize=size,
            )


def _caption(bars: list[Interval]) -> str:
    """Return what a bar is, with n where it is one number."""
    methods, seeds = {bar.method for bar in bars}, {bar.n for bar in bars}
    method = f" ({methods.pop()})" if len(methods) == 1 else ""
    return f"mean and interval{method}" + (
        f", n = {seeds.pop()}" if len(seeds) == 1 else ""
    )


TASK_PLOTS: dict[str, Callable[..., Any]] = {
    "forgetting": forgetting,
    "accuracy": accuracy,
}
