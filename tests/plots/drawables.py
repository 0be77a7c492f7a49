"""Results to draw, by kind of plot."""

from __future__ import annotations

import torch

from repscope import plots
from repscope.results import (
    Band,
    ClassCosine,
    Histogram,
    Interval,
    SparsityCurve,
    Spectrum,
)


def spectrum(eigenvalues, *, kind="covariance") -> Spectrum:
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    shares = values[values > 0] / values.sum()
    rank = torch.exp(-(shares * shares.log()).sum())
    return Spectrum(values, kind, 100, len(values), 1, rank)


def band(x, estimate, *, half=0.05) -> Band:
    x, estimate = torch.tensor(x), torch.tensor(estimate, dtype=torch.float64)
    n = torch.full(x.shape, 5)
    return Band(x, estimate, estimate - half, estimate + half, n)


def cosine(matrix) -> ClassCosine:
    matrix = torch.tensor(matrix)
    n = len(matrix)
    return ClassCosine(
        matrix, torch.arange(n), torch.ones(n), torch.tensor(0.9), n_excluded=0
    )


def histogram(counts, *, low=-3, **outside) -> Histogram:
    edges = torch.logspace(low, low + len(counts), len(counts) + 1)
    fields = {"n_zero": 0, "underflow": 0, "overflow": 0} | outside
    return Histogram(torch.tensor(counts), edges, **fields)


def curve(sparsity, score, *, dense=0.97) -> SparsityCurve:
    sparsity = torch.tensor(sparsity)
    return SparsityCurve(sparsity, sparsity / 10, torch.tensor(score), dense)


def interval(estimate, *, half=0.02, n=5) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, n, "t, 95 %")


NAN = float("nan")

# kind -> (something to draw for one label, the same without a drawable value)
ONE = {
    "spectrum": (spectrum([4.0, 2.0, 1.0, 0.0]), spectrum([0.0, 0.0])),
    "rank_over_time": (band([0, 10, 20], [30.0, 9.0, 20.0]), band([0], [NAN])),
    "alignment": (cosine([[1.0, 0.8], [0.8, 1.0]]), cosine([[NAN]])),
    "weight_histogram": (histogram([1, 5, 2]), histogram([0, 0, 0])),
    "sparsity": (curve([0.5, 0.9], [0.95, 0.7]), curve([0.5], [NAN])),
    "forgetting": (band([1, 2, 3], [0.6, 0.8, 0.9]), band([1], [NAN])),
    "accuracy": (interval(0.9), interval(NAN)),
}
MAPPINGS = [kind for kind in ONE if kind != "alignment"]


def draw(kind, result, **options):
    """Draw one result of a kind, under the label "shampoo" where it takes labels."""
    named = result if kind == "alignment" else {"shampoo": result}
    return plots.PLOTS[kind](named, **options)
