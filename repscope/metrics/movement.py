"""How weights, or what a network makes of a fixed probe, moved during training.

A point of a trajectory is one tensor, or a list or dict of them that belong together
(``dict(model.named_parameters())``, say, or the outputs for a probe). A trajectory is
read once and in order; only its first and its last two points are held, so a generator
over a long run will do. Integer entries of a dict (the counters of a state dict) are
left out; running statistics are not, so pass parameters rather than a state dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from repscope._checks import as_float, check_choice, check_finite
from repscope.errors import MetricError, NotEnoughSamples
from repscope.results import Displacement, Movement

Of = Literal["weights", "gradients", "updates"]
_Point = dict[str | int, Tensor]  # "" names a single tensor


def wasted_movement(trajectory: Iterable[Any]) -> Tensor:
    r"""Return the length of a path over the distance that it led.

    :math:`\sum_t \|\theta_{t+1} - \theta_t\| \,/\, \|\theta_T - \theta_0\|`, with
    Euclidean norms over all entries of a point. A path that was recorded at every k-th
    update only is shorter than the true one: compare equal spacings.

    Args:
        trajectory: Points in order of time: weights, or representations of one probe.

    Returns:
        0-dim, at least 1 (a straight line); infinity for a path that ends where it
        began, NaN when nothing moved.

    References:
        Pascanu et al. (2025), Optimizers qualitatively alter solutions and we should
        leverage this, arXiv 2507.12224, figure 2.

    Example:
        >>> wasted_movement([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]).item()
        1.4
    """
    return movement(trajectory).wasted


def movement(trajectory: Iterable[Any]) -> Movement:
    r"""Measure the path that a trajectory took.

    With steps :math:`\Delta_t = \theta_{t+1} - \theta_t`: path length
    :math:`\sum_t \|\Delta_t\|`, displacement :math:`\|\sum_t \Delta_t\|`, their ratio
    (see ``wasted_movement``) and the mean over t of :math:`\cos(\Delta_t,
    \Delta_{t+1})`: 1 along a straight line, -1 when every step undoes the last.

    Args:
        trajectory: Points in order of time: weights, or representations of one probe.

    Returns:
        The lengths in the units of the points. The cosine is NaN where no two
        successive steps have a direction.

    Raises:
        MetricError: If the points do not have the same names and shapes.
        NotEnoughSamples: If there are fewer than 2 points.

    References:
        Singh, He, Hofmann and Schölkopf (2024), Hallmarks of optimization trajectories
        in neural networks, arXiv 2403.07379. Their mean directional similarity
        compares all pairs of points, not successive steps.

    Example:
        >>> m = movement([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
        >>> m.path_length.item(), m.displacement.item(), m.step_cosine.item()
        (7.0, 5.0, 0.0)
    """  # noqa: DOC502 - raised by _points
    points = _points(trajectory, name="trajectory")
    first = before = next(points)
    length = _zero(first)
    cosines: list[Tensor] = []
    n_steps = n_still = 0
    last_step: _Point | None = None
    for point in points:
        step = _difference(point, before)
        size = _norm(step)
        length = length + size
        direction = _over(step, size) if size > 0 else None
        if direction is not None and last_step is not None:
            cosines.append(_dot(direction, last_step).clamp(-1, 1))
        n_still += direction is None
        n_steps += 1
        last_step, before = direction, point
    _check_steps(n_steps)
    net = _norm(_difference(before, first))
    mean = torch.stack(cosines).mean() if cosines else length.new_tensor(math.nan)
    # 0 / 0, for what never moved, is NaN: the answer there.
    return Movement(n_steps, length, net, length / net, mean, n_still)


def distance_from_initialisation(initial: Any, final: Any) -> Displacement:
    r"""Return how far weights are from where they started.

    :math:`\|W_T - W_0\|_F` for each tensor and for all together, and the same over
    :math:`\|W_0\|_F`.

    Args:
        initial: One weight, or a list or dict of weights.
        final: The same later.

    Returns:
        Norms in the units of the weights. Relative ones are infinite for a tensor that
        started at zero and moved, NaN for one that did not move from there.

    Raises:
        MetricError: If the two do not have the same names and shapes.

    References:
        Nagarajan and Kolter (2019), Generalization in deep networks: the role of
        distance from initialization, arXiv 1901.01672.

    Example:
        >>> moved = distance_from_initialisation({"w": [3.0, 4.0]}, {"w": [3.0, 5.0]})
        >>> moved.distance.item(), moved.total_relative.item()
        (1.0, 0.2)
    """  # noqa: DOC502 - raised by _points
    start, end = _points([initial, final], name="(initial, final)")
    step = _difference(end, start)
    distance, norms = _norms(step), _norms(start)
    total = _norm(step)
    return Displacement(
        names=tuple(map(str, start)),
        distance=distance,
        relative=distance / norms,
        total=total,
        total_relative=total / _norm(start),
    )


def never_updated(trajectory: Iterable[Any], *, of: Of = "weights") -> Any:
    """Find the weights that no gradient ever reached.

    Those of pixels that are always dark stay what they were at the start, or only
    shrink, and say nothing about the optimizer. What ``of`` is decides which are found:

    * ``"weights"``: values that are the same at every point, bit for bit. Right where
      nothing but gradients moves weights; two points, the first and the last, will do.
    * ``"gradients"``, ``"updates"``: entries that are zero at every point. Weight
      decay moves a weight that never got a gradient, so under it take the gradients,
      or Adam's ``exp_avg_sq``, which is zero exactly where they all were. Updates hold
      decoupled decay too.

    Args:
        trajectory: Points in order of time.
        of: What the points are.

    Returns:
        Boolean masks, True where never updated, as ``exclude=`` takes them: one, or a
        list or dict of them like the points.

    Raises:
        MetricError: If the points do not have the same names and shapes.
        NotEnoughSamples: If there are fewer than 2 points of ``"weights"``, or none.

    Example:
        >>> never_updated([[0.5, 0.1, 0.2], [0.5, 0.3, 0.2]]).tolist()
        [True, False, True]
    """  # noqa: DOC502 - partly raised by _points
    check_choice(of, ("weights", "gradients", "updates"), name="of")
    points = _points(trajectory, name="trajectory")
    first = next(points)
    if of == "weights":
        same = {name: torch.ones_like(t, dtype=torch.bool) for name, t in first.items()}
        start = first
    else:
        start = {name: torch.zeros_like(t) for name, t in first.items()}
        same = {name: t == 0 for name, t in first.items()}
    n_steps = 0
    for n_steps, point in enumerate(points, start=1):  # noqa: B007
        for name, values in point.items():
            same[name] &= values == start[name]
    if of == "weights":
        _check_steps(n_steps)
    if set(same) == {""}:
        return same[""]
    return list(same.values()) if 0 in same else same


# -- helpers -----------------------------------------------------------------
def _points(trajectory: Iterable[Any], *, name: str) -> Iterator[_Point]:
    # Copies in float64, checked against the first point.
    if isinstance(trajectory, Mapping):
        raise MetricError(
            f"{name} must be an iterable of points in order of time, got a "
            f"{type(trajectory).__name__}; a single point has not moved"
        )
    shapes: dict[str | int, torch.Size] = {}
    for t, value in enumerate(trajectory):
        point = _point(value, name=f"{name}[{t}]")
        found = {key: tensor.shape for key, tensor in point.items()}
        shapes = shapes or found
        if found != shapes:
            raise MetricError(
                f"{name}[{t}] must have the names and shapes of {name}[0], "
                f"{_described(shapes)}, got {_described(found)}"
            )
        yield point
    if not shapes:
        raise NotEnoughSamples(f"{name} has no points")


def _point(value: Any, *, name: str) -> _Point:
    items: dict[str | int, Any]
    if isinstance(value, Mapping):
        items = {str(key): entry for key, entry in value.items() if not _counts(entry)}
    elif isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
        items = dict(enumerate(value))
    else:
        items = {"": value}
    point: _Point = {}
    for key, entry in items.items():
        label = name if key == "" else f"{name}[{key!r}]"
        tensor = as_float(entry, name=label)
        check_finite(tensor, name=label)
        # A copy: the next point may be the same parameters, moved on in place.
        point[key] = tensor.to(torch.float64, copy=True)
    if not any(tensor.numel() for tensor in point.values()):
        raise MetricError(f"{name} is empty; pass tensors, or lists or dicts of them")
    return point


def _counts(entry: Any) -> bool:
    return isinstance(entry, Tensor) and not entry.is_floating_point()


def _described(shapes: Mapping[str | int, torch.Size]) -> str:
    return f"{ {name: tuple(shape) for name, shape in shapes.items()} }"


def _check_steps(n_steps: int) -> None:
    if not n_steps:
        raise NotEnoughSamples("trajectory needs at least 2 points, got 1")


def _zero(point: _Point) -> Tensor:
    return next(iter(point.values())).new_zeros(())


def _difference(a: _Point, b: _Point) -> _Point:
    return {name: tensor - b[name] for name, tensor in a.items()}


def _over(point: _Point, size: Tensor) -> _Point:
    return {name: tensor / size.to(tensor.device) for name, tensor in point.items()}


def _dot(a: _Point, b: _Point) -> Tensor:
    home = _zero(a)
    return sum(((t * b[name]).sum().to(home.device) for name, t in a.items()), home)


def _norms(point: _Point) -> Tensor:
    home = _zero(point).device
    return torch.stack([_norm({name: t}).to(home) for name, t in point.items()])


def _norm(point: _Point) -> Tensor:
    """Return the Euclidean norm of all entries, whose squares cannot overflow."""
    home = _zero(point)
    tops = [t.abs().amax().to(home.device) for t in point.values() if t.numel()]
    if not tops:
        return home
    top = torch.stack(tops).amax()
    if top == 0:
        return home
    squares = [(t / top.to(t.device)).square().sum() for t in point.values()]
    return top * torch.stack([s.to(home.device) for s in squares]).sum().sqrt()
