"""The same weights through WeightWatcher, where the definition is the same."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import repscope as rs

pytestmark = [
    pytest.mark.crosschecks,
    pytest.mark.filterwarnings("ignore"),  # its own, and there are many
]


@pytest.fixture
def weightwatcher():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("weightwatcher", exc_type=ImportError)


def details(weightwatcher, model, **options):
    watcher = weightwatcher.WeightWatcher(model=model)
    return watcher.analyze(min_evals=1, **options)


def test_stable_rank_of_every_layer(weightwatcher):
    model = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40))
    table = details(weightwatcher, model)
    for found, layer in zip(table["stable_rank"], (model[0], model[2]), strict=True):
        spectrum = rs.weight_spectrum(layer.weight)
        assert rs.stable_rank(spectrum).item() == pytest.approx(found, rel=1e-5)
    for found, layer in zip(table["lambda_max"], (model[0], model[2]), strict=True):
        top = rs.weight_spectrum(layer.weight).eigenvalues[0]
        assert top.item() == pytest.approx(found, rel=1e-5)


def test_a_kernel_is_another_matrix_there(weightwatcher):
    """A kernel is cut into one matrix per place of the window; ours is one matrix."""
    model = nn.Sequential(nn.Conv2d(20, 30, 3))
    (found,) = details(weightwatcher, model)["stable_rank"]
    W = model[0].weight.detach()
    ours = rs.stable_rank(rs.weight_spectrum(W)).item()
    places = W.flatten(2).movedim(-1, 0).double().numpy()
    values = np.concatenate([np.linalg.svd(m, compute_uv=False) ** 2 for m in places])
    assert values.sum() / values.max() == pytest.approx(found, rel=1e-4)
    assert found > 3 * ours


def test_the_exponent_of_the_density_is_one_over_ours_plus_one(weightwatcher):
    """lambda_i ~ i^-s has a density ~ lambda^-(1 + 1/s)."""
    s, n = 0.8, 400
    values = np.arange(1, n + 1.0) ** -s
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in "ab")
    layer = nn.Linear(n, n, bias=False)
    layer.weight.data = torch.from_numpy((left * np.sqrt(values)) @ right).float()
    (alpha,) = details(weightwatcher, nn.Sequential(layer))["alpha"]
    fit = rs.power_law(rs.weight_spectrum(layer.weight), last=n // 2)
    assert fit.exponent == pytest.approx(s, abs=1e-4)
    assert alpha == pytest.approx(1 + 1 / s, rel=0.05)  # maximum likelihood, in bins
