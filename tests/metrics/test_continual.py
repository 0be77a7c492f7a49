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


# -- against a fresh network -------------------------------------------------
def test_plasticity_is_the_diagonal_less_the_fresh_networks():
    found = rs.plasticity(cases.ACCURACY, [90.0, 85.0, 88.0])
    assert found.tolist() == [0.0, -5.0, -18.0]
    A, fresh = torch.rand(4, 3, 3), torch.rand(4, 3)
    batch = rs.plasticity(A, fresh)
    assert batch.shape == (4, 3)
    expected = np.diagonal(A.numpy(), axis1=1, axis2=2).astype(float) - fresh.numpy()
    np.testing.assert_allclose(batch, expected, rtol=1e-12)
    np.testing.assert_allclose(
        batch.mean(-1), rs.learning_accuracy(A) - fresh.double().mean(-1)
    )
    assert rs.plasticity(A, fresh[0]).shape == (4, 3)


@pytest.mark.parametrize(
    ("fresh", "error", "text"),
    [
        ([1.0, 2.0], MetricError, r"shape \(..., 3\), one accuracy a task .* \(2,\)"),
        (0.9, MetricError, r"got \(\)"),
        ([1.0, math.nan, 2.0], NonFiniteError, r"fresh has 1 non-finite .* \(1,\)"),
    ],
)
def test_fresh_accuracies_that_do_not_fit_are_named(fresh, error, text):
    with pytest.raises(error, match=text):
        rs.plasticity(cases.ACCURACY, fresh)


# -- interference ------------------------------------------------------------
def parameters(seed):
    rng = np.random.default_rng(seed)
    shapes = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def flat(named):
    return np.concatenate([value.ravel() for value in named.values()])


def test_interference_is_the_inner_product_over_all_parameters():
    g, d = parameters(0), parameters(1)
    expected = flat(g) @ flat(d)
    norms = np.linalg.norm(flat(g)) * np.linalg.norm(flat(d))
    tensors = {name: torch.from_numpy(value) for name, value in d.items()}
    for old, step in (
        (g, d),
        (g, dict(reversed(tensors.items()))),
        (list(g.values()), tuple(d.values())),
        (flat(g), torch.from_numpy(flat(d))),
        (flat(g).tolist(), flat(d).tolist()),
    ):
        found = rs.interference(old, step)
        assert found.predicted_change.item() == pytest.approx(expected)
        assert found.cosine.item() == pytest.approx(expected / norms)
    frame = found.to_frame()
    assert frame["predicted_change"].item() == pytest.approx(expected)
    half = rs.interference({k: v.astype("f4") for k, v in g.items()}, tensors)
    assert half.cosine.item() == pytest.approx(expected / norms, rel=1e-5)


def test_a_small_step_changes_the_old_loss_as_predicted():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    ).double()
    X, weights = torch.randn(20, 3).double(), list(model.parameters())

    def old_loss():
        return model(X).square().mean()

    before = old_loss()
    gradient = torch.autograd.grad(before, weights)
    step = [1e-6 * torch.randn_like(w) for w in weights]
    with torch.no_grad():
        for w, move in zip(weights, step, strict=True):
            w += move
    found = rs.interference(gradient, step)
    change = (old_loss() - before).item()
    assert found.predicted_change.item() == pytest.approx(change, rel=1e-4)
    downhill = rs.interference(gradient, [-g for g in gradient])
    assert downhill.cosine.item() == pytest.approx(-1)


def test_interference_of_special_steps():
    g, d = parameters(0), parameters(1)
    zero = {name: 0 * value for name, value in d.items()}
    still = rs.interference(g, zero)
    assert still.predicted_change.item() == 0
    assert still.cosine.isnan()
    unused = rs.interference(g | {"0.bias": None}, d)
    without = rs.interference(g | {"0.bias": zero["0.bias"]}, d)
    assert unused.cosine.item() == pytest.approx(without.cosine.item())
    huge = rs.interference(
        {name: 1e200 * value for name, value in g.items()},
        {name: 1e-180 * value for name, value in d.items()},
    )
    plain = rs.interference(g, d)
    assert huge.cosine.item() == pytest.approx(plain.cosine.item())
    assert huge.predicted_change.item() == pytest.approx(
        1e20 * plain.predicted_change.item()
    )
    empty = rs.interference(torch.zeros(0), torch.zeros(0))
    assert empty.predicted_change.item() == 0


@pytest.mark.parametrize(
    ("old", "step", "error", "text"),
    [
        ({"w": [1.0]}, {"v": [1.0]}, MetricError, r"only in old_gradient: \['w'\]"),
        (np.ones(2), np.ones(3), MetricError, r"same shape, got \(2,\) and \(3,\)"),
        ([None], [np.ones(2)], MetricError, "old_gradient holds no parameter"),
        ({}, {}, MetricError, "old_gradient holds no parameter"),
        ([np.ones(2)], [None], MetricError, "step holds no parameter"),
        (np.ones(2), [1.0, math.nan], NonFiniteError, "step has 1 non-finite"),
        (
            {"w": [1.0]},
            {"w": [math.inf]},
            NonFiniteError,
            r"step\['w'\] has 1 non-finite",
        ),
    ],
)
def test_gradients_and_steps_that_do_not_match_are_named(old, step, error, text):
    with pytest.raises(error, match=text):
        rs.interference(old, step)
