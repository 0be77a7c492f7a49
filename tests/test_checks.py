"""What every metric accepts and refuses at its door."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from repscope._checks import as_float, as_labels, as_tensor, check_choice, check_finite
from repscope.errors import LabelError, LabelMismatch, MetricError, UsageError

CPU = torch.device("cpu")


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "value",
    [
        [93.1, 92.4],
        (93.1, 92.4),
        np.array([93.1, 92.4]),
        np.array([92.4, 93.1])[::-1],
        read_only(np.array([93.1, 92.4])),
        pd.Series([93.1, 92.4], index=["a", "b"]),
        torch.tensor([93.1, 92.4], dtype=torch.float64),
        [torch.tensor(93.1, dtype=torch.float64), 92.4],
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_keep_all_their_digits_in_any_container(value):
    found = as_float(value, name="x")
    assert found.dtype == torch.float64
    assert found.tolist() == [93.1, 92.4]


def test_tensors_and_arrays_are_shared_not_copied():
    array = np.zeros(3)
    assert as_tensor(array).data_ptr() == torch.from_numpy(array).data_ptr()
    X = torch.zeros(3, requires_grad=True)
    assert as_tensor(X).data_ptr() == X.data_ptr()
    assert not as_tensor(X).requires_grad


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool]
)
def test_narrow_types_become_float64(dtype):
    assert as_float(torch.ones(2, dtype=dtype), name="x").dtype == torch.float64
    assert as_float(torch.ones(2), name="x").dtype == torch.float32


@pytest.mark.parametrize(
    "value", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()]
)
def test_complex_and_sparse_are_refused(value):
    with pytest.raises(MetricError, match="x must be a dense real tensor"):
        as_float(value, name="x")


def test_large_finite_values_are_not_called_infinite():
    check_finite(torch.full((9,), 1e308, dtype=torch.float64), name="x")


@pytest.mark.parametrize(
    "value",
    [[3, 1], np.array([3, 1], dtype=np.int8), pd.Series([3, 1]), torch.tensor([3, 1])],
    ids=lambda value: type(value).__name__,
)
def test_labels_become_int64(value):
    found = as_labels(value, n_samples=2, device=CPU)
    assert found.dtype == torch.int64
    assert found.tolist() == [3, 1]


def test_bad_labels_are_named():
    with pytest.raises(LabelError, match="must be integers"):
        as_labels([0.0, 1.0], n_samples=2, device=CPU)
    with pytest.raises(LabelMismatch, match=r"shape \(3,\) .* got \(2,\)"):
        as_labels([0, 1], n_samples=3, device=CPU)


def test_a_choice_offers_what_was_meant():
    check_choice("max", ("max", "mean"), name="relative_to")
    with pytest.raises(UsageError, match=r"kind='finl' .*did you mean 'final'\?"):
        check_choice("finl", ("final", "max"), name="kind")
