"""Curvature by curvlinops, and by the eigenvalue solver of scipy on top of it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

import repscope as rs

pytestmark = [pytest.mark.crosschecks, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def hessian():
    """Return a network, its loss and curvlinops' operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvlinops = pytest.importorskip("curvlinops", exc_type=ImportError)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    x, y = torch.randn(50, 6).double(), torch.arange(50) % 4
    entropy = nn.CrossEntropyLoss()
    operator = curvlinops.HessianLinearOperator(
        model, entropy, list(model.parameters()), [(x, y)]
    )
    return model, lambda m: entropy(m(x), y), operator


def test_the_top_eigenvalue(hessian):
    model, loss, operator = hessian
    solver = scipy.sparse.linalg.eigsh
    (expected,) = solver(operator.to_scipy(), k=1, which="LA")[0]
    found = rs.hessian_top_eigenvalue(model, loss, tolerance=1e-8)
    assert found.value == pytest.approx(expected, rel=1e-8)


def test_the_trace(hessian):
    from curvlinops import hutchinson_trace

    model, loss, operator = hessian
    n = sum(p.numel() for p in model.parameters())
    exact = np.trace(operator.to_scipy() @ np.eye(n))
    found = rs.hessian_trace(model, loss, n_probes=500)
    theirs = float(hutchinson_trace(operator, num_matvecs=130))
    assert abs(found.value - exact) < 4 * found.stderr
    assert abs(theirs - exact) < 8 * found.stderr
