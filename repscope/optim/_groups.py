"""How messages name one parameter of one group."""

from __future__ import annotations

from typing import Any


def label(group: dict[str, Any], place: int, index: int) -> str:
    """Return the name of a parameter, if the optimizer was given names, and its shape.

    Args:
        group: A parameter group of an optimizer.
        place: Position of the group.
        index: Position of the parameter in the group.

    Returns:
        ``"parameter 'fc.weight' of shape (3, 2)"``, or its place instead of the name.
    """
    names = group.get("param_names")
    name = repr(names[index]) if names else f"{index} of group {place}"
    return f"parameter {name} of shape {tuple(group['params'][index].shape)}"
