"""Numbers of published packages for the same input; skipped where they are missing.

Run by `pytest -m crosschecks tests/crosschecks`; none of them is a dependency.
"""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

import repscope as rs

pytestmark = pytest.mark.crosschecks


def package(name):
    """Return a module, or skip: also when it is there and cannot be loaded."""
    return pytest.importorskip(name, exc_type=(ImportError, RuntimeError))


# -- comparison --------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_holm_is_statsmodels(n):
    multitest = package("statsmodels.stats.multitest")
    p = np.random.default_rng(n).random(n) ** 3
    found = rs.holm({str(i): value for i, value in enumerate(p)})
    expected = multitest.multipletests(p, method="holm")[1]
    np.testing.assert_allclose(found.adjusted, expected, rtol=1e-12)


@pytest.mark.parametrize("n", [3, 10, 30])
def test_intervals_are_statsmodels(n):
    weightstats = package("statsmodels.stats.weightstats")
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found = rs.paired_difference(a, b)
    expected = weightstats.DescrStatsW(a - b).tconfint_mean()
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)


def test_equivalence_is_statsmodels_tost():
    weightstats = package("statsmodels.stats.weightstats")
    words = set()
    for seed in range(40):
        a, b = np.random.default_rng(seed).normal(size=(2, 12))
        found = rs.paired_difference(a, b, confidence=0.90)
        p, *_ = weightstats.ttost_paired(a, b, -0.8, 0.8)
        word = rs.verdict(found, margin=0.8, direction="greater")
        words.add(word)
        assert (word == "no difference") == (p < 0.05)
    assert len(words) > 1


# -- continual ---------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_forgetting_is_avalanches(seed):
    avalanche = package("avalanche.evaluation.metrics.forgetting_bwt")
    A = np.random.default_rng(seed).random((5, 5)) if seed else cases.ACCURACY
    lost, transfer = avalanche.Forgetting(), avalanche.BWT()
    for i, row in enumerate(A):
        for j in range(i + 1):
            for metric in (lost, transfer):
                metric.update(j, row[j], initial=i == j)
    expected = np.mean(list(lost.result().values()))
    assert rs.forgetting(A).item() == pytest.approx(expected)
    expected = np.mean(list(transfer.result().values()))
    assert rs.backward_transfer(A).item() == pytest.approx(expected)


# -- classes -----------------------------------------------------------------
def test_cosine_of_means_is_torchmetrics_without_the_diagonal():
    functional = package("torchmetrics.functional")
    X, y, _ = cases.etf_with_offset(5, 0.7)
    means = rs.class_means(X, y)
    expected = functional.pairwise_cosine_similarity(means, zero_diagonal=False)
    np.testing.assert_allclose(rs.class_cosine(X, y).matrix, expected, atol=1e-12)
    off = functional.pairwise_cosine_similarity(means).sum() / (5 * 4)
    assert rs.cross_class_cosine(X, y).item() == pytest.approx(off.item())


def test_a_zero_vector_has_a_cosine_elsewhere():
    means = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    assert torch.nn.functional.cosine_similarity(means[0], means[1], dim=0) == 0
    assert cosine_similarity(means)[0, 1] == 0
    functional = package("torchmetrics.functional")
    assert functional.pairwise_cosine_similarity(means).mean().isnan()
    assert rs.class_cosine(means, range(3)).n_excluded == 1
    assert rs.cross_class_cosine(means, range(3)).item() == pytest.approx(0.8)
