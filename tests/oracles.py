"""Slow float64 twins in numpy, scipy and scikit-learn that share no code with ours."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import scipy.linalg
import scipy.spatial
import scipy.spatial.distance
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


# -- similarity --------------------------------------------------------------
def centred(X) -> np.ndarray:
    X = as_array(X)
    return X - X.mean(0)


def cka(X, Y) -> float:
    """Return HSIC over HSICs, from kernels and the centring matrix."""
    n = len(as_array(X))
    H = np.eye(n) - 1 / n
    K, L = (as_array(V) @ as_array(V).T for V in (X, Y))
    cross, one, other = (np.trace(A @ H @ B @ H) for A, B in ((K, L), (K, K), (L, L)))
    return float(cross / math.sqrt(one * other))


def hsic_1(X, Y) -> float:
    """Return Song et al.'s equation 5, on the kernels without their diagonals."""
    X, Y = as_array(X), as_array(Y)
    n, ones = len(X), np.ones(len(X))
    K, L = (V @ V.T * (1 - np.eye(n)) for V in (X, Y))
    terms = np.trace(K @ L)
    terms += ones @ K @ ones * (ones @ L @ ones) / ((n - 1) * (n - 2))
    terms -= 2 / (n - 2) * (ones @ K @ L @ ones)
    return float(terms / (n * (n - 3)))


def debiased_cka(batches) -> float:
    """Return the ratio of sums over ``(X, Y)`` batches."""
    cross = sum(len(X) * hsic_1(X, Y) for X, Y in batches)
    one = sum(len(X) * hsic_1(X, X) for X, _ in batches)
    other = sum(len(X) * hsic_1(Y, Y) for X, Y in batches)
    return cross / math.sqrt(one * other)


def procrustes(X, Y) -> float:
    """Return the distance from scipy's disparity, 1 - (nuclear norm)^2."""
    X, Y = as_array(X), as_array(Y)
    width = max(X.shape[1], Y.shape[1])
    X, Y = (np.pad(V, ((0, 0), (0, width - V.shape[1]))) for V in (X, Y))
    disparity = scipy.spatial.procrustes(X, Y)[2]
    return math.sqrt(2 - 2 * math.sqrt(1 - disparity))


def principal_angles(X, Y, k, *, space="samples") -> np.ndarray:
    """Return scipy's angles between the leading components of scikit-learn's PCA."""
    found = []
    for V in (X, Y):
        pca = PCA(k, svd_solver="full").fit(as_array(V))
        basis = pca.transform(as_array(V)) if space == "samples" else pca.components_.T
        found.append(basis)
    return np.sort(scipy.linalg.subspace_angles(*found))


def neural_collapse(X, y, weight=None, bias=None) -> dict[str, float]:
    """Papyan et al. (2020), section "neural collapse", with full covariances."""
    X, y = as_array(X), np.asarray(y)
    classes = np.unique(y)
    C = len(classes)
    mu = np.stack([X[y == label].mean(0) for label in classes])
    M = mu - mu.mean(0)
    H = X - mu[np.searchsorted(classes, y)]
    within, between = H.T @ H / len(X), M.T @ M / C
    # scipy's own cut-off is relative to the largest eigenvalue, too.
    inverse = scipy.linalg.pinvh(between, rtol=max(M.shape) * np.finfo(float).eps)
    pairs = list(itertools.combinations(range(C), 2))
    v = [np.square(H[y == label]).sum() / (y == label).sum() for label in classes]
    cosines = cosine_similarity(M)
    found = {
        "nc1": np.trace(within @ inverse) / C,
        "cdnv": np.mean(
            [
                (v[a] + v[b]) / 2 / scipy.spatial.distance.sqeuclidean(mu[a], mu[b])
                for a, b in pairs
            ]
        ),
        "nc2_equinorm": scipy.stats.variation(np.linalg.norm(M, axis=1)),
        "nc2_equiangular": np.mean([abs(cosines[p] + 1 / (C - 1)) for p in pairs]),
    }
    if weight is not None:
        W, b = as_array(weight), as_array(bias)
        used = W[classes]
        found["nc3"] = np.linalg.norm(
            used / np.linalg.norm(used) - M / np.linalg.norm(M)
        )
        nearest = classes[scipy.spatial.distance.cdist(X, mu).argmin(1)]
        decided = np.array([(W @ x + b).argmax() for x in X])
        found["nc4"] = np.mean(nearest != decided)
        found["accuracy"] = np.mean(decided == y)
    return {name: float(value) for name, value in found.items()}


# -- units -------------------------------------------------------------------
def sokar_scores(X) -> list[float]:
    X = as_array(X)
    means = [math.fsum(abs(column)) / len(column) for column in X.T]
    return [m * len(means) / math.fsum(means) for m in means]


def treves_rolls(X) -> float:
    """Return 1 - a with their a, sample by sample."""
    rows = [
        1 - (math.fsum(row) / len(row)) ** 2 / (math.fsum(row**2) / len(row))
        for row in as_array(X)
        if row.any()
    ]
    return math.fsum(rows) / len(rows)


def overlap(X, y) -> np.ndarray:
    X, y = as_array(X), np.asarray(y)
    profiles = [X[y == label].mean(0) for label in np.unique(y)]
    profiles = [p / p.mean() for p in profiles]
    return np.array([[np.minimum(p, q).mean() for q in profiles] for p in profiles])


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


# -- trajectories ------------------------------------------------------------
def movement(points) -> dict[str, float]:
    """Read the path of points that are flat rows."""
    points = np.stack([as_array(p).ravel() for p in points])
    steps = np.diff(points, axis=0)
    sizes = np.linalg.norm(steps, axis=1)
    cosines = [
        1 - scipy.spatial.distance.cosine(a, b) for a, b in itertools.pairwise(steps)
    ]
    net = np.linalg.norm(points[-1] - points[0])
    return {
        "path_length": sizes.sum(),
        "displacement": net,
        "wasted": sizes.sum() / net,
        "step_cosine": np.mean(cosines),
    }
