"""RepScope: what kind of solution did training find?

Attach a `Recorder` to a training run, call the metric functions on your own tensors,
or run the ``repscope`` command on stores. Names are imported on first use, so
``import repscope`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it, grouped as a table of contents.
_ROOMS: dict[str, tuple[str, ...]] = {
    # recording
    "repscope.recorder": ("Recorder",),
    "repscope.capture": ("Probe", "at_steps", "every", "layers", "log_spaced"),
    # reading
    "repscope.store": ("Run", "open"),
    "repscope.analysis": ("measure",),
    "repscope.networks": ("compare_networks",),
    "repscope.snapshot": ("Snapshot",),
    # spectra
    "repscope.linalg": ("Moments", "covariance", "eigvalsh"),
    "repscope.metrics.spectra": (
        "compare_spectra",
        "effective_rank",
        "explained_variance_ratio",
        "hill_number",
        "majorizes",
        "n_components",
        "n_significant",
        "participation_ratio",
        "participation_ratio_from_features",
        "power_law",
        "rankme",
        "spectra",
        "spectrum",
        "stable_rank",
        "weight_spectrum",
    ),
    "repscope.metrics.dimension": ("class_dimension", "rank_stability"),
    # classes
    "repscope.metrics.alignment": (
        "class_alignment",
        "class_cosine",
        "class_means",
        "cross_class_cosine",
    ),
    # similarity
    "repscope.metrics.similarity": (
        "MinibatchCKA",
        "between_within",
        "linear_cka",
        "principal_angles",
        "procrustes_distance",
        "subspace_overlap",
    ),
    # collapse
    "repscope.metrics.collapse": ("neural_collapse",),
    "repscope.metrics.probe": ("linear_probe_accuracy",),
    # units
    "repscope.metrics.units": (
        "activation_overlap",
        "dormant_fraction",
        "dormant_scores",
        "population_sparseness",
    ),
    # weights
    "repscope.metrics.weights": ("hoyer_sparsity", "weight_histogram"),
    "repscope.metrics.movement": (
        "distance_from_initialisation",
        "movement",
        "never_updated",
        "wasted_movement",
    ),
    # landscape
    "repscope.landscape": (
        "hessian_top_eigenvalue",
        "hessian_trace",
        "loss_barrier",
        "match_units",
        "sparsity_curve",
        "sparsity_within",
    ),
    "repscope.metrics.agreement": ("disagreement", "error_consistency"),
    # continual learning
    "repscope.metrics.continual": (
        "average_accuracy",
        "backward_transfer",
        "forgetting",
        "interference",
        "learning_accuracy",
        "plasticity",
    ),
    # comparison over seeds
    "repscope.metrics.comparison": (
        "compare",
        "holm",
        "mean_interval",
        "paired_difference",
        "verdict",
    ),
    # results
    "repscope.results": (
        "ActivationOverlap",
        "Band",
        "Barrier",
        "BetweenWithin",
        "ClassAlignment",
        "ClassCosine",
        "ClassDimension",
        "Compared",
        "Comparison",
        "Displacement",
        "Histogram",
        "Holm",
        "Interference",
        "Interval",
        "Movement",
        "NeuralCollapse",
        "PowerLaw",
        "Primary",
        "RankStability",
        "SparsityCurve",
        "Spectrum",
        "SubspaceOverlap",
        "TopEigenvalue",
        "TraceEstimate",
    ),
}
_SUBMODULES = ("errors", "optim", "plots", "studies")
_HOME = {name: module for module, names in _ROOMS.items() for name in names}

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"repscope.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'repscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
