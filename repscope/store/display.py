"""How a run shows itself in a terminal and in a notebook."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repscope.store.reader import Run

_MOST_ROWS = 60
_MOST_META = 30
_LONGEST = 80


def as_text(run: Run) -> str:
    """Return one line about a run."""
    return f"Run({str(run.path)!r}, {_extent(run)})"


def as_html(run: Run) -> str:
    """Return a header and a table of the streams, below 50 KB whatever the run."""
    meta = list(run.meta.items())
    notes = "".join(
        f"<tr><th>{_short(key)}</th><td>{_short(value)}</td></tr>"
        for key, value in meta[:_MOST_META]
    )
    shapes = run.shapes
    rows = "".join(
        f"<tr><td>{_short(target)}</td><td>{_short(layer)}</td>"
        f"<td>{' &times; '.join(map(str, shape)) or 'scalar'}</td></tr>"
        for (target, layer), shape in list(shapes.items())[:_MOST_ROWS]
    )
    return (
        f"<div><p><b>{_short(run.name)}</b>: {_extent(run)}, "
        f"{run.nbytes / 1e6:.1f} MB</p><table>{notes}</table>"
        f"{_rest(len(meta), _MOST_META, 'notes')}"
        "<table><tr><th>target</th><th>layer</th><th>latest shape</th></tr>"
        f"{rows}</table>{_rest(len(shapes), _MOST_ROWS, 'streams')}</div>"
    )


def _extent(run: Run) -> str:
    steps = run.steps
    span = f" ({steps[0]} to {steps[-1]})" if steps else ""
    state = "closed" if run.closed else "not closed"
    return f"{len(run.streams)} streams, {len(steps)} steps{span}, {state}"


def _rest(total: int, shown: int, what: str) -> str:
    return f"<p>and {total - shown} more {what}</p>" if total > shown else ""


def _short(value: object) -> str:
    text = str(value)
    cut = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return html.escape(cut)
