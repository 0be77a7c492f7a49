"""The same features through published packages: agreement, and known disagreements.

pip install --no-deps git+https://github.com/rhubarbwu/neural-collapse
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import repscope as rs

pytestmark = pytest.mark.crosschecks


def three_blobs():
    """Return the features of which published numbers exist: 30 samples a class."""
    rng = np.random.default_rng(0)
    centres = 3 * np.eye(5)[:3]
    X = [centre + 0.15 * rng.standard_normal((30, 5)) for centre in centres]
    return np.concatenate(X), np.repeat(np.arange(3), 30)


def test_published_numbers():
    """NC1: neural-collapse at c05a0b8; NC2: BLME, in its tests against it."""
    found = rs.neural_collapse(*three_blobs())
    assert found.nc1.item() == pytest.approx(0.00409094387203806, rel=1e-12)
    assert found.nc2_equinorm.item() == pytest.approx(0.00784386467284082, rel=1e-12)
    assert found.nc2_equiangular.item() == pytest.approx(0.011144638743029825)


@pytest.fixture
def statistics():
    """Return unbalanced features and labels, and what the package takes of them."""
    y = torch.multinomial(torch.arange(1.0, 6), 200, replacement=True)
    X = torch.relu(2 * torch.randn(5, 8)[y] + 0.7 * torch.randn(200, 8)).double()
    means = torch.stack([X[y == label].mean(0) for label in range(5)])
    rows = X - means[y]
    squares = rows.square().sum(1)
    variances = torch.stack([squares[y == label].mean() for label in range(5)])
    return X, y, means, rows.mT @ rows / len(X), variances


def test_neural_collapse_package(statistics):
    theirs = pytest.importorskip("neural_collapse.measure", reason="see the top")
    X, y, means, within, variances = statistics
    ours = rs.neural_collapse(X, y)
    centre = means.mean(0)
    nc1 = float(theirs.covariance_ratio(within, means, centre))
    assert ours.nc1.item() == pytest.approx(nc1, rel=1e-9)
    nc1 = float(theirs.covariance_ratio(within, means, centre, "svd"))
    assert ours.nc1.item() == pytest.approx(nc1, rel=1e-9)
    cdnv = float(theirs.variability_cdnv(variances, means))
    assert ours.cdnv.item() == pytest.approx(cdnv, rel=1e-5)  # theirs in float32
    # By design: a global mean over samples is another one in unequal classes.
    weighted = float(theirs.covariance_ratio(within, means, X.mean(0)))
    assert abs(weighted / nc1 - 1) > 0.01
