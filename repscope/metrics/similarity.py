"""How alike two representations are, and what that likeness is worth.

Two sets of features of the same samples, ``(..., n_samples, n_features)``, whose
widths may differ; leading dimensions broadcast. Everything is centred and free of
scale, and features that vary by no more than the rounding of their dtype count as
constant. None of these numbers means much alone: `between_within` puts what is found
between optimizers beside what is found between seeds of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repscope._checks import as_features, as_float, as_matrices, check_choice
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError
from repscope.linalg.condensed import resolution_of
from repscope.linalg.covariance import rescaled
from repscope.results import BetweenWithin, SubspaceOverlap

Space = Literal["samples", "features"]
# Seeds by name, or members whose seeds nobody named.
Members = Mapping[Hashable, Any] | Sequence[Any]

_EPS = torch.finfo(torch.float64).eps
# The unbiased HSIC divides by n - 3.
_DEBIASED_LEAST = 4


# -- centred kernel alignment ------------------------------------------------
def linear_cka(X: Any, Y: Any, *, debiased: bool = False) -> Tensor:
    r"""Return the linear centred kernel alignment of two representations.

    With centred features, :math:`\|Y^\top X\|_F^2 / (\|X^\top X\|_F \|Y^\top Y\|_F)`.
    ``debiased=True`` is the same ratio of unbiased :math:`\mathrm{HSIC}_1` in place of
    HSIC. Lead with it when ``n_samples < 10 * n_features``: the plain ratio tends to 1
    for unrelated features as their width grows. Both follow the largest principal
    components, and a few outlying samples can move them at will (Davari et al.).

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        Y: Features of the same samples in the same order, of any width.
        debiased: Use the unbiased estimator; it needs 4 samples.

    Returns:
        Shape ``(...)``, float64: in [0, 1], 1 for equal up to rotation, translation
        and scale. Debiased in [-1, 1], with mean about 0 for independent features. NaN
        when either is constant or, debiased, when all its samples are equally far
        apart, which is what chance looks like.

    Raises:
        MetricError: If ``X`` and ``Y`` differ in samples or leading dimensions.
        NotEnoughSamples: If there are fewer than 2 samples, or 4 for ``debiased``.

    References:
        Kornblith, Norouzi, Lee and Hinton (2019), Similarity of neural network
        representations revisited, ICML. Song et al. (2012), Feature selection via
        dependence maximization, JMLR 13. Nguyen, Raghu and Kornblith (2021), Do wide
        and deep networks learn the same things?, ICLR. Davari et al. (2023),
        Reliability of CKA as a similarity measure in deep learning, ICLR.

    Example:
        >>> X, Y = [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], [[1.0], [0.0], [-1.0]]
        >>> round(linear_cka(X, Y).item(), 4)
        0.7906
    """  # noqa: DOC502 - raised by what it calls
    one, other = _pair(X, Y)
    return _alignment(_hsic(one, other, debiased=debiased))


class MinibatchCKA:
    r"""Debiased linear CKA of features that are seen a batch at a time.

    :math:`\mathrm{HSIC}_1` is summed over the batches, each weighing by its samples,
    and divided at the end: the mean of the CKA of the batches is another number. With
    one batch it equals ``linear_cka(X, Y, debiased=True)``, with many it tends to it.

    References:
        Nguyen, Raghu and Kornblith (2021), Do wide and deep networks learn the same
        things?, ICLR, equation 3 (where all batches are of one size).

    Example:
        >>> batch = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> cka = MinibatchCKA().update(batch, 2 * batch).update(1 - batch, -2 * batch)
        >>> round(cka.value().item(), 6)
        1.0
    """

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None  # in units of 2**exponents
        self._widths: tuple[int, int] | None = None

    def update(self, X: Any, Y: Any) -> MinibatchCKA:
        """Take in a batch.

        Args:
            X: Features, shape ``(..., n_samples, n_features)``.
            Y: Features of the same samples in the same order.

        Returns:
            Itself, so that calls chain.

        Raises:
            MetricError: If ``X`` and ``Y`` differ in samples, or a width from that of
                the batches before.
            NotEnoughSamples: If the batch has fewer than 4 samples.
        """  # noqa: DOC502 - partly raised by what it calls
        one, other = _pair(X, Y)
        widths = one.deviations.shape[-1], other.deviations.shape[-1]
        if self._widths not in (None, widths):
            raise MetricError(
                f"the batches before had {self._widths} features in X and Y, this one "
                f"{widths}; compare one pair of layers with one MinibatchCKA"
            )
        # HSIC is of degree 2 in X and in Y; sums of batches need a common scale.
        x, y = torch.broadcast_tensors(one.exponent, other.exponent)
        exponents = torch.stack([2 * (x + y), 4 * x, 4 * y])
        n = one.deviations.shape[-2]
        hsic = n * _hsic(one, other, debiased=True)
        if self._sums is not None:
            total, before = self._sums
            both = torch.maximum(before, exponents)
            hsic = total * (before - both).exp2() + hsic * (exponents - both).exp2()
            exponents = both
        self._sums, self._widths = (hsic, exponents), widths
        return self

    def value(self) -> Tensor:
        """Return the CKA of all batches so far.

        Returns:
            As ``linear_cka(..., debiased=True)``.

        Raises:
            NotEnoughSamples: If there was no batch.
        """
        if self._sums is None:
            raise NotEnoughSamples("this MinibatchCKA has seen no batch; call update")
        hsic, (xy, xx, yy) = self._sums
        return _alignment(hsic, (xy - (xx + yy) / 2).exp2())


# -- shape distance ----------------------------------------------------------
def procrustes_distance(X: Any, Y: Any) -> Tensor:
    r"""Return how far apart two representations stay under the best rotation.

    :math:`\min_Q \|A - BQ\|_F = \sqrt{2 - 2\|A^\top B\|_*}` over orthogonal
    :math:`Q`, with :math:`A` and :math:`B` the features, centred and divided by their
    Frobenius norm; the narrower is padded with zeros. A metric on representations up
    to rotation, translation and scale.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        Y: Features of the same samples in the same order, of any width.

    Returns:
        Shape ``(...)``, float64, between 0 (equal) and :math:`\sqrt 2`; NaN when
        either is constant.

    Raises:
        MetricError: If ``X`` and ``Y`` differ in samples or leading dimensions.

    References:
        Ding, Denain and Steinhardt (2021), Grounding representation similarity with
        statistical testing, NeurIPS (its square). Williams, Kunz, Kornblith and
        Linderman (2021), Generalized shape metrics on neural representations, NeurIPS
        (the angle :math:`\arccos \|A^\top B\|_*`).

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        >>> round(procrustes_distance(X, 3 * X.flip(-1) + 1).item(), 6)
        0.0
        >>> round(procrustes_distance(X, [[1.0], [0.0], [-1.0]]).item(), 4)
        0.6472
    """  # noqa: DOC502 - raised by what it calls
    one, other = _pair(X, Y)
    A, B = _narrowed(_unit(one.deviations)), _narrowed(_unit(other.deviations))
    width = max(A.shape[-1], B.shape[-1])
    A, B = (torch.nn.functional.pad(M, (0, width - M.shape[-1])) for M in (A, B))
    U, _, Vh = torch.linalg.svd(B.mT @ A)
    # The formula itself would take 1 from 1 and leave 1e-8 for equal features.
    distance: Tensor = torch.linalg.matrix_norm(A - B @ (U @ Vh))
    return distance.clamp(max=2**0.5).where(one.varies & other.varies, torch.nan)


# -- subspaces ---------------------------------------------------------------
def principal_angles(
    X: Any,
    Y: Any,
    *,
    k: int | None = None,
    space: Space = "samples",
    same_run: bool = False,
) -> Tensor:
    r"""Return the angles between the leading subspaces of two representations.

    :math:`\theta_i = \operatorname{atan2}(\sin\theta_i, \cos\theta_i)`, the cosines
    being the singular values of :math:`P^\top Q` and the sines those of
    :math:`Q - P P^\top Q`, which keeps small angles accurate. Orthonormal :math:`P` and
    :math:`Q` span, for the centred features,

    - ``space="samples"``: the top-k left singular vectors, in
      :math:`\mathbb{R}^n`: what the features say about the samples. Valid across
      networks.
    - ``space="features"``: the top-k principal directions, in
      :math:`\mathbb{R}^d`. Valid for two steps of one run only: the units of another
      network come in another order, so its directions have nothing in common.

    Subspaces that fill more than the space they lie in (of dimension ``n_samples - 1``,
    because the features are centred, or ``n_features``) share directions whatever they
    hold: some angles are 0 by necessity, and the call is refused.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        Y: Features; for ``"samples"`` of the same samples in the same order, for
            ``"features"`` of the same width.
        k: Dimension of both subspaces; None takes all features, which must then be
            linearly independent.
        space: Where the subspaces lie.
        same_run: Must be True for ``"features"``: says that both come from one run.

    Returns:
        Radians, ascending, in [0, pi/2], float64, shape ``(..., k)``; without ``k``, as
        many as the narrower has features. For their chance level, see
        ``subspace_overlap``.

    Raises:
        UsageError: If ``space="features"`` without ``same_run=True``, or ``k < 1``.
        NotEnoughSamples: If two ``"samples"`` subspaces together have more than
            ``n_samples - 1`` dimensions (for equal widths, ``n_samples <= 2 * k``).
        MetricError: If two ``"features"`` subspaces have more than ``n_features``, if
            fewer than k directions carry variance, if singular values k and k + 1 are
            equal up to rounding, which leaves the subspace undetermined, or if shapes
            do not match.

    References:
        Björck and Golub (1973), Numerical methods for computing angles between linear
        subspaces, Mathematics of Computation 27. Knyazev and Argentati (2002),
        Principal angles between subspaces in an A-based scalar product, SIAM J. Sci.
        Comput. 23.

    Example:
        >>> X = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
        >>> Y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        >>> principal_angles(X, Y).rad2deg().round(decimals=4)
        tensor([45.], dtype=torch.float64)
    """  # noqa: DOC502 - raised by what it calls
    P, Q, _ = _subspaces(X, Y, k=k, space=space, same_run=same_run)
    wide, narrow = (P, Q) if P.shape[-1] >= Q.shape[-1] else (Q, P)
    inner = wide.mT @ narrow
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(narrow - wide @ inner).flip(-1)
    return torch.atan2(sines, cosines)


def subspace_overlap(
    X: Any, Y: Any, *, k: int, space: Space = "samples", same_run: bool = False
) -> SubspaceOverlap:
    r"""Return how much of one leading subspace lies in the other, beside chance.

    :math:`\|P^\top Q\|_F^2 / k`, the mean of :math:`\cos^2\theta_i` over the angles of
    ``principal_angles``. Two random subspaces overlap by :math:`k / (n - 1)` in the
    space of the (centred) samples, by :math:`k / d` in that of the features.

    Args:
        X: As for ``principal_angles``.
        Y: As for ``principal_angles``.
        k: Dimension of both subspaces.
        space: As for ``principal_angles``.
        same_run: As for ``principal_angles``.

    Returns:
        ``overlap`` in [0, 1], shape ``(...)``, 1 for equal subspaces, and the value to
        expect by chance.

    References:
        Krzanowski (1979), Between-groups comparison of principal components, JASA 74.

    Example:
        >>> X = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
        >>> Y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        >>> found = subspace_overlap(X, Y, k=1)
        >>> round(found.overlap.item(), 4), round(found.chance, 4)
        (0.5, 0.3333)
    """
    P, Q, dimension = _subspaces(X, Y, k=k, space=space, same_run=same_run)
    overlap = (P.mT @ Q).square().sum((-2, -1)) / k
    return SubspaceOverlap(
        overlap=overlap.clamp(max=1),
        chance=k / dimension,
        k=k,
        space=space,
        dimension=dimension,
    )


# -- beside the seeds --------------------------------------------------------
def between_within(
    groups: Mapping[Hashable, Members], distance: Callable[[Any, Any], Any]
) -> BetweenWithin:
    """Compare what separates groups with what separates the members of one group.

    An optimizer leaves something of its own behind when two of its networks are closer
    to each other than to those of another optimizer. Means are over pairs of members,
    then over (pairs of) groups, each counting once.

    Args:
        groups: Group (optimizer) -> its members (features, predictions, whatever
            ``distance`` takes), as seed -> member or in a list. Named by seed, members
            of two groups with the same seed are not compared: they share an
            initialisation, as no two members of one group do. In a list, all are.
        distance: Called with two members, symmetric, returns one number, like
            ``procrustes_distance`` or ``lambda a, b: 1 - linear_cka(a, b)``.

    Returns:
        Means and their ratio: about 1 where the group makes no difference, above 1
        where it does (of a similarity, below 1); infinite when ``within`` is 0, NaN
        when both are.

    Raises:
        UsageError: If there are fewer than 2 groups.
        NotEnoughSamples: If a group has fewer than 2 members.
        MetricError: If ``distance`` returns anything but one number.
        NonFiniteError: If it returns NaN or infinity.

    References:
        Fort, Hu and Lakshminarayanan (2019), Deep ensembles: a loss landscape
        perspective, arXiv 1912.02757 (functions compared between and within runs).

    Example:
        >>> runs = {"sgd": [0.0, 1.0], "adam": [4.0, 5.0]}
        >>> found = between_within(runs, lambda a, b: abs(a - b))
        >>> found.between, found.within, found.ratio
        (4.0, 1.0, 4.0)
    """  # noqa: DOC502 - partly raised by _measured
    members = {group: _by_seed(group, found) for group, found in groups.items()}
    if len(members) < 2:
        raise UsageError(
            f"between_within compares groups and got {list(members)}; give at least 2"
        )
    means = torch.empty(len(members), len(members), dtype=torch.float64)
    n_pairs = torch.empty_like(means, dtype=torch.int64)
    numbered = list(enumerate(members))
    for (i, a), (j, b) in itertools.combinations_with_replacement(numbered, 2):
        named = isinstance(groups[a], Mapping) and isinstance(groups[b], Mapping)
        pairs = (
            itertools.combinations(members[a], 2)
            if a == b
            else itertools.product(members[a], members[b])
        )
        found = [
            _measured(distance, members, (a, s), (b, t))
            for s, t in pairs
            if not named or s != t
        ]
        means[i, j] = means[j, i] = sum(found) / len(found)
        n_pairs[i, j] = n_pairs[j, i] = len(found)
    apart = torch.ones_like(means).triu(1).bool()
    between, within = means[apart].mean(), means.diagonal().mean()
    return BetweenWithin(
        groups=tuple(members),
        means=means,
        n_pairs=n_pairs,
        between=float(between),
        within=float(within),
        ratio=float(between / within),
    )


# -- helpers -----------------------------------------------------------------
class _Centred(NamedTuple):
    """Centred features in float64 with entries of order one at most."""

    name: str
    deviations: Tensor  # (..., n, d); exact zeros where a feature is constant
    exponent: Tensor  # (...), the power of two they were divided by
    noise: Tensor  # (...), the largest singular value that rounding can have

    @property
    def varies(self) -> Tensor:
        return self.deviations.ne(0).any(-1).any(-1)


def _centred(value: Any, *, name: str) -> _Centred:
    raw = as_matrices(value, name=name)
    X, exponent = rescaled(as_features(raw, name=name))
    deviations = X - X.mean(-2, keepdim=True)
    resolution = resolution_of(raw)
    spread = deviations.square().mean(-2, keepdim=True).sqrt()
    constant = spread <= resolution * X.abs().amax(-2, keepdim=True)
    deviations = deviations.masked_fill(constant, 0.0)
    # All zeros have no scale that the sums of other batches would have to share.
    exponent = exponent.masked_fill(constant.all(-1)[..., 0], -1000.0)
    # Independent errors add up along the largest row and column, no further.
    squares = X.square()
    rows, columns = (squares.sum(along).amax(-1).sqrt() for along in (-1, -2))
    noise = resolution * (rows + columns)
    return _Centred(name, deviations, exponent, noise)


def _pair(X: Any, Y: Any) -> tuple[_Centred, _Centred]:
    one, other = _centred(X, name="X"), _centred(Y, name="Y")
    n, m = one.deviations.shape[-2], other.deviations.shape[-2]
    if n != m:
        raise MetricError(
            f"X and Y must hold the same samples in the same order, got {n} and {m} "
            f"rows; pass both through the same probe"
        )
    _check_leading(one.deviations, other.deviations)
    return one, other


def _check_leading(X: Tensor, Y: Tensor) -> None:
    try:
        # That of torch would import sympy.
        np.broadcast_shapes(X.shape[:-2], Y.shape[:-2])
    except ValueError:
        raise MetricError(
            f"the leading dimensions of X and Y do not broadcast: shapes "
            f"{tuple(X.shape)} and {tuple(Y.shape)}"
        ) from None


def _unit(X: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(X, keepdim=True)
    return torch.where(norm > 0, X / norm, 0.0)


def _hsic(one: _Centred, other: _Centred, *, debiased: bool) -> Tensor:
    # Of (X, Y), (X, X) and (Y, Y), shape (3, ...). Biased without its factor, which
    # cancels in a ratio; zero where a representation says nothing beyond rounding.
    X, Y = one.deviations, other.deviations
    products = _products(X, Y)
    if not debiased:
        return products
    n = X.shape[-2]
    if n < _DEBIASED_LEAST:
        raise NotEnoughSamples(
            f"debiased CKA needs at least {_DEBIASED_LEAST} samples, got {n}; leave "
            f"out a last batch that is smaller"
        )
    # Song et al.'s three terms over kernels without their diagonal: rows of a centred
    # kernel sum to 0, so that only the diagonal itself is left in them.
    x, y = X.square().sum(-1), Y.square().sum(-1)
    x, y = torch.broadcast_tensors(x, y)
    first, second = torch.stack([x, x, y]), torch.stack([y, x, y])
    diagonals = (first * second).sum(-1) * n / (n - 2)
    traces = first.sum(-1) * second.sum(-1) / ((n - 1) * (n - 2))
    hsic = (products - diagonals + traces) / (n * (n - 3))
    noise = 64 * _EPS * products[1:]
    noise[0] += 4 * one.noise.square() * first[1].sum(-1)
    noise[1] += 4 * other.noise.square() * second[2].sum(-1)
    silent = (hsic[1:] * (n * (n - 3)) <= noise).any(0)
    return hsic.masked_fill(silent, 0.0)


def _products(X: Tensor, Y: Tensor) -> Tensor:
    """Return <XX', YY'>, <XX', XX'> and <YY', YY'> on the cheaper side."""
    (n, d), e = X.shape[-2:], Y.shape[-1]
    if d * d + d * e + e * e <= n * (d + e):
        # <XX', YY'> = |X'Y|^2, and no matrix has the size of the samples.
        sides = [A.mT @ B for A, B in ((X, Y), (X, X), (Y, Y))]
        found = [side.square().sum((-2, -1)) for side in sides]
    else:
        K, L = X @ X.mT, Y @ Y.mT
        found = [(A * B).sum((-2, -1)) for A, B in ((K, L), (K, K), (L, L))]
    return torch.stack(torch.broadcast_tensors(*found))


def _alignment(hsic: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return (hsic[0] * scale / (hsic[1] * hsic[2]).sqrt()).clamp(-1, 1)


def _narrowed(X: Tensor) -> Tensor:
    """Return features rotated into as many dimensions as there are samples."""
    if X.shape[-1] <= X.shape[-2]:
        return X
    R: Tensor = torch.linalg.qr(X.mT, mode="r").R
    return R.mT


def _subspaces(
    X: Any, Y: Any, *, k: int | None, space: Space, same_run: bool
) -> tuple[Tensor, Tensor, int]:
    check_choice(space, ("samples", "features"), name="space")
    if k is not None and k < 1:
        raise UsageError(f"k must be at least 1, got {k}")
    if space == "features":
        one, other, dimension = _same_units(X, Y, same_run=same_run)
    else:
        one, other = _pair(X, Y)
        dimension = one.deviations.shape[-2] - 1
    sizes = [k or part.deviations.shape[-1] for part in (one, other)]
    _check_room(sizes, dimension, space=space)
    P, Q = _basis(one, sizes[0], space=space), _basis(other, sizes[1], space=space)
    return P, Q, dimension


def _same_units(X: Any, Y: Any, *, same_run: bool) -> tuple[_Centred, _Centred, int]:
    if not same_run:
        raise UsageError(
            'space="features" compares directions unit by unit, and the units of '
            "different networks come in different orders: pass same_run=True for two "
            'steps of one run, or use space="samples"'
        )
    one, other = _centred(X, name="X"), _centred(Y, name="Y")
    d, e = one.deviations.shape[-1], other.deviations.shape[-1]
    if d != e:
        raise MetricError(
            f'space="features" needs the same units in X and Y, got {d} and {e} '
            f'features; use space="samples"'
        )
    _check_leading(one.deviations, other.deviations)
    return one, other, d


def _check_room(sizes: list[int], dimension: int, *, space: Space) -> None:
    shared = sum(sizes) - dimension
    if shared <= 0:
        return
    what = f"subspaces of {sizes[0]} and {sizes[1]} dimensions"
    if space == "samples":
        n = dimension + 1
        raise NotEnoughSamples(
            f"{what} among {n} samples ({dimension} dimensions once centred) share at "
            f"least {shared} directions whatever they hold; use at least "
            f"{sum(sizes) + 1} samples, or k <= {dimension // 2}"
        )
    raise MetricError(
        f"{what} among {dimension} features share at least {shared} directions "
        f"whatever they hold; use k <= {dimension // 2}"
    )


def _basis(X: _Centred, k: int, *, space: Space) -> Tensor:
    U, S, Vh = torch.linalg.svd(X.deviations, full_matrices=False)
    noise = X.noise + max(X.deviations.shape[-2:]) * _EPS * S[..., 0]
    rank = int((noise[..., None] < S).sum(-1).min())
    if rank < k:
        raise MetricError(
            f"{X.name} has rank {rank} and no {k} leading directions: features are "
            f"constant or depend on each other; use k <= {rank}"
            if rank
            else f"{X.name} is constant and has no leading directions; leave it out"
        )
    if k < S.shape[-1] and bool((S[..., k - 1] - S[..., k] <= noise).any()):
        raise MetricError(
            f"singular values {k} and {k + 1} of {X.name} are equal up to rounding, so "
            f"its top-{k} subspace is undetermined; use another k"
        )
    basis: Tensor = U[..., :k] if space == "samples" else Vh[..., :k, :].mT
    return basis


def _by_seed(group: Hashable, members: Members) -> dict[Hashable, Any]:
    named = members if isinstance(members, Mapping) else dict(enumerate(members))
    found = dict(named.items())
    if len(found) < 2:
        raise NotEnoughSamples(
            f"group {group!r} has {len(found)} members; without a second one there is "
            f"nothing to hold the other groups against"
        )
    return found


def _measured(
    distance: Callable[[Any, Any], Any],
    members: Mapping[Hashable, Mapping[Hashable, Any]],
    first: tuple[Hashable, Hashable],
    second: tuple[Hashable, Hashable],
) -> float:
    (a, s), (b, t) = first, second
    where = f"the distance of {a!r}[{s!r}] and {b!r}[{t!r}]"
    value = as_float(distance(members[a][s], members[b][t]), name=where)
    if value.numel() != 1:
        raise MetricError(
            f"{where} must be one number, got shape {tuple(value.shape)}; reduce it in "
            f"the function"
        )
    if not bool(value.isfinite()):
        raise NonFiniteError(
            f"{where} is {value.item()}; leave out the member that is constant or "
            f"diverged, and say so"
        )
    return float(value)


def _linear_cka_debiased(X: Any, Y: Any) -> Tensor:
    return linear_cka(X, Y, debiased=True)


SIMILARITY_METRICS: dict[str, Callable[[Any, Any], Tensor]] = {
    "linear_cka": linear_cka,
    "linear_cka_debiased": _linear_cka_debiased,
    "procrustes_distance": procrustes_distance,
}
