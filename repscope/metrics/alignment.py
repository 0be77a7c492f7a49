"""How far the classes point the same way in feature space.

Features have shape ``(n_samples, n_features)``, labels ``(n_samples,)``. A zero vector
has no direction: it is left out and counted, never given a cosine of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from repscope._checks import check_choice
from repscope.errors import UsageError
from repscope.linalg.classes import class_averages as _class_means
from repscope.linalg.classes import class_sums as _class_sums
from repscope.linalg.classes import grouped as _grouped
from repscope.linalg.classes import row_norms as _norms
from repscope.results import ClassCosine

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
    features, members, _ = _grouped(X, y)
    return _class_means(features, members)


def class_cosine(
    X: Any, y: Any, *, center: bool = False, of: Of = "means"
) -> ClassCosine:
    r"""Return the cosine similarity of every pair of classes.

    Uncentred by default: centred class means sum to zero, which pins the mean of the
    off-diagonal near :math:`-1/(C-1)` whatever was learned. The uncentred mean in turn
    is nearly a function of ``mean_share``, so read the two together.

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
    features, members, classes = _grouped(X, y)
    means = _class_means(features, members)
    offset = means.mean(0)
    vectors = means - offset if center else means
    if of == "pairs":
        matrix, n_excluded = _pair_cosines(features, members)
    else:
        # A mean that is rounding beside what it was summed from has no direction.
        terms = _norms(means).amax() if center else _mean_norms(features, members)
        matrix, n_excluded = _mean_cosines(vectors, noise=8 * _EPS * terms)
    return ClassCosine(
        matrix=matrix,
        classes=classes,
        norms=_norms(vectors),
        mean_share=_mean_share(means, offset),
        n_excluded=n_excluded,
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
    matrix = class_cosine(X, y, center=center, of=of).matrix
    off = ~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix[off].nanmean()


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
    features, members, _ = _grouped(X, y)
    means = _class_means(features, members)
    return _mean_share(means, means.mean(0))


# -- helpers -----------------------------------------------------------------
def _mean_norms(V: Tensor, members: Tensor) -> Tensor:
    return _class_means(_norms(V), members)


def _directions(V: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors, zero where there is no direction, and where there is one."""
    norms = _norms(V)
    alive = norms > noise
    return torch.where(alive[:, None], V / norms[:, None], 0.0), alive


def _mean_cosines(vectors: Tensor, *, noise: Tensor) -> tuple[Tensor, int]:
    unit, alive = _directions(vectors, noise=noise)
    matrix = (unit @ unit.mT).clamp(-1, 1)
    both = alive[:, None] & alive
    return matrix.where(both, torch.nan), int((~alive).sum())


def _pair_cosines(X: Tensor, members: Tensor) -> tuple[Tensor, int]:
    """Return mean cosines over sample pairs from sums of unit vectors: O(n d)."""
    unit, alive = _directions(X, noise=X.new_zeros(()))
    sums = _class_sums(unit, members)
    n = _class_sums(alive.to(torch.float64), members)
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
}
