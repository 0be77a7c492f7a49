"""How far the classes point the same way in feature space.

Features have shape ``(n_samples, n_features)``, labels ``(n_samples,)``. A zero vector
has no direction: it is left out and counted, never given a cosine of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from repscope._checks import as_features, check_choice
from repscope.errors import LabelMismatch, UsageError
from repscope.linalg.classes import class_averages, class_sums, grouped, row_norms
from repscope.results import ClassAlignment, ClassCosine

Of = Literal["means", "pairs"]

_EPS = torch.finfo(torch.float64).eps


def class_means(X: Any, y: Any) -> Tensor:
    """Return the mean feature vector of each class that is present.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.

    Returns:
        Float64, shape ``(n_classes, n_features)``, in ascending order of the label.

    Example:
        >>> class_means([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]], [7, 7, 2]).tolist()
        [[0.0, 5.0], [2.0, 0.0]]
    """
    features, members, _ = grouped(X, y)
    return class_averages(features, members)


def class_cosine(
    X: Any, y: Any, *, center: bool = False, of: Of = "means"
) -> ClassCosine:
    r"""Return the cosine similarity of every pair of classes.

    Uncentred by default: centred class means sum to zero, which pins the mean of the
    off-diagonal near :math:`-1/(C-1)` whatever was learned. The uncentred mean in turn
    is nearly a function of ``mean_share``, so read the two together, beside
    ``centred_std``: how unequal the angles between classes are, which neither fixes.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.
        center: Subtract the unweighted mean of the class means (``of="means"`` only).
        of: ``"means"`` compares class means; ``"pairs"`` averages the cosine over all
            pairs of samples, one from each class (two different ones on the diagonal).

    Returns:
        The matrix, NaN where a class has no direction (or, on the diagonal of
        ``"pairs"``, fewer than two samples with one), and what goes with it.
        ``norms`` are those of the (centred) class means.

    Raises:
        UsageError: If ``center`` is combined with ``of="pairs"``.

    Example:
        >>> X, y = [[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [0, 1, 2]
        >>> class_cosine(X, y).matrix[0].round(decimals=4).tolist()
        [1.0, 0.7071, 0.0]
    """
    check_choice(of, ("means", "pairs"), name="of")
    if center and of == "pairs":
        raise UsageError(
            'center=True has no agreed meaning for of="pairs"; use of="means", or '
            "centre the features yourself"
        )
    features, members, classes = grouped(X, y)
    means = class_averages(features, members)
    offset = means.mean(0)
    centred = _centred_cosines(means)
    if of == "pairs":
        matrix, n_excluded = _pair_cosines(features, members)
    elif center:
        matrix, n_excluded = centred
    else:
        # A mean that is rounding beside what it was summed from has no direction.
        terms = _mean_norms(features, members)
        matrix, n_excluded = _mean_cosines(means, noise=8 * _EPS * terms)
    norms = row_norms(means - offset if center else means)
    return ClassCosine(
        matrix=matrix,
        classes=classes,
        norms=norms,
        mean_share=_mean_share(means, offset),
        n_excluded=n_excluded,
        counts=members.bincount(),
        centred_std=_off_diagonal_std(centred[0]),
        norm_cv=_cv(norms),
    )


def cross_class_cosine(
    X: Any, y: Any, *, center: bool = False, of: Of = "means"
) -> Tensor:
    """Return the mean cosine over pairs of different classes.

    Every pair of classes counts once, however many samples it has; the diagonal and
    classes without a direction are left out. Features after a ReLU are non-negative,
    so their uncentred cosine cannot be: compare with initialisation.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.
        center: As in ``class_cosine``.
        of: As in ``class_cosine``.

    Returns:
        0-dim, in [-1, 1]; NaN when fewer than two classes have a direction.

    Example:
        >>> X, y = [[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [0, 1, 2]
        >>> round(cross_class_cosine(X, y).item(), 4)
        0.4714
    """
    return _off_diagonal(class_cosine(X, y, center=center, of=of).matrix).nanmean()


def mean_share(X: Any, y: Any) -> Tensor:
    r"""Return the share of the common mean in the class means.

    :math:`m^2 / (m^2 + s^2)` with :math:`m` the norm of the unweighted mean of the
    class means and :math:`s^2` their mean squared distance from it.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.

    Returns:
        0-dim, in [0, 1]; NaN when all class means are zero.

    Example:
        >>> mean_share([[1.0, 0.0], [0.0, 1.0]], [0, 1]).item()
        0.5
    """
    features, members, _ = grouped(X, y)
    means = class_averages(features, members)
    return _mean_share(means, means.mean(0))


def centred_cosine_std(X: Any, y: Any) -> Tensor:
    """Return the standard deviation of the centred cosines between class means.

    The spread (divisor: the number of pairs) of the cosines between different classes
    after the unweighted mean of the class means was subtracted. Their mean is pinned;
    the spread is not.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.

    Returns:
        0-dim, in [0, 1]; 0 when all angles are equal (a simplex, or two classes), NaN
        when fewer than two classes have a direction.

    References:
        Papyan, Han and Donoho (2020), Prevalence of neural collapse, PNAS 117(40).

    Example:
        >>> centred_cosine_std([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], [0, 1, 2])
        tensor(0.3333, dtype=torch.float64)
    """
    features, members, _ = grouped(X, y)
    matrix, _ = _centred_cosines(class_averages(features, members))
    return _off_diagonal_std(matrix)


def class_norm_cv(X: Any, y: Any) -> Tensor:
    r"""Return the coefficient of variation of the norms of the class means.

    Standard deviation (divisor C) over mean, uncentred. At 0 the mean cosine over
    pairs of classes is exactly :math:`(m^2 - s^2 / (C - 1)) / (m^2 + s^2)`, a function
    of ``mean_share``.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.

    Returns:
        0-dim, at least 0; NaN when all class means are zero.

    Example:
        >>> round(class_norm_cv([[3.0, 0.0], [0.0, 1.0]], [0, 1]).item(), 4)
        0.5
    """
    features, members, _ = grouped(X, y)
    return _cv(row_norms(class_averages(features, members)))


def class_alignment(
    X: Any, y: Any, *, baselines: Mapping[str, Any] | None = None
) -> ClassAlignment:
    """Return every reading of this family beside the same of some baselines.

    A cosine of 0.9 says little while the untrained layer has it too, as layers after a
    ReLU may, or the inputs themselves.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.
        baselines: Name -> features ``(n_samples, any width)`` of the same examples:
            the layer at initialisation, the flattened raw inputs.

    Returns:
        A row for ``"features"`` and one for each baseline, a column a reading.

    Raises:
        LabelMismatch: If a baseline has other examples than ``X``.
        UsageError: If a baseline is called ``"features"``.

    Example:
        >>> X, inputs, y = [[1.0, 0.0], [0.0, 1.0]], [[1.0], [3.0]], [0, 1]
        >>> found = class_alignment(X, y, baselines={"inputs": inputs})
        >>> found.to_frame()[["features", "class_cosine", "mean_share"]]
           features  class_cosine  mean_share
        0  features           0.0         0.5
        1    inputs           1.0         0.8
    """
    others = dict(baselines or {})
    if "features" in others:
        raise UsageError('no baseline can be called "features": that is X')
    features, *_ = grouped(X, y)
    n = len(features)
    for name, values in others.items():
        known = as_features(values, name=f"baselines[{name!r}]", minimum=0)
        if known.ndim != 2 or len(known) != n:
            raise LabelMismatch(
                f"baselines[{name!r}] must have shape ({n}, n_features), one row for "
                f"each of X, got {tuple(known.shape)}; flatten inputs first"
            )
    rows = [
        torch.stack([metric(values, y) for metric in ALIGNMENT_METRICS.values()])
        for values in (X, *others.values())
    ]
    return ClassAlignment(
        features=("features", *others),
        metrics=tuple(ALIGNMENT_METRICS),
        values=torch.stack([row.to(rows[0]) for row in rows]),
    )


# -- helpers -----------------------------------------------------------------
def _mean_norms(V: Tensor, members: Tensor) -> Tensor:
    return class_averages(row_norms(V), members)


def _directions(V: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors, zero where there is no direction, and where there is one."""
    norms = row_norms(V)
    alive = norms > noise
    return torch.where(alive[:, None], V / norms[:, None], 0.0), alive


def _mean_cosines(vectors: Tensor, *, noise: Tensor) -> tuple[Tensor, int]:
    unit, alive = _directions(vectors, noise=noise)
    matrix = (unit @ unit.mT).clamp(-1, 1)
    both = alive[:, None] & alive
    return matrix.where(both, torch.nan), int((~alive).sum())


def _centred_cosines(means: Tensor) -> tuple[Tensor, int]:
    noise = 8 * _EPS * row_norms(means).amax()
    return _mean_cosines(means - means.mean(0), noise=noise)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]


def _off_diagonal_std(matrix: Tensor) -> Tensor:
    off = _off_diagonal(matrix)
    return (off - off.nanmean()).square().nanmean().sqrt()


def _cv(norms: Tensor) -> Tensor:
    relative = norms / norms.amax()
    return relative.std(correction=0) / relative.mean()


def _pair_cosines(X: Tensor, members: Tensor) -> tuple[Tensor, int]:
    """Return mean cosines over sample pairs from sums of unit vectors: O(n d)."""
    unit, alive = _directions(X, noise=X.new_zeros(()))
    sums = class_sums(unit, members)
    n = class_sums(alive.to(torch.float64), members)
    same = torch.diag(n)
    # Each unit vector meets itself once in the sums: a cosine of 1 to take out.
    total, pairs = sums @ sums.mT - same, torch.outer(n, n) - same
    matrix = (total / pairs).where(pairs > 0, torch.nan)
    return matrix.clamp(-1, 1), int((~alive).sum())


def _mean_share(means: Tensor, offset: Tensor) -> Tensor:
    top = means.abs().amax()
    common = (offset / top).square().sum()
    spread = ((means - offset) / top).square().sum(-1).mean()
    return common / (common + spread)


def _class_cosine_pairs(X: Any, y: Any) -> Tensor:
    return cross_class_cosine(X, y, of="pairs")


ALIGNMENT_METRICS: dict[str, Callable[[Any, Any], Tensor]] = {
    "class_cosine": cross_class_cosine,
    "class_cosine_pairs": _class_cosine_pairs,
    "mean_share": mean_share,
    "centred_cosine_std": centred_cosine_std,
    "class_norm_cv": class_norm_cv,
}
