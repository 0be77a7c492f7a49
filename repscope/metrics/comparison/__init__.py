"""What seeds say about a difference: intervals, and the rule that reads them."""

from repscope.metrics.comparison.intervals import (
    band,
    mean_interval,
    paired_difference,
)
from repscope.metrics.comparison.rule import Verdict, compare, holm, verdict

__all__ = [
    "Verdict",
    "band",
    "compare",
    "holm",
    "mean_interval",
    "paired_difference",
    "verdict",
]
