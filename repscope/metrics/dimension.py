"""Within and between classes, and whether there were enough examples to say so.

Features have shape ``(..., n_samples, n_features)``; leading dimensions are batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_features, as_labels
from repscope.errors import NotEnoughSamples
from repscope.linalg.covariance import rescaled
from repscope.linalg.spectral import covariance_eigenvalues
from repscope.results import ClassDimension, RankStability

# Two halves with two examples each, or a half has no covariance.
_FEWEST_EXAMPLES = 4
# Fewer examples a feature, and the sample limits every rank.
_EXAMPLES_A_FEATURE = 5


def class_dimension(X: Any, y: Any) -> ClassDimension:
    r"""Return the effective ranks within and between classes, with trace shares.

    The covariance is the sum of :math:`\frac1n \sum_c \sum_{i \in c} (x_i - \mu_c)
    (x_i - \mu_c)^\top` (within) and :math:`\frac1n \sum_c n_c (\mu_c - \mu)
    (\mu_c - \mu)^\top` (between, :math:`\mu` the mean of all samples). Between classes
    there are at most :math:`C - 1` directions, so the rank of pooled features mostly
    reads the within part.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.

    Returns:
        Ranks, in directions, and shares of the total variance, which sum to 1. A class
        of one sample has a mean and adds nothing within. A part in which no feature
        varies by more than rounding has rank 0; the shares are NaN when both have.

    References:
        Fukunaga (1990), Introduction to statistical pattern recognition, chapter 10;
        Papyan (2020), Traces of class/cross-class structure, JMLR 21.

    Example:
        >>> X = [[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]]
        >>> found = class_dimension(X, [0, 0, 1, 1])
        >>> round(found.within_rank.item(), 4), round(found.between_share.item(), 4)
        (1.0, 0.8)
    """
    given = as_features(X)
    labels = as_labels(y, n_samples=given.shape[-2], device=given.device)
    classes, members, counts = torch.unique(
        labels, return_inverse=True, return_counts=True
    )
    features, _ = rescaled(given)
    # Rounding of the values as they came, and of our sums, for each feature: what does
    # not exceed it does not vary.
    eps = max(torch.finfo(given.dtype).eps, 8 * torch.finfo(torch.float64).eps)
    noise = (eps * features.abs().amax(-2, keepdim=True)).square()
    centred = features - features.mean(-2, keepdim=True)
    sums = centred.new_zeros(*centred.shape[:-2], len(classes), centred.shape[-1])
    means = sums.index_add(-2, members, centred) / counts[:, None]
    weights = (counts / len(labels))[:, None]
    away = (means - (weights * means).sum(-2, keepdim=True)) * weights.sqrt()
    within = _varying(centred - means.index_select(-2, members), noise * len(labels))
    between = _varying(away, noise)
    ranks = [_rank(part) for part in (within, between)]
    traces = within.square().mean(-2).sum(-1), between.square().sum((-2, -1))
    total = traces[0] + traces[1]
    return ClassDimension(
        within_rank=ranks[0],
        between_rank=ranks[1],
        within_share=traces[0] / total,
        between_share=traces[1] / total,
        classes=classes,
        counts=counts,
    )


def rank_stability(X: Any, *, groups: Any = None, seed: int = 0) -> RankStability:
    """Return the effective rank of all examples and of two random halves.

    Every rank grows with the sample until there is enough of it. Halves that differ,
    or that both stay well below the whole, say that there is not.

    Args:
        X: Features, shape ``(..., n_samples, n_features)``.
        groups: The example each row belongs to, integers of shape ``(n_samples,)``,
            where one has several (tokens, positions): rows of an example are not
            independent and stay in one half. Default: each row is an example.
        seed: Of the split; with an odd number of examples one is in neither half.

    Returns:
        Effective ranks (eigenvalues, centred) of all, of both halves, and their ratio.

    Raises:
        NotEnoughSamples: If there are fewer than 4 examples.

    Example:
        >>> X = [[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]
        >>> found = rank_stability(X)
        >>> found.effective_rank.item(), found.ratio.item(), found.note
        (1.0, 1.0, 'n_examples < 5 n_features')
    """
    features = as_features(X)
    n, d = features.shape[-2:]
    rows = range(n) if groups is None else groups
    owners = as_labels(rows, n_samples=n, device=features.device)
    names, example = torch.unique(owners, return_inverse=True)
    if len(names) < _FEWEST_EXAMPLES:
        raise NotEnoughSamples(
            f"two halves need at least {_FEWEST_EXAMPLES} examples, got {len(names)} "
            f"({n} rows)"
        )
    half = len(names) // 2
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(len(names), generator=generator).to(features.device)[example]
    parts = [
        features,
        features[..., place < half, :],
        features[..., (half <= place) & (place < 2 * half), :],
    ]
    ranks = [
        found.effective_rank
        for found in covariance_eigenvalues(
            parts, names=["X", "a half of X", "a half of X"], center=True, ddof=1
        )
    ]
    halves = torch.stack(ranks[1:], -1)
    few = len(names) < _EXAMPLES_A_FEATURE * d
    return RankStability(
        effective_rank=ranks[0],
        halves=halves,
        ratio=halves.mean(-1) / ranks[0],
        n_examples=len(names),
        note=f"n_examples < {_EXAMPLES_A_FEATURE} n_features" if few else "",
    )


# -- helpers -----------------------------------------------------------------
def _varying(rows: Tensor, noise: Tensor) -> Tensor:
    """Return rows with the features set to zero whose squares sum to no more."""
    return torch.where(rows.square().sum(-2, keepdim=True) > noise, rows, 0.0)


def _rank(rows: Tensor) -> Tensor:
    # A second row, of zeros, for the one class: it adds nothing.
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    (found,) = covariance_eigenvalues([padded], names=["X"], center=False, ddof=0)
    return found.effective_rank
