"""Results drawn: axes-level functions that compute nothing.

Each takes results, draws on ``ax`` (by default the current axes) and returns it; none
calls ``show`` or changes matplotlib's settings. Four helpers fit figures to a paper:
`figure`, `save`, `to_svg` and `settled`. A label looks the same everywhere, as `style`
says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from repscope.plots.classes import CLASS_PLOTS, alignment
from repscope.plots.figures import figure, save, settled, to_svg
from repscope.plots.palette import Style, display_name, style
from repscope.plots.spectra import SPECTRUM_PLOTS, rank_over_time, spectrum
from repscope.plots.tasks import TASK_PLOTS, accuracy, forgetting
from repscope.plots.weights import WEIGHT_PLOTS, sparsity, weight_histogram

__all__ = [
    "PLOTS",
    "Style",
    "accuracy",
    "alignment",
    "display_name",
    "figure",
    "forgetting",
    "rank_over_time",
    "save",
    "settled",
    "sparsity",
    "spectrum",
    "style",
    "to_svg",
    "weight_histogram",
]

PLOTS: dict[str, Callable[..., Any]] = {
    **SPECTRUM_PLOTS,
    **CLASS_PLOTS,
    **WEIGHT_PLOTS,
    **TASK_PLOTS,
}
"""Every plot by name."""
