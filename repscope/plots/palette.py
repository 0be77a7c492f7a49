"""One look per optimizer in every figure: colour, dash and marker.

The colours stay apart under protan, deutan and tritan vision (smallest CIE76 distance
17), and dash and marker repeat what colour says, for grey prints.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

Dash = str | tuple[float, tuple[float, ...]]
"""A matplotlib line style: ``"-"``, or ``(offset, (on, off, ...))`` in line widths."""

_SOLID: Dash = "-"
_LONG: Dash = (0, (6, 1.5))
_SHORT: Dash = (0, (3, 1.2))
_DOTS: Dash = (0, (1, 1.1))
_DASH_DOT: Dash = (0, (5, 1.2, 1, 1.2))
_DASH_DOT_DOT: Dash = (0, (5, 1.2, 1, 1.2, 1, 1.2))
_TWO_LENGTHS: Dash = (0, (6, 1.2, 2.5, 1.2))


@dataclass(frozen=True)
class Style:
    """How one label is drawn.

    Attributes:
        color: Hexadecimal RGB.
        dash: Line style.
        marker: Marker symbol.
    """

    color: str
    dash: Dash
    marker: str


DISPLAY_NAMES: dict[str, str] = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "shampoo": "Shampoo",
    "p-sgd": "P-SGD",
    "p-adam": "Adam+P",
    "muon": "Muon",
}

STYLES: dict[str, Style] = {
    "sgd": Style("#222222", _SHORT, "o"),
    "adam": Style("#D08A00", _DASH_DOT, "v"),
    "adamw": Style("#C44601", _LONG, "s"),
    "shampoo": Style("#0059A8", _SOLID, "D"),
    "p-sgd": Style("#00855C", _DASH_DOT_DOT, "^"),
    "p-adam": Style("#B8589A", _TWO_LENGTHS, "P"),
    "muon": Style("#409DD8", _DOTS, "X"),
}

# What is left for every other label; colour, dash and marker vary independently.
_OTHER_COLORS = ("#5B4B8A", "#7A6A00", "#7B1E4B", "#2F6B5E", "#8A5A44")
_OTHER_DASHES = (_DASH_DOT_DOT, _LONG, _SHORT, _DASH_DOT, _SOLID, _DOTS, _TWO_LENGTHS)
_OTHER_MARKERS = ("h", "p", "<", ">", "*", "d")

_KEYS = {name.casefold(): key for key, name in DISPLAY_NAMES.items()}


def display_name(label: str) -> str:
    """Return the name a reader sees for a label.

    Args:
        label: An optimizer's name as used on the command line, or any other text.

    Returns:
        The written form of a known optimizer; any other label unchanged.

    Example:
        >>> display_name("p-adam"), display_name("untrained")
        ('Adam+P', 'untrained')
    """
    return DISPLAY_NAMES.get(label.casefold(), label)


def style(label: str) -> Style:
    """Return the look of a label: the same in every figure, whatever else is drawn.

    Args:
        label: An optimizer's name or display name, or any other text. A label without
            a row of its own gets one of the remaining looks, chosen by its text alone.

    Returns:
        Colour, dash and marker.

    Example:
        >>> style("Shampoo") == style("shampoo"), style("shampoo").color
        (True, '#0059A8')
    """
    key = label.casefold()
    if key in _KEYS:
        key = _KEYS[key]
    if key in STYLES:
        return STYLES[key]
    # crc32 and not hash(): that differs between processes.
    rest, color = divmod(zlib.crc32(label.encode()), len(_OTHER_COLORS))
    rest, dash = divmod(rest, len(_OTHER_DASHES))
    return Style(
        _OTHER_COLORS[color],
        _OTHER_DASHES[dash],
        _OTHER_MARKERS[rest % len(_OTHER_MARKERS)],
    )
