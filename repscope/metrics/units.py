"""Which units take part: dormant units, sparse codes, units that classes share.

Activations have shape ``(..., n_samples, n_features)``, one unit a feature. Say with
each number whether they were taken before or after the activation function and on which
inputs: a unit that is dormant on one task may serve another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_features
from repscope.errors import MetricError, UsageError
from repscope.linalg.classes import class_averages, grouped
from repscope.linalg.covariance import rescaled
from repscope.results import ActivationOverlap


def dormant_scores(X: Any) -> Tensor:
    r"""Return the mean magnitude of each unit, relative to that of the layer.

    :math:`s_i = E|h_i| / \overline{E|h_k|}`, the denominator being the mean over
    units: 1 is average, 0 is never active. Scores of a layer have mean 1.

    Args:
        X: Activations, shape ``(..., n_samples, n_features)``.

    Returns:
        Float64, shape ``(..., n_features)``; zeros where the whole layer is zero.

    References:
        Sokar, Agarwal, Castro and Evci (2023), The dormant neuron phenomenon in deep
        reinforcement learning, ICML, equation 1.

    Example:
        >>> dormant_scores([[3.0, 0.0, 0.0], [-3.0, 0.0, 6.0]]).tolist()
        [1.5, 0.0, 1.5]
    """
    scaled, _ = rescaled(as_features(X))
    magnitudes = scaled.abs_().mean(-2)
    average = magnitudes.mean(-1, keepdim=True)
    return torch.where(average > 0, magnitudes / average, 0.0)


def dormant_fraction(X: Any, *, tau: float = 0.025) -> Tensor:
    """Return the share of units whose mean magnitude is next to nothing.

    Units with ``dormant_scores(X) <= tau``. The scores of a layer that is not all zero
    have mean 1, so some unit always lies above ``tau < 1``: a fraction of exactly 1.0
    is the mark of an all-zero layer, which has no scores of its own.

    Args:
        X: Activations, shape ``(..., n_samples, n_features)``.
        tau: Threshold in [0, 1); 0 counts units that are never active.

    Returns:
        Float64, shape ``(...)``, in [0, 1]; 1.0 if, and only if, all are zero.

    Raises:
        UsageError: If ``tau`` is not in [0, 1).

    References:
        Sokar, Agarwal, Castro and Evci (2023), The dormant neuron phenomenon in deep
        reinforcement learning, ICML, definition 3.1.

    Example:
        >>> dormant_fraction([[3.0, 0.0, 0.05, 0.0], [3.0, 6.0, 0.0, 0.0]]).item()
        0.5
    """
    if not 0 <= tau < 1:
        raise UsageError(
            f"tau must be in [0, 1), got {tau}; scores are relative to their mean"
        )
    return (dormant_scores(X) <= tau).to(torch.float64).mean(-1)


def population_sparseness(X: Any) -> Tensor:
    r"""Return how few units carry each sample, on average (Treves-Rolls).

    :math:`1 - \overline{h_i}^2 / \overline{h_i^2}` with means over the d units of one
    sample, averaged over samples: 0 when all units are equally active,
    :math:`1 - 1/d` when one alone is. Treves and Rolls call the ratio itself
    "sparseness", which falls as the code gets sparser. Over samples in place of units
    it is the *lifetime* sparseness of a unit: pass the transposed matrix.

    Args:
        X: Activations >= 0, shape ``(..., n_samples, n_features)``.

    Returns:
        Float64, shape ``(...)``, in [0, 1 - 1/d]. Samples for which no unit is active
        are left out; NaN when that is all of them.

    References:
        Treves and Rolls (1991), What determines the capacity of autoassociative
        memories in the brain?, Network 2. Rolls and Tovee (1995), Sparseness of the
        neuronal representation of stimuli in the primate temporal visual cortex,
        J. Neurophysiol. 73(2).

    Example:
        >>> population_sparseness([[0.0, 4.0], [1.0, 1.0], [0.0, 0.0]]).item()
        0.25
    """
    rates = as_features(X)
    _check_rates(rates)
    rates = rates.to(torch.float64)
    # Each sample by itself: a faint one must not underflow beside a strong one.
    rates = rates / rates.amax(-1, keepdim=True)
    means = rates.mean(-1)
    ratio = means.square() / rates.square_().mean(-1)
    return (1 - ratio).clamp(min=0).nanmean(-1)


def activation_overlap(X: Any, y: Any) -> ActivationOverlap:
    r"""Return how much the units that the classes use are the same units.

    With the mean activation :math:`a_{ci}` of unit i over the samples of class c,
    divided by its mean over units, the overlap of two classes is the mean over units
    of :math:`\min(a_{ci}, a_{ei})`: 1 for the same profile, 0 for disjoint sets of
    units. Equal to 1 minus the total variation distance of the profiles. Between
    tasks: give the task of each sample in place of its class.

    Args:
        X: Activations >= 0, shape ``(n_samples, n_features)``.
        y: Integer labels of classes or tasks, shape ``(n_samples,)``.

    Returns:
        The matrix (1 on its diagonal), its mean off the diagonal, and what goes with
        it. A class for which no unit is ever active has no profile: it is left out
        and counted. The mean is NaN when fewer than two are left.

    References:
        French (1991), Using semi-distributed representations to overcome catastrophic
        forgetting in connectionist networks, Proc. 13th Cognitive Science Society
        (there on single patterns whose activations lie in [0, 1], not normalised).

    Example:
        >>> found = activation_overlap([[2.0, 2.0, 0.0], [0.0, 5.0, 5.0]], [0, 1])
        >>> found.mean.item()
        0.5
    """
    rates, members, classes = grouped(X, y)
    _check_rates(rates)
    rates, _ = rescaled(rates)
    means = class_averages(rates, members)
    totals = means.sum(-1, keepdim=True)
    active = totals[:, 0] > 0
    shares = torch.where(active[:, None], means / totals, 0.0)
    # The sum of smaller shares, without an array of all pairs times all units.
    overlap = 1 - torch.cdist(shares, shares, p=1.0) / 2
    matrix = overlap.clamp(0, 1).where(active[:, None] & active, torch.nan)
    off = ~torch.eye(len(classes), dtype=torch.bool, device=matrix.device)
    return ActivationOverlap(
        matrix=matrix,
        classes=classes,
        mean=matrix[off].nanmean(),
        n_excluded=int((~active).sum()),
    )


# -- helpers -----------------------------------------------------------------
def _check_rates(X: Tensor) -> None:
    low = float(X.amin())
    if low < 0:
        raise MetricError(
            f"X must be >= 0 here, as after a ReLU, got a smallest entry of {low:.4g}; "
            f"record after the activation function, or pass X.abs() or X.relu() and "
            f"say so"
        )


def _mean_overlap(X: Any, y: Any) -> Tensor:
    return activation_overlap(X, y).mean


UNIT_METRICS: dict[str, Callable[[Any], Tensor]] = {
    "dormant_fraction": dormant_fraction,
    "population_sparseness": population_sparseness,
}
OVERLAP_METRICS: dict[str, Callable[[Any, Any], Tensor]] = {
    "activation_overlap": _mean_overlap,
}
