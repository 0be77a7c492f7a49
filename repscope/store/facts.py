"""What is noted about a run, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from repscope.errors import UsageError


def as_json(meta: Mapping[str, object]) -> dict[str, Any]:
    """Return ``meta`` as it will be read back.

    Args:
        meta: Strings, numbers, booleans, None, and lists and dicts of them; 0-dim
            tensors and numpy scalars become numbers, tuples become lists.

    Returns:
        A new dict of plain Python values.

    Raises:
        UsageError: If a value is anything else.
    """
    plain = {}
    for name, value in meta.items():
        try:
            plain[str(name)] = json.loads(json.dumps(value, default=_number))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"meta {name!r} cannot be written as JSON ({error}); give text, "
                "numbers, or lists and dicts of them"
            ) from error
    return plain


def _number(value: Any) -> bool | int | float:
    """Return a 0-dim tensor or a numpy scalar as a Python number.

    Raises:
        TypeError: If it is none.
    """
    item = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(item, bool | int | float):
        return item
    raise TypeError(f"got a {type(value).__name__}")
