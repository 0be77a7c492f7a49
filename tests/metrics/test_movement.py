from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import repscope as rs
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError

NUMBERS = ("path_length", "displacement", "wasted", "step_cosine")


def walk(steps=6, shape=(5, 3), dtype=torch.float64):
    return torch.randn(steps, *shape, dtype=dtype).cumsum(0)


def readings(trajectory):
    found = rs.movement(trajectory)
    return {name: getattr(found, name).item() for name in NUMBERS}


# -- known answers -----------------------------------------------------------
def test_movement_is_numpys():
    points = walk()
    expected = oracles.movement(points)
    assert readings(points) == pytest.approx(expected, rel=1e-12)
    assert rs.wasted_movement(points).item() == pytest.approx(expected["wasted"])
    assert readings(points.float()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("trajectory", "length", "net", "wasted", "cosine"),
    [
        ([[0.0, 0], [1, 0], [2, 0], [5, 0]], 5, 5, 1, 1),  # a straight line
        ([[0.0, 0], [3, 0], [0, 0], [3, 0]], 9, 3, 3, -1),  # to and fro
        ([[0.0, 0], [3, 0], [3, 4]], 7, 5, 1.4, 0),  # a right angle
        ([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], 4, 0, math.inf, 0),  # a loop
    ],
)
def test_paths_of_which_everything_is_known(trajectory, length, net, wasted, cosine):
    found = readings(trajectory)
    expected = dict(zip(NUMBERS, (length, net, wasted, cosine), strict=True))
    assert found == pytest.approx(expected)


def test_what_never_moved_has_no_ratio():
    found = rs.movement([[1.0, 2.0]] * 3)
    assert (found.path_length, found.displacement, found.n_still) == (0, 0, 2)
    assert found.wasted.isnan()
    assert found.step_cosine.isnan()


def test_steps_of_length_zero_have_no_direction_and_are_counted():
    found = rs.movement([[0.0], [1.0], [1.0], [2.0], [3.0]])
    assert (found.n_steps, found.n_still) == (4, 1)
    assert found.step_cosine.item() == 1.0  # of the last two only


@settings(deadline=None, max_examples=10)
@given(
    points=arrays(np.float64, (4, 3), elements=st.floats(-10, 10, width=16)),
    scale=st.sampled_from([1e-25, 3.0, 1e20, 1e200]),
)
def test_laws_of_movement(points, scale):
    found = rs.movement(points)
    assert found.path_length >= found.displacement * (1 - 1e-12)
    backwards = rs.movement(points[::-1])
    torch.testing.assert_close(backwards.path_length, found.path_length)
    torch.testing.assert_close(backwards.wasted, found.wasted, equal_nan=True)
    turned = points @ np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    scaled = rs.movement(turned * scale)
    torch.testing.assert_close(scaled.path_length / scale, found.path_length)
    if found.displacement > 1e-3:
        torch.testing.assert_close(scaled.wasted, found.wasted)


# -- what a point is ---------------------------------------------------------
def test_tensors_that_belong_together_are_one_point():
    points = walk(shape=(8,))
    expected = readings(points)
    parts = [(p[:6].view(2, 3), p[6:]) for p in points]
    assert readings([list(pair) for pair in parts]) == pytest.approx(expected)
    named = [dict(zip("ab", pair, strict=True)) for pair in parts]
    assert readings(named) == pytest.approx(expected)
    assert readings(points.numpy()) == pytest.approx(expected)


def test_parameters_that_move_in_place_may_be_given_as_they_are():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = []

    def train():
        for _ in range(4):
            point = dict(model.named_parameters())
            kept.append(torch.cat([p.detach().flatten() for p in point.values()]))
            yield point
            model(torch.randn(8, 3).double()).square().sum().backward()
            optimizer.step()

    assert readings(train()) == pytest.approx(oracles.movement(kept), rel=1e-6)


def test_counters_of_a_state_dict_are_no_weights():
    norm = nn.BatchNorm1d(2)
    before = copy.deepcopy(norm.state_dict())
    norm.num_batches_tracked += 100
    assert rs.movement([before, norm.state_dict()]).path_length == 0


# -- displacement ------------------------------------------------------------
def test_distance_is_relative_to_the_start_of_each_tensor_and_of_all():
    start = {"w": torch.randn(4, 3), "b": torch.randn(4)}
    end = {name: w + torch.randn_like(w) for name, w in start.items()}
    found = rs.distance_from_initialisation(start, end)
    a, b = ({k: v.double().numpy() for k, v in d.items()} for d in (start, end))
    distance = [np.linalg.norm(b[k] - a[k]) for k in a]
    norms = [np.linalg.norm(a[k]) for k in a]
    assert found.names == ("w", "b")
    np.testing.assert_allclose(found.distance, distance)
    np.testing.assert_allclose(found.relative, np.divide(distance, norms))
    np.testing.assert_allclose(found.total, math.hypot(*distance))
    np.testing.assert_allclose(
        found.total_relative, math.hypot(*distance) / math.hypot(*norms)
    )
    assert found.to_frame().shape == (2, 3)


