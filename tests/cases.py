"""Inputs with known answers, every number derived by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def planted(
    eigenvalues: list[float], *, n_samples: int, mean: float = 3.0, seed: int = 0
) -> Tensor:
    """Return features whose covariance (ddof 1) has exactly these eigenvalues."""
    rng = np.random.default_rng(seed)
    d = len(eigenvalues)
    k = min(n_samples - 1, d)
    left = rng.standard_normal((n_samples, k))
    left, _ = np.linalg.qr(left - left.mean(0))
    right, _ = np.linalg.qr(rng.standard_normal((d, d)))
    scale = np.sqrt(np.asarray(eigenvalues[:k]) * (n_samples - 1))
    return torch.from_numpy(left * scale @ right[:, :k].T + mean)


@dataclass(frozen=True)
class SpectrumCase:
    """A spectrum whose readings have closed forms."""

    name: str
    eigenvalues: list[float]
    effective_rank: float
    participation_ratio: float
    stable_rank: float
    n_components: int
    n_significant: int
    n_samples: int = 60

    @property
    def features(self) -> Tensor:
        return planted(self.eigenvalues, n_samples=self.n_samples)

    @property
    def trace(self) -> float:
        return math.fsum(self.eigenvalues)


def isotropic(k: int) -> SpectrumCase:
    return SpectrumCase("isotropic", [2.0] * k, k, k, k, math.ceil(0.99 * k), k)


def rank_k(k: int, d: int, n_samples: int = 60) -> SpectrumCase:
    """k equal eigenvalues among d: every rank is k."""
    values = [5.0] * k + [0.0] * (d - k)
    name = f"rank-{k}" if n_samples > d else f"rank-{k}, n < d"
    return SpectrumCase(name, values, k, k, k, math.ceil(0.99 * k), k, n_samples)


def geometric(r: float, k: int) -> SpectrumCase:
    """r^i for i < k, from the sums of the geometric series."""
    total = (1 - r**k) / (1 - r)
    squares = (1 - r ** (2 * k)) / (1 - r**2)
    # entropy = log(total) - log(r) * E[i], E[i] = r/(1-r) - k r^k/(1-r^k)
    mean_index = r / (1 - r) - k * r**k / (1 - r**k)
    return SpectrumCase(
        "geometric",
        [r**i for i in range(k)],
        math.exp(math.log(total) - math.log(r) * mean_index),
        total**2 / squares,
        total,
        # smallest j with 1 - r^j >= 0.99 (1 - r^k)
        math.ceil(math.log(1 - 0.99 * (1 - r**k)) / math.log(r)),
        # r^i > 0.01
        math.floor(math.log(0.01) / math.log(r)) + 1,
    )


def two_level(high: float, m: int, low: float, k: int) -> SpectrumCase:
    """m eigenvalues ``high`` and k - m ``low``, with low/high above 1 %."""
    total = m * high + (k - m) * low
    entropy = -m * high / total * math.log(high / total)
    entropy -= (k - m) * low / total * math.log(low / total)
    missing = math.ceil((0.99 * total - m * high) / low)
    return SpectrumCase(
        "two-level",
        [high] * m + [low] * (k - m),
        math.exp(entropy),
        total**2 / (m * high**2 + (k - m) * low**2),
        total / high,
        m + missing,
        k,
    )


SPECTRA = [
    isotropic(8),
    rank_k(3, 8),
    rank_k(1, 8),
    rank_k(4, 90, n_samples=30),
    geometric(0.5, 10),
    two_level(9.0, 2, 1.0, 12),
]


def simplex_etf(n_classes: int) -> Tensor:
    """Return unit vectors with all cosines -1/(C-1) and sum zero."""
    C = n_classes
    centred = torch.eye(C, dtype=torch.float64) - 1 / C
    return centred * math.sqrt(C / (C - 1))


def etf_with_offset(n_classes: int, offset: float) -> tuple[Tensor, Tensor, float]:
    """Return features, labels and the uncentred cosine of every class pair.

    Class means are an ETF (s^2 = 1) plus a common vector of norm ``offset`` = m at
    right angles: cosine (m^2 - s^2/(C-1)) / (m^2 + s^2).
    """
    means = torch.nn.functional.pad(simplex_etf(n_classes), (0, 1), value=offset)
    spread = torch.zeros(n_classes + 1, dtype=torch.float64)
    spread[0] = 0.25
    X = torch.cat([means + spread, means - spread])
    y = torch.arange(n_classes).repeat(2) * 3 + 1
    cosine = (offset**2 - 1 / (n_classes - 1)) / (offset**2 + 1)
    return X, y, cosine


NAN = float("nan")
# Rows: after task 1, 2, 3. Columns: accuracy on task 1, 2, 3.
ACCURACY = [
    [90.0, NAN, NAN],
    [94.0, 80.0, NAN],
    [60.0, 86.0, 70.0],
]
ACCURACY_ANSWERS = {
    "average_accuracy": (60 + 86 + 70) / 3,
    "learning_accuracy": (90 + 80 + 70) / 3,
    "forgetting": ((90 - 60) + (80 - 86)) / 2,
    "forgetting_max": ((94 - 60) + (80 - 86)) / 2,
    "backward_transfer": ((60 - 90) + (86 - 80)) / 2,
    "old_task_accuracy": (60 + 86) / 2,
    "last_task_accuracy": 70.0,
}

CONSTANTS = {
    "zeros": torch.zeros(20, 5),
    "ones": torch.ones(20, 5),
    "float32 rounding": torch.tensor(0.1)
    .nextafter(torch.arange(20.0) % 2)[:, None]
    .repeat(1, 5),
    "bfloat16": torch.full((20, 5), 3.3, dtype=torch.bfloat16),
    "integers": torch.full((20, 5), 7, dtype=torch.int8),
    "n < d": torch.ones(3, 9),
}
