"""What can be captured: from the hooks of a forward, or from the model's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from repscope.capture.selection import named_modules
from repscope.errors import UnknownName, suggest

StateReader = Callable[[nn.Module], dict[str, Tensor]]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter under the name the user knows.

    Args:
        model: Any module.

    Returns:
        Dotted parameter name -> tensor on the CPU, in order of definition.

    Example:
        >>> sorted(weights(nn.Linear(2, 3)))
        ['bias', 'weight']
    """
    owners = [("", model), *named_modules(model)]
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in owners:
        for name, value in module.named_parameters(prefix=prefix, recurse=False):
            found.setdefault(id(value), (name, value.detach().clone().cpu()))
    return dict(found.values())


def check_targets(capture: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Return the capture targets as a tuple of known names.

    Args:
        capture: One name or several.

    Returns:
        The names, each once.

    Raises:
        UnknownName: If a target is not a row of ``TARGETS``.
    """
    names = (capture,) if isinstance(capture, str) else tuple(dict.fromkeys(capture))
    for name in names:
        if name not in TARGETS:
            raise UnknownName(
                f"unknown capture target {name!r}{suggest(name, TARGETS)} "
                f"(known: {', '.join(TARGETS)})"
            )
    return names


TARGETS: Mapping[str, StateReader | None] = {
    "outputs": None,  # copied by the forward hooks
    "weights": weights,
}
"""Target -> how to read it from the model; ``None`` where hooks deliver it."""
