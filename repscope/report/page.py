"""One self-contained HTML page from tables, figures and verdicts.

The page needs nothing else: figures are inline ``<svg>``, the style sheet is inside,
there is no script and no address of another machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from repscope.errors import UsageError
from repscope.report.table import MISSING

_TEMPLATE = "page.html.jinja"
_SVG = re.compile(r'<svg [^>]*viewBox="0 0 ([\d.]+) ')


@dataclass(frozen=True)
class Table:
    """Numbers already written as text.

    Attributes:
        title: Heading.
        header: Column headings.
        rows: One cell a column, the first names the row; ``None`` is shown as a dash.
        caption: What the numbers are: inputs, layer, definition, interval.
        note: What to know before reading them, or ``""``.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    caption: str = ""
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the runs say about one claim.

    Attributes:
        claim: The claim in words.
        source: Where it was made.
        metric: The one metric that decides it, with its inputs and layer.
        estimate: The difference with its interval, as text.
        margin: The smallest difference that matters, fixed before the run, as text.
        verdict: ``"holds"``, ``"opposite sign"``, ``"no difference"``,
            ``"not decided"`` or ``"not reported"``.
        n: Seeds behind it.
        preview: Whether there are too few seeds for more than a preview.
    """

    claim: str
    source: str
    metric: str
    estimate: str
    margin: str
    verdict: str
    n: int
    preview: bool


@dataclass(frozen=True)
class Figure:
    """A drawing with what is needed to check it and to draw it again.

    Attributes:
        id: Anchor within the page: letters, digits, ``-`` and ``_``.
        title: Heading.
        caption: What is drawn, on which inputs, over how many seeds.
        svg: An ``<svg>`` element as `repscope.plots.to_svg` returns it.
        csv: File with its numbers, relative to the page, or ``""``.
        code: Python that redraws it, or ``""``.
    """

    id: str
    title: str
    caption: str
    svg: str
    csv: str = ""
    code: str = ""


@dataclass(frozen=True)
class Page:
    """Everything a report says, in reading order.

    Attributes:
        title: Heading of the page.
        lead: Short paragraphs: the question, the runs, the answer.
        verdicts: One for each claim.
        tables: The headline table first.
        figures: In reading order, each with its own ``id``.
        provenance: What it was made from: versions, seeds, settings, hashes.
    """

    title: str
    lead: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)


def render(page: Page) -> str:
    """Return a page as HTML.

    Args:
        page: What to say. All text is escaped; only the figures are markup.

    Returns:
        One complete document.

    Raises:
        UsageError: If two figures share an ``id`` or a table row does not fit its
            header.

    Example:
        >>> "<h1>a &lt; b</h1>" in render(Page("a < b"))
        True
    """
    ids = [figure.id for figure in page.figures]
    if len(set(ids)) < len(ids):
        raise UsageError(f"figures need ids of their own, got {ids}")
    for table in page.tables:
        if any(len(row) != len(table.header) for row in table.rows):
            raise UsageError(
                f"every row of table {table.title!r} needs {len(table.header)} cells"
            )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("repscope.report", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    points = {figure.id: _width(figure) for figure in page.figures}
    template = environment.get_template(_TEMPLATE)
    return template.render(page=page, points=points, missing=MISSING)


def _width(figure: Figure) -> str:
    """Return the width of a drawing, in points, after a look at what it is.

    Args:
        figure: Its markup is the one thing the page takes unescaped.

    Returns:
        The number as written in the drawing.

    Raises:
        UsageError: If it is not a plain ``<svg>`` element with a ``viewBox``.
    """
    head = _SVG.match(figure.svg)
    if head is None or "<script" in figure.svg:
        raise UsageError(
            f"figure {figure.id!r} is not a plain <svg> element with a viewBox: make "
            f"it with repscope.plots.to_svg"
        )
    return head[1]


def write(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write a page so that a reader finds either the old one or the new one, whole.

    Args:
        page: What to say.
        path: Where to; its folder must exist.

    Returns:
        The path written.
    """
    path = Path(path)
    text = render(page)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
