"""What needs a model and a way to score it: pruning, barriers, curvature."""

from repscope.landscape.pruning import (
    DEFAULT_LEVELS,
    SPARSITY_METRICS,
    accuracy_at,
    sparsity_curve,
    sparsity_within,
)

__all__ = [
    "DEFAULT_LEVELS",
    "SPARSITY_METRICS",
    "accuracy_at",
    "sparsity_curve",
    "sparsity_within",
]
