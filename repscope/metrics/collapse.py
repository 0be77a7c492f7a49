"""Neural collapse: how near features and classifier are to one point per class.

Features have shape ``(n_samples, n_features)``, labels ``(n_samples,)``. The global
mean is the unweighted mean of the class means, so that class sizes do not move it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repscope._checks import as_float, as_tensor, check_choice, check_finite
from repscope.errors import LabelError, MetricError, UsageError
from repscope.linalg.classes import class_averages, grouped
from repscope.linalg.covariance import largest, rescaled
from repscope.results import NeuralCollapse

_EPS = torch.finfo(torch.float64).eps
# Papyan et al. begin the terminal phase where the training error vanishes.
_TERMINAL_ACCURACY = 0.99


def neural_collapse(
    X: Any,
    y: Any,
    *,
    classifier: nn.Linear | tuple[Any, Any] | None = None,
    inputs: Literal["train", "test"] = "train",
    train_accuracy: float | None = None,
) -> NeuralCollapse:
    r"""Return how far the last features and their classifier are from collapse.

    With the mean :math:`\mu_c` and the mean square deviation :math:`v_c` of class c,
    :math:`\mu_G = \overline{\mu_c}`, :math:`m_c = \mu_c - \mu_G` and C classes:

    - ``nc1`` :math:`= \mathrm{tr}(\Sigma_W \Sigma_B^+) / C`, where :math:`\Sigma_W` is
      the mean of :math:`(h - \mu_c)(h - \mu_c)^\top` over all samples and
      :math:`\Sigma_B` that of :math:`m_c m_c^\top` over the classes. The
      pseudo-inverse keeps at most C - 1 eigenvalues (the rank cannot be higher), and
      those above ``max(C, n_features) * 2.2e-16`` of the largest.
    - ``cdnv``: mean over pairs of classes of
      :math:`(v_a + v_b) / (2 \|\mu_a - \mu_b\|^2)`.
    - ``nc2_equinorm``: standard deviation (divided by C) over mean of
      :math:`\|m_c\|`; ``nc2_equiangular``: mean over pairs of
      :math:`|\cos(m_a, m_b) + 1/(C-1)|`. With two classes both are 0, whatever was
      learned.
    - ``nc3`` :math:`= \| W/\|W\|_F - M/\|M\|_F \|_F`, the rows of M being the
      :math:`m_c` and W the weight; ``nc4``: share of samples for which the
      classifier, weight and bias, decides for another class than the nearest
      :math:`\mu_c` (in a tie, the lower label).

    All are 0 at collapse, and do not change with the scale, the origin (``nc4`` and
    ``accuracy`` do) or a rotation of the features. They describe the terminal phase of
    training, on training inputs: ``note`` says when that is not what was measured.

    Args:
        X: Features before the classifier, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``; with a classifier, the number of
            its output, counted from 0.
        classifier: The last layer, or its ``(weight, bias)`` of shapes
            ``(n_outputs, n_features)`` and ``(n_outputs,)`` or ``None``. Moved to the
            device of ``X``.
        inputs: What ``X`` was computed on.
        train_accuracy: Share of the training set that is classified right, in [0, 1].
            By default that of the classifier on ``X``, if these are training inputs.

    Returns:
        Float64 numbers on the device of ``X``. A class of one sample counts in the
        means only; a class without samples nowhere. Without within-class variance
        (at most ``(eps * max|X|)**2`` a feature, eps that of the dtype or
        ``n_samples * 2.2e-16`` if that is more) ``nc1`` and ``cdnv`` are 0, without
        between-class variance infinite and the rest NaN, without either all NaN, as
        for a single class. ``note`` names each of these.

    Raises:
        UsageError: If ``classifier`` is neither a ``nn.Linear`` nor a pair, or
            ``train_accuracy`` is not in [0, 1].
        MetricError: If its shapes do not fit the features.
        LabelError: If a label is not one of its outputs.

    References:
        Papyan, Han and Donoho (2020), Prevalence of neural collapse during the
        terminal phase of deep learning training, PNAS 117(40). Galanti, Gyorgy and
        Hutter (2022), On the role of neural collapse in transfer learning, ICLR
        (``cdnv``).

    Example:
        >>> X, y = [[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]], [0, 0, 1, 1]
        >>> found = neural_collapse(X, y, classifier=([[2.0, 0.0], [-2.0, 0.0]], None))
        >>> [round(v.item(), 4) for v in (found.nc1, found.cdnv, found.nc3, found.nc4)]
        [0.0, 0.0278, 0.0, 0.0]
    """  # noqa: DOC502 - raised by what it calls
    check_choice(inputs, ("train", "test"), name="inputs")
    if train_accuracy is not None and not 0 <= train_accuracy <= 1:
        raise UsageError(
            f"train_accuracy must be a share in [0, 1], got {train_accuracy}; "
            f"divide percentages by 100"
        )
    raw = as_tensor(X)
    features, members, classes = grouped(raw, y)
    eps = torch.finfo(raw.dtype).eps if raw.is_floating_point() else _EPS
    scaled, exponent = rescaled(features)

    unknown = features.new_tensor(torch.nan)
    nc3, nc4, accuracy = unknown, unknown, unknown
    decided, weight, notes = members, None, []
    if classifier is not None:
        weight, bias = _parts(classifier, n_features=features.shape[1])
        weight = weight.to(features.device, torch.float64)
        notes = _notes_on_outputs(classes, n_outputs=len(weight))
        decided = _decisions(scaled, weight, bias, exponent)
        accuracy = (decided == classes[members]).to(torch.float64).mean()
    found = _clusters(scaled, members, resolution=max(eps, len(features) * _EPS))
    if weight is not None and found.differ:
        nc3 = _self_duality(found.centred, weight[classes])
        nc4 = (decided != classes[_nearest(found)]).to(torch.float64).mean()
    if train_accuracy is None and inputs == "train":
        train_accuracy = accuracy.item()
    equinorm, equiangular = _simplex(found)
    return NeuralCollapse(
        nc1=_variability(found),
        cdnv=_pair_variability(found),
        nc2_equinorm=equinorm,
        nc2_equiangular=equiangular,
        nc3=nc3,
        nc4=nc4,
        accuracy=accuracy,
        note="; ".join(
            [
                *_notes_on_phase(inputs, train_accuracy),
                *_notes_on_classes(found, classes),
                *notes,
            ]
        ),
    )


# -- classes -----------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Clusters:
    """Samples as class means and deviations from them, without their rounding."""

    deviations: Tensor  # (n, d) from the mean of the class
    variances: Tensor  # (C,) mean square deviation; NaN for a single sample
    members: Tensor  # (n,)
    counts: Tensor  # (C,)
    means: Tensor  # (C, d) from an arbitrary origin
    centred: Tensor  # (C, d) from the mean of the means
    noise: Tensor  # squared length below which a vector is rounding

    @cached_property
    def directed(self) -> Tensor:
        """Which centred means have a direction, shape ``(C,)``."""
        return self.centred.square().sum(-1) > self.noise

    @cached_property
    def differ(self) -> bool:
        """Whether the class means are more than one point."""
        return bool(self.directed.any())

    @cached_property
    def spread(self) -> bool:
        """Whether some class is more than one point."""
        return bool((self.variances > 0).any())

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """First and second class of each pair."""
        C = len(self.counts)
        a, b = torch.triu_indices(C, C, 1, device=self.counts.device)
        return a, b

    @cached_property
    def pair_ratios(self) -> Tensor:
        """Variance over distance of each pair: NaN for a single sample, and for 0/0."""
        a, b = self.pairs
        # Not by products of the means, which would lose the distance of near ones.
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(self.means, self.means, compute_mode=exact)[a, b]
        squares = distances.square()
        squares = torch.where(squares > self.noise, squares, 0.0)
        return (self.variances[a] + self.variances[b]) / (2 * squares)

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor]:
        """Squared singular values of the centred means, 0 below the cut; directions."""
        C, d = self.centred.shape
        _, singular, directions = torch.linalg.svd(self.centred, full_matrices=False)
        kept = min(C - 1, d)
        squares = singular[:kept].square()
        cut = max(C, d) * _EPS * squares[:1]
        return torch.where(squares > cut, squares, 0.0), directions[:kept]


def _clusters(X: Tensor, members: Tensor, *, resolution: float) -> _Clusters:
    """Return means and deviations; the deviations take the place of ``X``."""
    noise = X.shape[1] * (resolution * largest(X)).square()
    counts = members.bincount()
    # From a sample of its class, a class of equal samples deviates by exactly 0,
    # and a large common mean takes no digits.
    order = torch.arange(len(X), device=X.device)
    first = torch.full_like(counts, len(X)).scatter_reduce(0, members, order, "amin")
    origins = X[first]
    rows = X.sub_(origins[members])
    shifts = class_averages(rows, members)
    deviations = rows.sub_(shifts[members])
    lengths = torch.linalg.vector_norm(deviations, dim=-1)
    variances = class_averages(lengths.square(), members)
    variances = torch.where(variances > noise, variances, 0.0)
    means = origins - origins[0] + shifts
    return _Clusters(
        deviations=deviations,
        variances=variances.where(counts > 1, torch.nan),
        members=members,
        counts=counts,
        means=means,
        centred=means - means.mean(0),
        noise=noise,
    )


def _variability(found: _Clusters) -> Tensor:
    """Return tr(Sigma_W Sigma_B^+) / C, along the right singular vectors of M only."""
    several = found.counts > 1
    if not found.differ or not found.spread:
        return _ratio_without(found)
    between, directions = found.principal
    along = (found.deviations @ directions.mT).square().sum(0)
    along = along / found.counts[several].sum()
    # Both factors 1/C cancel: Sigma_B has the eigenvalues between / C.
    return torch.where(between > 0, along / between, 0.0).sum()


def _ratio_without(found: _Clusters) -> Tensor:
    """Return within over between where at least one of them is missing."""
    known = len(found.counts) > 1 and bool((found.counts > 1).any())
    if not known or not (found.differ or found.spread):
        return found.noise.new_tensor(torch.nan)
    return found.noise.new_tensor(0.0 if found.differ else torch.inf)


def _pair_variability(found: _Clusters) -> Tensor:
    ratios = found.pair_ratios
    return ratios[~ratios.isnan()].mean()  # of nothing: NaN


def _simplex(found: _Clusters) -> tuple[Tensor, Tensor]:
    """Return by how much the centred means differ in norm, and from equal angles."""
    norms = found.centred.square().sum(-1).sqrt()
    if not found.differ:
        return norms.new_tensor(torch.nan), norms.new_tensor(torch.nan)
    equinorm = norms.std(correction=0) / norms.mean()
    unit = found.centred / norms[:, None]
    a, b = found.pairs
    cosines = (unit @ unit.mT)[a, b][found.directed[a] & found.directed[b]]
    return equinorm, (cosines + 1 / (len(norms) - 1)).abs().mean()


# -- the classifier ------------------------------------------------------------
def _parts(classifier: Any, *, n_features: int) -> tuple[Tensor, Tensor | None]:
    if isinstance(classifier, nn.Linear):
        classifier = (classifier.weight, classifier.bias)
    if not isinstance(classifier, tuple | list) or len(classifier) != 2:
        raise UsageError(
            f"classifier must be a nn.Linear or a pair (weight, bias), got "
            f"{type(classifier).__name__}; pass the last layer of the model"
        )
    weight = as_float(classifier[0], name="weight")
    if weight.ndim != 2 or weight.shape[1] != n_features or not len(weight):
        raise MetricError(
            f"the weight of the classifier must have shape (n_outputs, {n_features}) "
            f"to match the features, got {tuple(weight.shape)}; record its inputs"
        )
    check_finite(weight, name="weight")
    if classifier[1] is None:
        return weight, None
    bias = as_float(classifier[1], name="bias")
    if bias.shape != weight.shape[:1]:
        raise MetricError(
            f"the bias of the classifier must have shape ({len(weight)},) to match its "
            f"weight, got {tuple(bias.shape)}"
        )
    check_finite(bias, name="bias")
    return weight, bias


def _notes_on_outputs(classes: Tensor, *, n_outputs: int) -> list[str]:
    low, high = int(classes[0]), int(classes[-1])
    if low < 0 or high >= n_outputs:
        raise LabelError(
            f"with a classifier, labels must be its outputs 0..{n_outputs - 1}, got "
            f"{low if low < 0 else high}; map the labels to output numbers"
        )
    missing = sorted(set(range(n_outputs)) - set(classes.tolist()))
    if not missing:
        return []
    return [f"no samples of classes {_listed(missing)}: left out"]


def _decisions(
    scaled: Tensor, weight: Tensor, bias: Tensor | None, exponent: Tensor
) -> Tensor:
    """Return the output with the largest logit, for features times 2**-exponent."""
    weight, of_weight = rescaled(weight)
    logits = scaled @ weight.mT
    if bias is not None:
        power = (exponent + of_weight).clamp(-1000, 1000)
        logits = logits + bias.to(logits) * torch.exp2(-power)
    return logits.argmax(-1)


def _self_duality(centred: Tensor, weight: Tensor) -> Tensor:
    weight, _ = rescaled(weight)
    # 0/0 for a weight of zeros is NaN, which is the answer there.
    one = weight / weight.square().sum().sqrt()
    other = centred / centred.square().sum().sqrt()
    return (one - other).square().sum().sqrt()


def _nearest(found: _Clusters) -> Tensor:
    """Return the class whose mean is nearest to each sample."""
    samples = found.deviations + found.centred[found.members]
    halves = found.centred.square().sum(-1) / 2
    return (samples @ found.centred.mT - halves).argmax(-1)


# -- notes ---------------------------------------------------------------------
def _notes_on_phase(inputs: str, train_accuracy: float | None) -> list[str]:
    notes = []
    if inputs == "test":
        notes.append("on test inputs: collapse is defined on training inputs")
    if train_accuracy is not None and train_accuracy < _TERMINAL_ACCURACY:
        notes.append(
            f"training accuracy {100 * train_accuracy:.4g} % is below 99 %: not in "
            f"the terminal phase"
        )
    return notes


def _notes_on_classes(found: _Clusters, classes: Tensor) -> list[str]:
    C, d = found.centred.shape
    if C < 2:
        return [f"a single class ({_listed(classes.tolist())})"]
    single = classes[found.counts == 1].tolist()
    directed = found.directed
    conditions = {
        f"classes {_listed(single)} have one sample: in the means only": bool(single),
        "no within-class variance": not found.spread and len(single) < C,
        "no between-class variance": not found.differ,
        f"n_features < {C - 1}: no simplex fits": d < C - 1,
    }
    if found.differ:
        rank = int((found.principal[0] > 0).sum())
        ratios = found.pair_ratios
        a, b = found.pairs
        known = (found.counts[a] > 1) & (found.counts[b] > 1)
        n_void, n_same = int((ratios.isnan() & known).sum()), int(ratios.isinf().sum())
        still = classes[~directed].tolist()
        conditions |= {
            f"class means span {rank} directions only": rank < min(C - 1, d),
            f"the mean of classes {_listed(still)} is the global mean": bool(still),
            f"{n_same} pairs of classes with equal means": n_same > 0,
            f"{n_void} pairs of equal points, left out of cdnv": n_void > 0,
        }
    return [text for text, holds in conditions.items() if holds]


def _listed(labels: list[int]) -> str:
    shown = ", ".join(map(str, labels[:5]))
    return f"{shown}, ... ({len(labels)})" if len(labels) > 5 else shown


COLLAPSE_METRICS: dict[str, Callable[[NeuralCollapse], Tensor]] = {
    "nc1": attrgetter("nc1"),
    "cdnv": attrgetter("cdnv"),
    "nc2_equinorm": attrgetter("nc2_equinorm"),
    "nc2_equiangular": attrgetter("nc2_equiangular"),
}
