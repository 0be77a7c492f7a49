"""Spectra of features and weights, and the numbers read from them.

Features have shape ``(..., n_samples, n_features)``, eigenvalues ``(..., k)``,
descending and non-negative. ``effective_rank``, ``participation_ratio`` and
``stable_rank`` are one family: the Hill numbers of order 1, 2 and infinity of the
eigenvalue shares. Results are float64; an all-zero spectrum has rank 0 and its ratios
are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from repscope._checks import as_features, as_float, check_choice, check_finite
from repscope.errors import MetricError, UsageError
from repscope.linalg.covariance import rescaled
from repscope.linalg.eigen import clip_rounding
from repscope.linalg.spectral import (
    Accuracy,
    Eigenvalues,
    Invariants,
    covariance_eigenvalues,
    covariance_invariants,
    entropy_rank,
    squared_singular_values,
)
from repscope.results import PowerLaw, Spectrum

Key = TypeVar("Key")
Kind = Literal["covariance", "second_moment", "weight"]
Order = Literal[
    "lower for every definition",
    "higher for every definition",
    "equal for every definition",
    "definition-dependent",
    "undefined",
]

# Fewer points, and a straight line through a log-log plot means nothing.
_POWER_LAW_POINTS = 10
# Whether the first majorizes the second, and the second the first.
_ORDERS: dict[tuple[bool, bool], Order] = {
    (True, False): "lower for every definition",
    (False, True): "higher for every definition",
    (True, True): "equal for every definition",
    (False, False): "definition-dependent",
}


# -- from matrices to spectra ------------------------------------------------
def spectrum(X: Any, *, center: bool = True, ddof: int = 1) -> Spectrum:
    r"""Return the eigenvalues of the covariance of the features.

    :math:`\lambda(C)` with :math:`C = (X-\bar x)^\top (X-\bar x)/(n-\mathrm{ddof})`,
    in float64. With fewer samples than features the row Gram matrix is decomposed
    instead and the rest are exact zeros; so is every value below
    ``max(n_samples, n_features) * eps`` of the largest, which is rounding.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``, or the `Moments` of some,
            with the same result.
        center: Subtract the mean of each feature; without it, the spectrum of the
            second moment, with the same divisor.
        ddof: Delta degrees of freedom of the normalisation.

    Returns:
        Eigenvalues of shape ``(..., n_features)``. When no feature varies by more
        than the rounding of its dtype (float64 for `Moments`, which do not know it)
        they are zeros and ``degenerate`` is ``"constant"`` (in a batch: when that
        holds for any of its matrices).

    Example:
        >>> spectrum([[1.0, 0.0], [3.0, 4.0]]).eigenvalues
        tensor([10.,  0.], dtype=torch.float64)
    """
    found = covariance_eigenvalues([X], names=["X"], center=center, ddof=ddof)
    return _of_features(found[0], center=center, ddof=ddof)


@overload
def spectra(
    X: Mapping[Key, Any],
    *,
    center: bool = ...,
    ddof: int = ...,
    accuracy: Accuracy = ...,
) -> dict[Key, Spectrum]: ...
@overload
def spectra(
    X: Sequence[Any], *, center: bool = ..., ddof: int = ..., accuracy: Accuracy = ...
) -> list[Spectrum]: ...
def spectra(
    X: Mapping[Key, Any] | Sequence[Any],
    *,
    center: bool = True,
    ddof: int = 1,
    accuracy: Accuracy = "eigenvalues",
) -> dict[Key, Spectrum] | list[Spectrum]:
    """Return the spectrum of every matrix, with one decomposition per matrix size.

    Equal to ``spectrum`` in a loop; see there.

    Args:
        X: Features by name or in a list, each ``(..., n_samples, n_features)`` or
            `Moments`.
        center: Subtract the mean of each feature.
        ddof: Delta degrees of freedom of the normalisation.
        accuracy: ``"ranks"`` computes in float32 where the data have no more digits:
            effective ranks to 1e-5, but eigenvalues only to about 1e-6 of the largest.
            A spectrum that reaches down to float32 rounding is done in float64.

    Returns:
        A dict with the same keys, or a list in the same order.

    Example:
        >>> both = spectra({"a": [[0.0, 0.0], [2.0, 0.0]], "b": [[1.0], [3.0]]})
        >>> [s.eigenvalues.tolist() for s in both.values()]
        [[2.0, 0.0], [2.0]]
    """
    keyed = X if isinstance(X, Mapping) else dict(enumerate(X))
    found = covariance_eigenvalues(
        list(keyed.values()),
        names=[f"X[{key!r}]" for key in keyed],
        center=center,
        ddof=ddof,
        accuracy=accuracy,
    )
    done = [_of_features(one, center=center, ddof=ddof) for one in found]
    return dict(zip(X, done, strict=True)) if isinstance(X, Mapping) else done


def weight_spectrum(W: Any) -> Spectrum:
    r"""Return the squared singular values of a weight, uncentred and not normalised.

    A kernel of shape ``(out, in, *window)`` is read as the matrix
    ``(out, in * window)``. ``stable_rank`` of the result is
    :math:`\|W\|_F^2 / \|W\|_2^2`.

    Args:
        W: Weight of at least 2 dimensions.

    Returns:
        Squared singular values, padded with zeros to ``n_features``; ``degenerate`` is
        ``"constant"`` only when all entries are zero.

    Raises:
        MetricError: If ``W`` has fewer than 2 dimensions or is empty.

    Example:
        >>> weight_spectrum([[3.0, 0.0], [0.0, 4.0]]).eigenvalues
        tensor([16.,  9.], dtype=torch.float64)
    """
    weight = as_float(W, name="W")
    if weight.ndim < 2 or weight.numel() == 0:
        raise MetricError(
            f"W must be a non-empty matrix or kernel, got shape {tuple(weight.shape)}; "
            f"a vector has no spectrum"
        )
    check_finite(weight, name="W")
    found = squared_singular_values(weight.flatten(1), name="W")
    return _result(found, kind="weight", ddof=None)


def rankme(X: Any, *, eps: float = 0.0) -> Tensor:
    r"""Return RankMe: the effective rank of the uncentred features.

    :math:`\exp(-\sum_i p_i \log p_i)` with
    :math:`p_i = \sigma_i / \sum_j \sigma_j + \epsilon` over the singular values of
    ``X`` itself. ``effective_rank`` reads the eigenvalues of the *covariance* instead;
    on the same features the two can differ tenfold.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        eps: Added to each share; the paper uses 1e-7.

    Returns:
        Shape ``(...)``, between 1 and ``min(n_samples, n_features)``; 0 for all zeros.

    References:
        Garrido, Balestriero, Najman and LeCun (2023), RankMe, ICML, arXiv 2210.02885.

    Example:
        >>> round(rankme([[1.0, 0.0], [0.0, 1.0]]).item(), 6)
        2.0
    """
    features, _ = rescaled(as_features(X))
    return entropy_rank(torch.linalg.svdvals(features), eps=eps)


# -- readings ----------------------------------------------------------------
def effective_rank(
    s: Any, *, of: Literal["eigenvalues", "singular_values"] = "eigenvalues"
) -> Tensor:
    r"""Return the exponential of the entropy of the eigenvalue shares.

    With :math:`p_i = \lambda_i / \sum_j \lambda_j`, this is
    :math:`\exp(-\sum_i p_i \log p_i)`: 1 when one direction carries all variance, k
    when k carry it equally. Invariant to scale and to rotations of the features.
    ``rankme`` is the same on the singular values of the *uncentred* features, and can
    be ten times larger on the same data.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.
        of: ``"singular_values"`` takes the shares of :math:`\sqrt{\lambda_i}`, as
            Roy and Vetterli do for the features themselves; a larger number.

    Returns:
        Shape ``(...)``; 0 for an all-zero spectrum.

    References:
        Roy and Vetterli (2007), The effective rank: a measure of effective
        dimensionality, EUSIPCO. Applied here to the covariance.

    Example:
        >>> round(effective_rank([3.0, 3.0, 0.0]).item(), 6)
        2.0
    """
    check_choice(of, ("eigenvalues", "singular_values"), name="of")
    if of == "eigenvalues" and isinstance(s, Spectrum):
        return s.effective_rank
    values = _relative(_eigenvalues(s))
    return entropy_rank(values if of == "eigenvalues" else values.sqrt())


def participation_ratio(s: Any) -> Tensor:
    r"""Return :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2`.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.

    Returns:
        Shape ``(...)``, between 1 and k; 0 for an all-zero spectrum. Biased downward
        by small samples: compare only values from equally many.

    References:
        Gao et al. (2017), A theory of multineuronal dimensionality, bioRxiv 214262.

    Example:
        >>> round(participation_ratio([3.0, 1.0]).item(), 6)
        1.6
    """
    values = _relative(_eigenvalues(s))
    return _unless_zero(values, values.sum(-1).square() / values.square().sum(-1))


def participation_ratio_from_features(X: Any, *, center: bool = True) -> Tensor:
    r"""Return the participation ratio of the covariance without its eigenvalues.

    :math:`(\mathrm{tr}\,C)^2 / \|C\|_F^2`, which is
    ``participation_ratio(spectrum(X))``: cheap enough to be read in every step of a
    training. With fewer samples than features it is taken from the row Gram matrix.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``, or the `Moments` of some.
            Float32 and less are multiplied in float32, which is right to about 1e-6.
        center: Subtract the mean of each feature.

    Returns:
        Shape ``(...)``; 0 where no feature varies.

    References:
        Gao et al. (2017), A theory of multineuronal dimensionality, bioRxiv 214262.

    Example:
        >>> X = [[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
        >>> round(participation_ratio_from_features(X).item(), 4)
        1.2195
    """
    return invariants([X], center=center)[0].participation_ratio


def invariants(X: Sequence[Any], *, center: bool = True) -> list[Invariants]:
    """Return trace and participation ratio of many, in the order of the inputs.

    Args:
        X: Features, each ``(..., n_samples, n_features)`` or `Moments`.
        center: Subtract the mean of each feature.

    Returns:
        As many.
    """
    names = [f"X[{i}]" for i in range(len(X))] if len(X) > 1 else ["X"] * len(X)
    return covariance_invariants(X, names=names, center=center, ddof=1)


def stable_rank(s: Any) -> Tensor:
    r"""Return :math:`\sum_i \lambda_i / \lambda_1`.

    Of a ``weight_spectrum`` this is the stable rank
    :math:`\|W\|_F^2 / \|W\|_2^2` of the weight; of a covariance it is the intrinsic
    dimension :math:`\mathrm{tr}\,C / \|C\|`.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.

    Returns:
        Shape ``(...)``, between 1 and k; 0 for an all-zero spectrum.

    References:
        Rudelson and Vershynin (2007), Sampling from large matrices, J. ACM 54(4);
        Tropp (2015), An introduction to matrix concentration inequalities, section 7.

    Example:
        >>> stable_rank([4.0, 2.0]).item()
        1.5
    """
    return _relative(_eigenvalues(s)).sum(-1)


def hill_number(s: Any, *, q: float) -> Tensor:
    r"""Return the Hill number of order q of the eigenvalue shares.

    :math:`(\sum_i p_i^q)^{1/(1-q)}`, which falls as q grows: the rank at ``q=0``,
    ``effective_rank`` at 1, ``participation_ratio`` at 2, ``stable_rank`` at infinity.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.
        q: Order, at least 0; ``math.inf`` is allowed.

    Returns:
        Shape ``(...)``, between 1 and k; 0 for an all-zero spectrum. At ``q=0`` values
        below ``k * eps`` of the largest are rounding and do not count.

    Raises:
        UsageError: If ``q`` is negative or NaN.

    References:
        Hill (1973), Diversity and evenness, Ecology 54(2).

    Example:
        >>> hill_number([2.0, 1.0, 1.0], q=0).item()
        3.0
    """
    if not q >= 0:
        raise UsageError(f"q must be at least 0, got {q}")
    values = _relative(_eigenvalues(s))
    if q == 0:
        return (values > _rank_cut(s, values)).sum(-1).to(torch.float64)
    if q == 1:
        return effective_rank(s)
    if q == float("inf"):
        return stable_rank(s)
    p = values / values.sum(-1, keepdim=True)
    return _unless_zero(values, ((q * p.log()).logsumexp(-1) / (1 - q)).exp())


def explained_variance_ratio(s: Any) -> Tensor:
    r"""Return the shares :math:`\lambda_i / \sum_j \lambda_j`.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.

    Returns:
        Shape ``(..., k)``, descending, sums to 1; NaN for an all-zero spectrum.

    Example:
        >>> explained_variance_ratio([3.0, 1.0]).tolist()
        [0.75, 0.25]
    """
    values = _relative(_eigenvalues(s))
    return values / values.sum(-1, keepdim=True)


def n_components(s: Any, *, fraction: float = 0.99) -> Tensor:
    """Return the smallest k whose k largest eigenvalues hold the fraction.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.
        fraction: Share of the total variance to reach, in (0, 1].

    Returns:
        Integers of shape ``(...)``; 0 for an all-zero spectrum.

    Raises:
        UsageError: If ``fraction`` is outside (0, 1].

    Example:
        >>> n_components([6.0, 3.0, 1.0], fraction=0.9).item()
        2
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"fraction must lie in (0, 1], got {fraction}")
    shares = explained_variance_ratio(s)
    # Equal shares of 1/10 sum to 0.30000000000000004: reach 0.3 all the same.
    slack = shares.shape[-1] * torch.finfo(torch.float64).eps
    short = (shares.cumsum(-1) < fraction - slack).sum(-1)
    return torch.where(shares[..., 0].isnan(), 0, short + 1)


def n_significant(
    s: Any,
    *,
    threshold: float = 0.01,
    relative_to: Literal["max", "mean"] = "max",
) -> Tensor:
    """Return how many eigenvalues exceed ``threshold`` times a reference.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.
        threshold: Factor on the reference, at least 0; part of the number's name.
        relative_to: The largest eigenvalue, or the mean of all k.

    Returns:
        Integers of shape ``(...)``; 0 for an all-zero spectrum.

    Raises:
        UsageError: If ``threshold`` is negative or NaN.

    Example:
        >>> n_significant([100.0, 2.0, 0.5]).item()
        2
    """
    check_choice(relative_to, ("max", "mean"), name="relative_to")
    if not threshold >= 0:
        raise UsageError(f"threshold must be at least 0, got {threshold}")
    values = _relative(_eigenvalues(s))
    by_max = relative_to == "max"
    reference = values[..., :1] if by_max else values.mean(-1, keepdim=True)
    return (values > threshold * reference).sum(-1)


def trace(s: Any) -> Tensor:
    """Return the sum of the eigenvalues: the total variance.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.

    Returns:
        Shape ``(...)``, in squared units of the features.

    Example:
        >>> trace([3.0, 1.0]).item()
        4.0
    """
    return _eigenvalues(s).sum(-1)


def majorizes(s: Any, t: Any) -> Tensor:
    """Return whether the cumulative shares of ``s`` never fall below those of ``t``.

    If they do not, every rank in this family is at most as large for ``s``. If neither
    spectrum majorizes the other, which one has the higher rank depends on the
    definition.

    Args:
        s: A ``Spectrum``, or eigenvalues ``(..., k)``, descending and non-negative.
        t: The same; a shorter one counts as padded with zeros.

    Returns:
        Booleans of shape ``(...)``; False when either spectrum is all zero.

    References:
        Marshall, Olkin and Arnold (2011), Inequalities: theory of majorization.

    Example:
        >>> majorizes([3.0, 1.0], [2.0, 2.0]).item()
        True
    """
    first, second = explained_variance_ratio(s), explained_variance_ratio(t)
    width = max(first.shape[-1], second.shape[-1])
    ours, theirs = (
        torch.nn.functional.pad(shares, (0, width - shares.shape[-1])).cumsum(-1)
        for shares in (first, second)
    )
    return (ours - theirs >= -width * torch.finfo(torch.float64).eps).all(-1)


def compare_spectra(s: Any, t: Any) -> Order:
    """Return whether the rank of ``s`` is lower or higher whichever definition is used.

    By ``majorizes``, which settles every ``hill_number`` (and so ``effective_rank``,
    ``participation_ratio`` and ``stable_rank``) and ``n_components``. Crossing
    cumulative shares settle nothing. ``n_significant`` relative to the largest
    eigenvalue is not bound by it.

    Args:
        s: One ``Spectrum`` or its eigenvalues ``(k,)``, descending and non-negative.
        t: The same; a shorter one counts as padded with zeros.

    Returns:
        ``"lower for every definition"``, ``"higher for every definition"``,
        ``"equal for every definition"``, ``"definition-dependent"``, or ``"undefined"``
        when either is all zero.

    Raises:
        MetricError: If either is a batch.

    References:
        Marshall, Olkin and Arnold (2011), Inequalities: theory of majorization.

    Example:
        >>> compare_spectra([3.0, 1.0], [2.0, 2.0])
        'lower for every definition'
    """
    both = [_eigenvalues(s), _eigenvalues(t)]
    for name, values in zip("st", both, strict=True):
        if values.ndim != 1:
            raise MetricError(
                f"compare_spectra takes one spectrum as {name}, got shape "
                f"{tuple(values.shape)}; loop over the batch"
            )
    if not all(bool(values.any()) for values in both):
        return "undefined"
    return _ORDERS[bool(majorizes(s, t)), bool(majorizes(t, s))]


def power_law(s: Any, *, first: int = 1, last: int | None = None) -> PowerLaw:
    r"""Fit :math:`\lambda_i \sim i^{-s}` by least squares on logarithms.

    A description of the range, not evidence of a power law: fits that straight are
    common among other spectra, and the range moves the exponent.

    Args:
        s: One ``Spectrum`` or its eigenvalues ``(k,)``, descending and non-negative.
        first: First index of the range, counted from 1.
        last: Last index; by default the last eigenvalue above the rank cut,
            ``k * eps`` of the largest.

    Returns:
        Exponent, range used, r2 and the standard error of the exponent; NaN with a
        ``note`` below 10 points. r2 is NaN when all eigenvalues are equal.

    Raises:
        MetricError: If ``s`` is a batch.
        UsageError: If the range leaves the positive eigenvalues.

    Example:
        >>> fit = power_law([i**-2.0 for i in range(1, 101)], first=10)
        >>> round(fit.exponent, 4), fit.last
        (2.0, 100)
    """
    values = _relative(_eigenvalues(s))
    if values.ndim != 1:
        raise MetricError(
            f"power_law takes one spectrum, got shape {tuple(values.shape)}; loop over "
            f"the batch"
        )
    positive = int((values > (_rank_cut(s, values) if last is None else 0)).sum())
    end = positive if last is None else last
    if first < 1 or end > positive:
        raise UsageError(
            f"the range {first}..{end} must lie within 1..{positive}, the eigenvalues "
            f"above 0"
        )
    n = end - first + 1
    if n < _POWER_LAW_POINTS:
        note = f"{max(n, 0)} eigenvalues in the range, {_POWER_LAW_POINTS} needed"
        return PowerLaw(_NAN, first, end, _NAN, _NAN, note)
    return _fit(values[first - 1 : end].log(), first=first, last=end)


# -- helpers -----------------------------------------------------------------
_NAN = float("nan")


def _of_features(found: Eigenvalues, *, center: bool, ddof: int) -> Spectrum:
    kind: Kind = "covariance" if center else "second_moment"
    return _result(found, kind=kind, ddof=ddof)


def _result(found: Eigenvalues, *, kind: Kind, ddof: int | None) -> Spectrum:
    return Spectrum(
        eigenvalues=found.values,
        kind=kind,
        n_samples=found.shape[0],
        n_features=found.shape[1],
        ddof=ddof,
        effective_rank=found.effective_rank,
        degenerate="constant" if bool(found.constant.any()) else None,
    )


def _eigenvalues(s: Any) -> Tensor:
    if isinstance(s, Spectrum):
        return s.eigenvalues
    values = as_float(s, name="s")
    if values.ndim == 0 or values.numel() == 0:
        raise MetricError(
            f"s must hold eigenvalues (..., k), got shape {tuple(values.shape)}"
        )
    check_finite(values, name="s")
    values = clip_rounding(values, name="s")
    _check_descending(values)
    return values.to(torch.float64)


def _check_descending(values: Tensor) -> None:
    tolerance = torch.finfo(values.dtype).eps ** 0.5 * values.amax(-1, keepdim=True)
    rises = values.diff(dim=-1) > tolerance
    if not bool(rises.any()):
        return
    falls = values.diff(dim=-1) < -tolerance
    guess = (
        "features or unsorted values: pass rs.spectrum(X), or sort them"
        if bool(falls.any())
        else "in the ascending order of numpy and torch: pass s.flip(-1)"
    )
    raise MetricError(
        f"s must be descending eigenvalues; these {tuple(values.shape)} look like "
        f"{guess}"
    )


def _relative(values: Tensor) -> Tensor:
    """Return values over the largest, so that no sum overflows; zeros stay zeros."""
    top = values[..., :1]
    return torch.where(top > 0, values / top, 0.0)


def _unless_zero(values: Tensor, rank: Tensor) -> Tensor:
    return torch.where(values[..., 0] > 0, rank, 0.0)


def _rank_cut(s: Any, values: Tensor) -> float:
    # A Spectrum has been cut already; raw values carry the rounding of their dtype.
    if isinstance(s, Spectrum):
        return 0.0
    return values.shape[-1] * torch.finfo(as_float(s, name="s").dtype).eps


def _fit(y: Tensor, *, first: int, last: int) -> PowerLaw:
    x = torch.arange(first, last + 1, device=y.device, dtype=torch.float64).log()
    dx, dy = x - x.mean(), y - y.mean()
    sxx, total = dx.square().sum(), dy.square().sum()
    slope = (dx * dy).sum() / sxx
    left = (dy - slope * dx).square().sum()
    stderr = (left / (len(y) - 2) / sxx).sqrt()
    # Equal eigenvalues leave only rounding to explain.
    flat = bool(total <= len(y) * 1e-24)
    return PowerLaw(
        exponent=-float(slope),
        first=first,
        last=last,
        r2=_NAN if flat else float(1 - left / total),
        stderr=float(stderr),
        note="all eigenvalues in the range are equal" if flat else "",
    )


def _effective_rank_sigma(s: Spectrum) -> Tensor:
    return effective_rank(s, of="singular_values")


SPECTRUM_METRICS: dict[str, Callable[[Spectrum], Tensor]] = {
    "effective_rank": effective_rank,
    "effective_rank_sigma": _effective_rank_sigma,
    "participation_ratio": participation_ratio,
    "stable_rank": stable_rank,
    "n_components": n_components,
    "n_significant": n_significant,
    "trace": trace,
}