def test_distance_from_zero_is_infinite_and_of_nothing_undefined():
    start = {"moved": torch.zeros(2), "stayed": torch.zeros(2)}
    end = {"moved": torch.ones(2), "stayed": torch.zeros(2)}
    found = rs.distance_from_initialisation(start, end)
    assert found.relative[0] == math.inf
    assert found.relative[1].isnan()
    assert found.total_relative == math.inf
    same = rs.distance_from_initialisation(torch.eye(2), torch.eye(2))
    assert same.total == same.total_relative == 0


# -- never updated -----------------------------------------------------------
def dark_pixels(optimizer, **hyper):
    """Train on inputs of which the first two are always 0."""
    model = nn.Linear(6, 4)
    optimizer = optimizer(model.parameters(), lr=0.05, **hyper)
    weights, gradients = [model.weight.detach().clone()], []
    for _ in range(5):
        x = torch.randn(16, 6)
        x[:, :2] = 0
        optimizer.zero_grad()
        (model(x) - x[:, 2:]).square().mean().backward()
        gradients.append(model.weight.grad.clone())
        optimizer.step()
        weights.append(model.weight.detach().clone())
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:, :2] = True
    return weights, gradients, optimizer.state[model.weight], expected


def test_weights_of_dark_pixels_never_change_without_decay():
    weights, gradients, _, expected = dark_pixels(torch.optim.SGD)
    assert torch.equal(rs.never_updated(weights), expected)
    assert torch.equal(rs.never_updated([weights[0], weights[-1]]), expected)
    assert torch.equal(rs.never_updated(gradients, of="gradients"), expected)
    updates = [b - a for a, b in itertools.pairwise(weights)]
    assert torch.equal(rs.never_updated(updates, of="updates"), expected)


def test_under_decay_gradients_find_them_and_weights_do_not():
    weights, gradients, state, expected = dark_pixels(torch.optim.AdamW)
    assert not rs.never_updated(weights).any()
    assert torch.equal(rs.never_updated(gradients, of="gradients"), expected)
    second = [state["exp_avg_sq"]]
    assert torch.equal(rs.never_updated(second, of="gradients"), expected)


def test_masks_have_the_form_of_the_points():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])
    assert rs.never_updated([{"w": a}, {"w": b}])["w"].tolist() == [True, False]
    (mask,) = rs.never_updated([[a], [b]])
    assert mask.tolist() == [True, False]
    assert rs.hoyer_sparsity([b], exclude=[mask]).isnan()


# -- bad input ---------------------------------------------------------------
@pytest.mark.parametrize("reading", [rs.movement, rs.wasted_movement, rs.never_updated])
def test_trajectories_that_are_none(reading):
    with pytest.raises(MetricError, match="trajectory must be an iterable of points"):
        reading({"w": torch.ones(2)})
    with pytest.raises(NotEnoughSamples, match="trajectory has no points"):
        reading([])
    with pytest.raises(NotEnoughSamples, match="at least 2 points, got 1"):
        reading([torch.ones(2)])
    with pytest.raises(MetricError, match=r"trajectory\[1\] must have the names and"):
        reading([torch.ones(2), torch.ones(3)])
    with pytest.raises(MetricError, match=r"trajectory\[0\] is empty"):
        reading([torch.empty(0)])
    with pytest.raises(NonFiniteError, match=r"trajectory\[1\]\['w'\] has 1 non-fini"):
        reading([{"w": torch.zeros(1)}, {"w": torch.tensor([math.nan])}])


def test_distance_names_what_differs():
    with pytest.raises(MetricError, match=r"\(initial, final\)\[1\] must have the nam"):
        rs.distance_from_initialisation({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_what_the_points_are_is_one_of_three():
    with pytest.raises(UsageError, match="of='steps' is not one of"):
        rs.never_updated([[0.0]], of="steps")


def test_trajectories_keep_no_graph_and_change_nothing():
    points = walk().requires_grad_()
    before = points.detach().clone()
    assert not rs.wasted_movement(points).requires_grad
    assert torch.equal(points.detach(), before)
    assert list(rs.movement(points).to_frame().columns) == [
        "n_steps", "path_length", "displacement", "wasted", "step_cosine", "n_still",
    ]  # fmt: skip
