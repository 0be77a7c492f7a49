"""Slow float64 twins in numpy, scipy and scikit-learn that share no code with ours."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import scipy.linalg
import scipy.stats
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity


def as_array(value) -> np.ndarray:
    return np.asarray(value, dtype=np.float64)


# -- spectra -----------------------------------------------------------------
def exact_covariance(X, *, ddof: int = 1) -> np.ndarray:
    """Return the covariance of float input in rational arithmetic, rounded once."""
    rows = [[Fraction(float(v)) for v in row] for row in X]
    n, d = len(rows), len(rows[0])
    means = [sum(row[j] for row in rows) / n for j in range(d)]
    return np.array(
        [
            [
                float(
                    sum((r[i] - means[i]) * (r[j] - means[j]) for r in rows)
                    / (n - ddof)
                )
                for j in range(d)
            ]
            for i in range(d)
        ]
    )


def pca_variances(X) -> np.ndarray:
    X = as_array(X)
    found = PCA(svd_solver="full").fit(X).explained_variance_
    return np.pad(found, (0, X.shape[1] - len(found)))


def entropy_rank(weights) -> float:
    return float(np.exp(scipy.stats.entropy(as_array(weights))))


def spectrum_readings(X) -> dict[str, float]:
    values = pca_variances(X)
    shares = values / values.sum()
    sigma = scipy.linalg.svdvals(as_array(X) - as_array(X).mean(0))
    return {
        "effective_rank": entropy_rank(values),
        "effective_rank_sigma": entropy_rank(sigma),
        "participation_ratio": 1 / float(np.square(shares).sum()),
        "stable_rank": 1 / float(shares.max()),
        "n_components": next(
            k for k in range(1, len(shares) + 1) if shares[:k].sum() >= 0.99
        ),
        "n_significant": int((values > 0.01 * values.max()).sum()),
        "trace": float(np.var(as_array(X), axis=0, ddof=1).sum()),
    }


def rankme(X, eps: float = 0.0) -> float:
    sigma = scipy.linalg.svdvals(as_array(X))
    p = sigma / np.abs(sigma).sum() + eps
    return math.exp(-float((p * np.log(p)).sum()))


def line(x, y) -> tuple[float, float, float]:
    """Return slope, r2 and the standard error of the slope."""
    fit = scipy.stats.linregress(x, y)
    return fit.slope, fit.rvalue**2, fit.stderr


# -- classes -----------------------------------------------------------------
def class_cosine_means(X, y, *, center: bool = False) -> np.ndarray:
    X, y = as_array(X), np.asarray(y)
    means = np.stack([X[y == label].mean(0) for label in np.unique(y)])
    return cosine_similarity(means - means.mean(0) if center else means)


def class_cosine_pairs(X, y) -> np.ndarray:
    """Average the full n x n matrix, block by block."""
    X, y = as_array(X), np.asarray(y)
    full, classes = cosine_similarity(X), np.unique(y)
    matrix = np.empty((len(classes), len(classes)))
    for i, a in enumerate(classes):
        for j, b in enumerate(classes):
            block = full[np.ix_(y == a, y == b)]
            if a == b:
                block = block[~np.eye(len(block), dtype=bool)]
            matrix[i, j] = block.mean()
    return matrix


def off_diagonal_mean(matrix) -> float:
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


# -- weights -----------------------------------------------------------------
def hoyer(w) -> float:
    w = as_array(w).ravel()
    n = math.sqrt(len(w))
    ratio = np.linalg.norm(w, 1) / np.linalg.norm(w, 2)
    return float((n - ratio) / (n - 1))


def log_histogram(w, bins: int) -> np.ndarray:
    magnitudes = np.abs(as_array(w).ravel())
    return np.histogram(magnitudes, np.logspace(-10, 2, bins + 1))[0]


def smallest(weights: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Return copies with the ``count`` smallest magnitudes of all set to zero."""
    places = [
        (abs(float(v)), t, i)
        for t, w in enumerate(weights)
        for i, v in enumerate(w.ravel())
    ]
    copies = [w.copy() for w in weights]
    for _, t, i in sorted(places)[:count]:
        copies[t].ravel()[i] = 0.0
    return copies


# -- seeds -------------------------------------------------------------------
def sign_flip_p(differences) -> float:
    d = as_array(differences)
    patterns = itertools.product([-1, 1], repeat=len(d))
    means = np.array([abs(np.dot(p, d)) for p in patterns])
    return float((means >= abs(d.sum()) - 1e-9).mean())


def closed_bonferroni(p) -> list[float]:
    """Return the largest Bonferroni p over all subsets that hold each hypothesis."""
    places = range(len(p))
    subsets = [s for r in places for s in itertools.combinations(places, r + 1)]
    return [
        max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
        for i in places
    ]
