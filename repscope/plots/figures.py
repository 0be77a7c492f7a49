"""Figures of a paper's size, and the files they become."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from repscope.errors import UsageError

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS: dict[str, float] = {"single": 3.5, "double": 7.2}
"""Column widths of a two-column paper, in inches."""

_PUBLICATION: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: equal on every machine
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "figure.titlesize": 9.0,
    "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
}
# Glyphs as paths look alike everywhere; the salt makes equal figures equal bytes.
_SVG: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "repscope"}
_NO_METADATA = dict.fromkeys(("Format", "Type", "Creator", "Date"))
_SVG_NAMESPACE = "http://www.w3.org/2000/svg"
_URL = re.compile(r"url\(#([^)]+)\)")


def figure(
    nrows: int = 1,
    ncols: int = 1,
    *,
    width: str = "single",
    height: float | None = None,
    sharey: bool = False,
) -> tuple[Figure, Any]:
    """Return a figure that fits a paper's column, and its axes.

    It belongs to no pyplot state, so nothing has to be closed.

    Args:
        nrows: Rows of axes.
        ncols: Columns of axes.
        width: ``"single"`` (3.5 in) or ``"double"`` (7.2 in) column.
        height: In inches; by default a pleasant shape for the number of axes.
        sharey: Whether the axes of a row have one y axis.

    Returns:
        The figure, and one ``Axes`` or an array of them as ``plt.subplots`` does.

    Raises:
        UsageError: If ``width`` is not a known column.

    Example:
        >>> fig, axes = figure(1, 2, width="double")
        >>> axes.shape, float(fig.get_figwidth())
        ((2,), 7.2)
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if width not in WIDTHS:
        raise UsageError(f"width must be one of {sorted(WIDTHS)}, got {width!r}")
    inches = WIDTHS[width]
    if height is None:
        height = nrows * min(2.8, 0.4 + 0.85 * inches / ncols)
    with mpl.rc_context(_PUBLICATION):
        fig = Figure(figsize=(inches, height), layout="constrained")
        axes = fig.subplots(nrows, ncols, sharey="row" if sharey else False)
    for ax in fig.axes:
        _quiet_ticks(ax)
    return fig, axes


def _quiet_ticks(ax: Axes) -> None:
    # Ticks are made when first needed, after the style above has gone: say it here.
    ax.tick_params(labelsize=7, width=0.6, length=3, color="#444444")
    ax.tick_params(which="minor", width=0.4, length=1.8)
    ax.grid(axis="y", color="#E4E4E4", linewidth=0.5)


def to_svg(figure: Figure, *, title: str) -> str:
    """Return a figure as one ``<svg>`` element to put into a page.

    There is no header, no metadata and no address in it; its ids begin with a digest of
    the drawing, so several figures share a page and equal figures are equal text.

    Args:
        figure: A matplotlib figure.
        title: What a screen reader says; also the tooltip.

    Returns:
        ``<svg role="img" ...><title>...</title>...</svg>``.

    Example:
        >>> fig, ax = figure()
        >>> to_svg(fig, title="nothing yet")[:5]
        '<svg '
    """
    root = _svg_tree(figure)
    heading = ET.Element("title")
    heading.text = title
    root.insert(0, heading)
    prefix = "f" + hashlib.sha256(ET.tostring(root)).hexdigest()[:10] + "-"
    _rename_ids(root, prefix)
    heading.set("id", prefix + "title")
    root.set("role", "img")
    root.set("aria-labelledby", prefix + "title")
    return ET.tostring(root, encoding="unicode")


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as SVG, PNG or PDF, as the suffix says.

    Args:
        figure: A matplotlib figure.
        path: Where to; its folder must exist.

    Returns:
        The path written.

    Raises:
        UsageError: If the suffix is none of these.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png", ".pdf"):
        raise UsageError(
            f"cannot write a figure to {path.name!r}: the suffix must be .svg, .png "
            f"or .pdf"
        )
    if suffix == ".svg":
        root = _svg_tree(figure)
        root.set("xmlns", _SVG_NAMESPACE)
        path.write_bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))
    else:
        undated = {"CreationDate": None} if suffix == ".pdf" else {}
        path.write_bytes(_printed(figure, suffix[1:], metadata=undated))
    return path


def _printed(figure: Figure, kind: str, *, metadata: dict[str, None]) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(_SVG), settled(figure):
        figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
    return buffer.getvalue()


@contextlib.contextmanager
def settled(figure: Figure) -> Iterator[None]:
    """Lay a figure out until nothing moves, and hold it there inside the block.

    Every file is printed like this. One pass is not enough for square axes, and another
    one at the resolution of each file would move them again: equal figures would not
    give equal files. Around several files it saves doing it for each.

    Args:
        figure: A matplotlib figure; one without a layout engine is left as it is.

    Yields:
        Nothing.

    Example:
        >>> fig, ax = figure()
        >>> with settled(fig):
        ...     both = [to_svg(fig, title="a"), to_svg(fig, title="b")]
    """
    from matplotlib.layout_engine import PlaceHolderLayoutEngine

    engine = figure.get_layout_engine()
    if engine is None or isinstance(engine, PlaceHolderLayoutEngine):
        yield
        return
    before: list[tuple[float, ...]] = []
    for _ in range(12):
        figure.draw_without_rendering()
        after = [ax.get_position().bounds for ax in figure.axes]
        if after == before:
            break
        before = after
    figure.set_layout_engine("none")
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


def _svg_tree(figure: Figure) -> ET.Element:
    """Return the drawing without namespaces, style sheet, comments or unused ids."""
    root = ET.fromstring(_printed(figure, "svg", metadata=_NO_METADATA))
    for node in root.iter():
        node.tag = _local(node.tag)
        attributes = {_local(name): value for name, value in node.attrib.items()}
        node.attrib.clear()
        node.attrib.update(attributes)
    for parent in list(root.iter("defs")):
        for sheet in parent.findall("style"):
            parent.remove(sheet)
    # That sheet said this of every element, and would say it of the whole page.
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
    used = {name for node in root.iter() for name in _references(node)}
    for node in root.iter():
        if node.get("id") not in used:
            node.attrib.pop("id", None)
    return root


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _references(node: ET.Element) -> list[str]:
    found = [name for value in node.attrib.values() for name in _URL.findall(value)]
    return [*found, node.get("href", "").removeprefix("#")]


def _rename_ids(root: ET.Element, prefix: str) -> None:
    for node in root.iter():
        for name, value in node.attrib.items():
            if name == "id":
                node.set(name, prefix + value)
            elif name == "href" and value.startswith("#"):
                node.set(name, f"#{prefix}{value[1:]}")
            else:
                node.set(name, _URL.sub(rf"url(#{prefix}\1)", value))
