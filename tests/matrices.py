"""Symmetric matrices that are hard for an eigenvalue routine, in batches."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch


def symmetric(n):
    A = torch.randn(3, n, n, dtype=torch.float64)
    return A + A.mT


def after_relu(n):
    X = (torch.randn(3, 2 * n + 2, n).double() @ torch.randn(n, n).double()).relu()
    X = X - X.mean(1, keepdim=True)
    return X.mT @ X / X.shape[1]


def of_spectrum(values):
    Q, _ = torch.linalg.qr(torch.randn(3, len(values), len(values)).double())
    C = Q * values @ Q.mT
    return (C + C.mT) / 2


def already_tridiagonal(n):
    off = torch.diag_embed(torch.randn(3, n - 1).double(), 1)
    return torch.diag_embed(torch.randn(3, n).double()) + off + off.mT


def graded_rows(n):
    g = torch.logspace(0, -8, n, dtype=torch.float64)
    return symmetric(n) * g[:, None] * g


FAMILIES = {
    "after ReLU": after_relu,
    "clustered": lambda n: torch.eye(n).double() + 1e-6 * symmetric(n),
    "graded": lambda n: of_spectrum(torch.logspace(0, -8, n).double()),
    "graded rows": graded_rows,
    "rank-deficient": lambda n: of_spectrum((torch.arange(n) <= n // 3).double()),
    "ones": lambda n: torch.ones(3, n, n).double(),
    "zeros": lambda n: torch.zeros(3, n, n).double(),
    "indefinite": symmetric,
    "diagonal": lambda n: torch.diag_embed(torch.randn(3, n).double()),
    "tridiagonal": already_tridiagonal,
    "1e-25": lambda n: 1e-25 * after_relu(n),
    "1e30": lambda n: 1e30 * symmetric(n),
}


def of_all_families(n, dtype):
    """Return three matrices of each, shape (3 * len(FAMILIES), n, n)."""
    return torch.cat([make(n) for make in FAMILIES.values()]).to(dtype)


def assert_eigenvalues(found, C):
    """Hold the errors of the values against the limits of eigvalsh."""
    exact = np.stack([scipy.linalg.eigh(A, eigvals_only=True) for A in C.double()])
    assert (found.dtype, found.shape) == (C.dtype, C.shape[:2])
    assert (found.diff(dim=-1) >= 0).all()
    error = np.abs(found.double().numpy() - exact).max(-1)
    bound = 4 * C.shape[-1] ** 0.5 * 1.2e-7 if C.dtype == torch.float32 else 1e-12
    (wrong,) = (error > bound * np.abs(exact).max(-1)).nonzero()
    assert not wrong.tolist()
