"""What every plot shares: reading its arguments, one line with its band, the legend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from repscope.errors import UnknownName, UsageError, suggest
from repscope.plots.palette import display_name, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
Result = TypeVar("Result")

GREY = "#6B6B6B"
"""Quiet text and rules that carry no data."""
_GAP, _GUTTER = 0.6, 1.4  # legend: sample to name, column to column


def current(ax: Axes | None) -> Axes:
    """Return ``ax``, or the current axes where none was given."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()


def numbers(value: Any) -> Array:
    """Return a tensor's values as float64, on the CPU and without a graph."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value, dtype=np.float64)


def labelled(
    results: Any, *kinds: type[Result], what: str, at: str = ""
) -> dict[str, Result]:
    """Return ``label -> result``; a single result gets the empty label.

    Args:
        results: One result, or a mapping of them.
        *kinds: Result classes the plot can draw.
        what: Name of the plot for the message.
        at: Where in nested results, for the message.

    Returns:
        A new dict in the order given.

    Raises:
        UsageError: If there is nothing in it, or something of another class.
    """
    if isinstance(results, kinds):
        return {"": results}
    names = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(results, Mapping):
        raise UsageError(
            f"plots.{what} draws {names} or a mapping label -> {names}, got "
            f"{type(results).__name__}{at}"
        )
    if not results:
        raise UsageError(f"plots.{what} got no results{at}: nothing to draw")
    for label, result in results.items():
        if not isinstance(label, str) or not isinstance(result, kinds):
            raise UsageError(
                f"plots.{what} draws {names} under text labels, got "
                f"{type(result).__name__} under {label!r}{at}"
            )
    return dict(results)


def check_known(extras: Iterable[str], drawn: Iterable[str], *, name: str) -> None:
    """Refuse a label in an option that no result carries.

    Args:
        extras: Labels the option names.
        drawn: Labels of the results.
        name: The option, for the message.

    Raises:
        UnknownName: If a label is not drawn.
    """
    drawn = list(drawn)
    for label in extras:
        if label not in drawn:
            raise UnknownName(
                f"{name} names {label!r}, which is not among the results"
                f"{suggest(label, drawn)}"
            )


def check_drawable(drawable: Mapping[str, bool], *, what: str, need: str) -> None:
    """Refuse to draw an empty figure; a single empty label only says so in the legend.

    Args:
        drawable: Whether each label has anything to draw.
        what: Name of the plot for the message.
        need: What a value must be to be drawn.

    Raises:
        UsageError: If no label has.
    """
    if not any(drawable.values()):
        names = ", ".join(repr(label) for label in drawable)
        raise UsageError(
            f"plots.{what} found no {need} under {names}: check whether these runs "
            f"diverged or the layer is constant"
        )


def entry(label: str, *details: str) -> str:
    """Return the legend text of a label; what is in brackets explains it."""
    name = display_name(label)
    extra = ", ".join(detail for detail in details if detail)
    text = f"{name} ({extra})" if name and extra else name or extra
    # matplotlib hides labels that start with an underscore.
    return f" {text}" if text.startswith("_") else text


def draw_line(
    ax: Axes,
    label: str,
    x: Array,
    y: Array,
    *,
    band: tuple[Array, Array] | None,
    text: str,
    markevery: Any,
) -> None:
    """Draw one line in the look of its label, with its band behind it.

    Args:
        ax: Where to draw.
        label: Whose look.
        x: Positions.
        y: Heights; NaN leaves a gap.
        band: Low and high edge.
        text: Legend text.
        markevery: As for ``Axes.plot``.
    """
    look = style(label)
    ax.plot(
        x,
        y,
        color=look.color,
        linestyle=look.dash,
        linewidth=1.3,
        marker=look.marker,
        markersize=4,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=markevery,
        label=text,
        zorder=3,
    )
    if band is not None and np.isfinite(band[0]).any():
        ax.fill_between(x, *band, color=look.color, alpha=0.16, linewidth=0, zorder=2)


def small(ax: Axes) -> float:
    """Return the size of secondary text in points, relative to the axis label's."""
    return 0.875 * float(ax.xaxis.label.get_fontsize())


def inches(ax: Axes) -> tuple[float, float]:
    """Return width and height of the axes as they are before the final layout."""
    box, dpi = ax.get_window_extent(), ax.figure.dpi
    return box.width / dpi, box.height / dpi


def write_title(ax: Axes, title: str | None, *, above: float = 0.0) -> None:
    """Write a bold title at the left, ``above`` points higher than usual."""
    if title is not None:
        ax.set_title(
            title,
            loc="left",
            pad=4 + above,
            fontsize=ax.xaxis.label.get_fontsize(),
            fontweight="bold",
            parse_math=False,
        )


def finish(ax: Axes, *, title: str | None, handle: float = 2.6) -> None:
    """Write the legend and the title.

    Where a layout engine makes room, the legend goes in columns above the axes:
    inside it would cover a band as soon as six optimizers are drawn.

    Args:
        ax: Axes whose labelled artists are listed.
        title: Title of the axes.
        handle: Width of the sample before each name, in font sizes.
    """
    handles, labels = ax.get_legend_handles_labels()
    size = small(ax)
    rows = 0
    if any(labels):
        place: dict[str, Any] = {"loc": "best", "framealpha": 0.8, "edgecolor": "none"}
        if ax.figure.get_layout_engine() is not None:
            columns = _columns(labels, width=72 * inches(ax)[0] / size, handle=handle)
            rows = math.ceil(len(labels) / columns)
            place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}
            place |= {"ncols": columns, "borderpad": 0}
        legend = ax.legend(
            handles,
            labels,
            fontsize=size,
            borderaxespad=0.5,
            handlelength=handle,
            handletextpad=_GAP,
            columnspacing=_GUTTER,
            labelspacing=0.35,
            **place,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    write_title(ax, title, above=1.45 * size * rows)


def _columns(labels: list[str], *, width: float, handle: float) -> int:
    """Return the most legend columns that fit a width given in font sizes."""
    for rows in range(1, len(labels)):
        starts = range(0, len(labels), rows)
        longest = [max(len(text) for text in labels[i : i + rows]) for i in starts]
        entries = sum(handle + _GAP + 0.58 * length for length in longest)
        if entries + _GUTTER * (len(longest) - 1) < width:
            return len(longest)
    return 1
