"""A table for terminals."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from repscope.errors import UsageError

MISSING = "–"
"""What stands for a number that a run does not have."""


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str | None]],
    *,
    align: str | None = None,
) -> str:
    """Return rows of text aligned in columns by display width.

    Args:
        header: Column headings.
        rows: One cell a column; ``None`` is shown as a dash.
        align: One letter a column, ``"l"`` or ``"r"``; by default the first column
            is left-aligned and the others right.

    Returns:
        Lines without trailing blanks and without a final newline. Characters that
        would move the cursor are shown as ``?``, because names come from files.

    Raises:
        UsageError: If a row or ``align`` does not fit the header.

    Example:
        >>> print(text_table(["optimizer", "rank"], [["sgd", "30.3"], ["muon", None]]))
        optimizer  rank
        ---------  ----
        sgd        30.3
        muon          –
    """
    sides = align if align is not None else "l" + "r" * (len(header) - 1)
    if len(sides) != len(header) or set(sides) - {"l", "r"}:
        raise UsageError(
            f"align must have one 'l' or 'r' for each of the {len(header)} columns, "
            f"got {align!r}"
        )
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UsageError(
                f"row {number} has {len(row)} cells under {len(header)} headings: "
                f"{list(row)}"
            )
    lines = [[_clean(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(cells, widths, sides) for cells in lines)


def display_width(text: str) -> int:
    """Return how many terminal columns a text takes.

    Args:
        text: Printable characters.

    Returns:
        Two for each wide character, none for a combining one, else one.

    Example:
        >>> display_width("naïve"), display_width("学习")
        (5, 4)
    """
    return sum(
        2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
        if not unicodedata.combining(char)
    )


def _clean(cell: str | None) -> str:
    text = MISSING if cell is None else cell
    return "".join(char if char.isprintable() else "?" for char in text)


def _line(cells: Sequence[str], widths: Sequence[int], sides: str) -> str:
    padded = []
    for cell, width, side in zip(cells, widths, sides, strict=True):
        blank = " " * (width - display_width(cell))
        padded.append(cell + blank if side == "l" else blank + cell)
    return "  ".join(padded).rstrip()
