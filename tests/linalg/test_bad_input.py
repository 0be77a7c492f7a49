"""Whatever the route on a CPU: what is hard is right, and what is wrong is named."""

from __future__ import annotations

import matrices
import numpy as np
import pytest
import torch

from repscope import covariance, eigvalsh
from repscope.errors import MetricError, NonFiniteError

ROUTES = ["auto", "torch", "scipy", "numpy"]
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
every_route = pytest.mark.parametrize("backend", ROUTES)


@every_route
@both
@pytest.mark.parametrize("n", [2, 3, 33, 130])
def test_hard_matrices_have_lapacks_eigenvalues(backend, dtype, n):
    C = matrices.of_all_families(n, dtype)
    before = C.clone()
    found = eigvalsh(C, backend=backend)
    matrices.assert_eigenvalues(found.flip(-1), (C + C.mT) / 2)
    assert torch.equal(C, before)


@every_route
@pytest.mark.parametrize(
    ("C", "error", "text"),
    [
        (torch.eye(3).fill_(float("nan")), NonFiniteError, "C has 9 non-finite of 9"),
        (torch.eye(3).index_fill(0, torch.tensor([1]), float("inf")),
         NonFiniteError, r"C has 3 non-finite of 9 entries, the first at \(1, 0\)"),
        (torch.stack([torch.eye(2), torch.full((2, 2), float("-inf"))]),
         NonFiniteError, r"the first at \(1, 0, 0\)"),
        (torch.ones(0, 3, 3), MetricError, r"C is empty: shape \(0, 3, 3\)"),
        (torch.ones(4, 3), MetricError, r"must have shape \(..., n, n\), got \(4, 3\)"),
        (torch.ones(3, 3).tril(), MetricError, "C is not symmetric"),
        (torch.eye(200).index_put((torch.tensor([3]), torch.tensor([180])),
                                  torch.tensor(0.1)), MetricError, "not symmetric"),
        (torch.eye(3) * 1j, MetricError, "C must be a dense real tensor"),
    ],
)  # fmt: skip
def test_what_has_no_eigenvalues_is_refused_by_name(backend, C, error, text):
    with pytest.raises(error, match=text):
        eigvalsh(C, backend=backend)


@every_route
@pytest.mark.parametrize("value", [0.0, -2.0, 1e-25, 1e30])
def test_a_matrix_of_one_number(backend, value):
    assert eigvalsh([[value]], backend=backend).tolist() == pytest.approx([value])


@every_route
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool]
)
def test_other_numbers_are_taken_as_float64(backend, dtype):
    C = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0]]).to(dtype)
    found = eigvalsh(C, backend=backend)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1.0, 1.0, -1.0])


@every_route
@both
def test_layouts_and_graphs_do_not_matter(backend, dtype):
    A = torch.randn(4, 10, 10).to(dtype)
    C = A @ A.mT
    C = (C + C.mT) / 2
    expected = eigvalsh(C, backend=backend)
    apart = torch.zeros(4, 20, 30, dtype=dtype)
    apart[:, ::2, ::3] = C
    turned = C.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for same in (apart[:, ::2, ::3], turned, C.flip(0).flip(0)):
        assert torch.equal(eigvalsh(same, backend=backend), expected)
    taped = eigvalsh(C.clone().requires_grad_(), backend=backend)
    assert torch.equal(taped, expected)
    assert not taped.requires_grad


@every_route
def test_asymmetry_by_rounding_is_averaged_wherever_it_is(backend):
    C = covariance(torch.randn(500, 200))
    for i, j in ((3, 4), (3, 190), (190, 3), (199, 198)):
        skewed = C.clone()
        skewed[i, j] += 1e-6
        exact = np.linalg.eigvalsh(((skewed + skewed.mT) / 2).numpy())[::-1]
        found = eigvalsh(skewed, backend=backend)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-13 * exact[0])


@every_route
def test_a_batch_larger_than_memory_is_taken_in_groups(backend):
    C = torch.eye(32).expand(40, 400, 32, 32)  # 66 MB for each copy of it
    assert bool((eigvalsh(C, backend=backend) == 1).all())
