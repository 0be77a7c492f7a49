"""Directions of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from repscope.errors import UsageError
from repscope.plots._axes import (
    GREY,
    check_drawable,
    current,
    inches,
    numbers,
    small,
    write_title,
)
from repscope.results import ClassCosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Perceptually uniform and monotone in lightness, so safe for colour-blind readers and
# grey prints; its upper fifth, where cosines of ReLU features lie, changes hue as well.
_COLORS = "viridis"
_LEGIBLE = 3.8  # points


def alignment(
    result: ClassCosine,
    *,
    ax: Axes | None = None,
    vmin: float = 0.0,
    vmax: float = 1.0,
    annotate: bool = True,
    colorbar: bool = True,
    title: str | None = None,
) -> Axes:
    """Draw the cosine between every two classes as a heat map.

    Cells without a value (an excluded class) are grey and hatched. Panels that are to
    be compared need one ``vmin`` and ``vmax``.

    Args:
        result: What ``class_cosine`` returned.
        ax: Where to draw; by default the current axes.
        vmin: Cosine at the dark end; smaller ones look like it.
        vmax: Cosine at the light end.
        annotate: Write each number into its cell, where the cells are large enough.
        colorbar: Draw a colour bar beside the map; in a row, the last panel needs one.
        title: Title of the axes, for example with the mean over class pairs.

    Returns:
        The axes drawn on.

    Raises:
        UsageError: If ``result`` is anything else.

    Example:
        >>> import torch, repscope.plots as plots
        >>> fig, ax = plots.figure()
        >>> cosine = ClassCosine(
        ...     torch.eye(2), torch.arange(2), torch.ones(2), torch.tensor(0.5), 0
        ... )
        >>> plots.alignment(cosine, ax=ax, title="SGD").get_title(loc="left")
        'SGD'
    """
    import seaborn as sns

    ax = current(ax)
    if not isinstance(result, ClassCosine):
        raise UsageError(
            f"plots.alignment draws one ClassCosine, got {type(result).__name__}: draw "
            f"one panel for each"
        )
    matrix, classes = numbers(result.matrix), result.classes.tolist()
    missing = ~np.isfinite(matrix)
    check_drawable({"matrix": not missing.all()}, what="alignment", need="cosine")
    written = [[_short(cell) for cell in row] for row in matrix]
    size = _cell_font(ax, len(classes))
    sns.heatmap(
        matrix,
        ax=ax,
        vmin=vmin,
        vmax=vmax,
        cmap=_COLORS,
        mask=missing,
        square=True,
        annot=written if annotate and size >= _LEGIBLE else None,
        fmt="",
        annot_kws={"fontsize": size},
        xticklabels=classes,
        yticklabels=classes,
        linewidths=0.4,
        linecolor="white",
        cbar=False,
    )
    # A centred square moves a little at every layout; in a corner it stays.
    ax.set_anchor("NW")
    ax.grid(visible=False)
    if missing.any():
        ax.patch.set(
            visible=True, facecolor="#E6E6E6", edgecolor="#A0A0A0", hatch="////"
        )
    ax.tick_params(length=0, labelrotation=0)
    ax.set(xlabel="class", ylabel="class")
    if colorbar:
        _colorbar(ax, extend="min" if (matrix[~missing] < vmin).any() else "neither")
    write_title(ax, title)
    return ax


def _short(value: float) -> str:
    """Return two decimals without the leading zero: ten of them share a column."""
    return f"{value:.2f}".replace("0.", ".", 1).replace("1.00", "1")


def _cell_font(ax: Axes, n_classes: int) -> float:
    return min(small(ax), 72 * min(inches(ax)) / n_classes / 2.2)


def _colorbar(ax: Axes, *, extend: str) -> None:
    # An inset, because a bar made by the figure would shrink this panel of a row.
    inset = ax.inset_axes((1.04, 0.04, 0.05, 0.92))
    bar = ax.figure.colorbar(ax.collections[0], cax=inset, extend=extend)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=small(ax), length=2, width=0.5, color=GREY)
    bar.set_label("cosine", size=small(ax))


CLASS_PLOTS: dict[str, Callable[..., Any]] = {"alignment": alignment}
