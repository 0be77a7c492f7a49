from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import repscope as rs
from repscope.errors import MetricError, NonFiniteError, UsageError
from repscope.metrics.continual import CONTINUAL_METRICS

matrices = st.integers(1, 8).flatmap(
    lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 100, width=32))
)


@pytest.mark.parametrize("name", CONTINUAL_METRICS)
def test_the_hand_written_matrix(name):
    found = CONTINUAL_METRICS[name](cases.ACCURACY).item()
    assert found == pytest.approx(cases.ACCURACY_ANSWERS[name])


@settings(deadline=None, max_examples=60)
@given(A=matrices)
def test_average_is_learning_less_what_was_forgotten(A):
    T = len(A)
    average, learned = rs.average_accuracy(A).item(), rs.learning_accuracy(A).item()
    if T == 1:
        assert average == learned
        return
    lost = rs.forgetting(A).item()
    assert average == pytest.approx(learned - (T - 1) / T * lost, abs=1e-9)
    assert rs.backward_transfer(A).item() == -lost
    assert rs.forgetting(A, kind="max").item() >= lost - 1e-9


def test_best_accuracy_is_looked_for_since_the_task_and_before_the_end():
    A = torch.tensor([[50.0, 99.0, 99.0], [70.0, 40.0, 99.0], [60.0, 80.0, 90.0]])
    # Task 1: best 70 of (50, 70); task 2: 40; not the 99 above the diagonal.
    assert rs.forgetting(A, kind="max").item() == pytest.approx(((70 - 60) - 40) / 2)


def test_a_single_task_has_nothing_to_forget():
    for name, metric in CONTINUAL_METRICS.items():
        found = metric([[93.0]]).item()
        assert math.isnan(found) == (
            name not in {"average_accuracy", "learning_accuracy", "last_task_accuracy"}
        )
        assert metric(torch.rand(4, 1, 1)).shape == (4,)


@pytest.mark.parametrize("metric", CONTINUAL_METRICS.values(), ids=CONTINUAL_METRICS)
def test_bad_matrices_are_named(metric):
    for A in (torch.ones(2, 3), torch.ones(3), torch.ones(0, 0)):
        with pytest.raises(MetricError, match="must have shape"):
            metric(A)
    A = torch.ones(2, 3, 3)
    A[1, 2, 0] = math.nan
    with pytest.raises(NonFiniteError, match="accuracy on task 0 after task 2"):
        metric(A)


def test_an_unknown_kind_is_named():
    with pytest.raises(UsageError, match="kind='best' is not one of"):
        rs.forgetting(cases.ACCURACY, kind="best")
