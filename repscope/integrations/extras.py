"""Import what is installed by an extra only."""

from __future__ import annotations

import importlib
from typing import Any

from repscope.errors import MissingExtra


def load(*modules: str, extra: str) -> Any:
    """Return the first of some modules that is installed.

    Args:
        *modules: Dotted names, the best first.
        extra: What to install when there is none.

    Returns:
        The module.

    Raises:
        MissingExtra: If none can be imported.

    Example:
        >>> load("not_installed", "math", extra="tensorboard").pi > 3
        True
    """
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = error
    raise MissingExtra(
        f"cannot import {modules[0]} ({reason}): pip install 'repscope[{extra}]'"
    ) from reason
