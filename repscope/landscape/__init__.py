"""What needs a model and a way to score it: pruning, barriers, curvature."""

from repscope.landscape.barrier import loss_barrier
from repscope.landscape.curvature import hessian_top_eigenvalue, hessian_trace
from repscope.landscape.matching import match_units
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
    "hessian_top_eigenvalue",
    "hessian_trace",
    "loss_barrier",
    "match_units",
    "sparsity_curve",
    "sparsity_within",
]
