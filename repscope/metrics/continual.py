"""What is learned, kept and lost over a sequence of tasks.

An accuracy matrix has shape ``(..., n_tasks, n_tasks)``; ``A[i, j]`` is the accuracy on
task j after training on task i, in any unit. Above the diagonal, where a task has not
been trained yet, it may be NaN: those entries are never read. Forgetting alone favours
a learner that learned little, so read it beside learning accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from repscope._checks import as_float, check_choice, check_finite
from repscope.errors import MetricError, NonFiniteError
from repscope.results import Interference


def average_accuracy(A: Any) -> Tensor:
    r"""Return the mean accuracy over all tasks at the end, :math:`\overline{A_{Tj}}`.

    Equal to ``learning_accuracy - (T - 1) / T * forgetting``.

    Args:
        A: Accuracy matrix, shape ``(..., n_tasks, n_tasks)``.

    Returns:
        Shape ``(...)``, in the unit of ``A``.

    References:
        Lopez-Paz and Ranzato (2017), Gradient episodic memory, NeurIPS.

    Example:
        >>> average_accuracy([[90.0, float("nan")], [60.0, 80.0]]).item()
        70.0
    """
    return _matrix(A)[..., -1, :].mean(-1)


def learning_accuracy(A: Any) -> Tensor:
    r"""Return the mean accuracy on each task right after it, :math:`\overline{A_{jj}}`.

    Args:
        A: Accuracy matrix, shape ``(..., n_tasks, n_tasks)``.

    Returns:
        Shape ``(...)``, in the unit of ``A``.

    References:
        Riemer et al. (2019), Learning to learn without forgetting, ICLR.

    Example:
        >>> learning_accuracy([[90.0, float("nan")], [60.0, 80.0]]).item()
        85.0
    """
    return _diagonal(_matrix(A)).mean(-1)


def forgetting(A: Any, *, kind: Literal["final", "max"] = "final") -> Tensor:
    r"""Return the accuracy lost on earlier tasks by the end.

    The mean over :math:`j < T` of :math:`A_{jj} - A_{Tj}`, or, with ``kind="max"``, of
    :math:`\max_{j \le i < T} A_{ij} - A_{Tj}`, which is never smaller.

    Args:
        A: Accuracy matrix, shape ``(..., n_tasks, n_tasks)``.
        kind: ``"final"`` counts from the accuracy right after the task, ``"max"`` from
            the best one since.

    Returns:
        Shape ``(...)``, in the unit of ``A``; negative where later tasks helped, NaN
        for a single task.

    References:
        Chaudhry et al. (2018), Riemannian walk for incremental learning, ECCV (max).

    Example:
        >>> forgetting([[90.0, float("nan")], [60.0, 80.0]]).item()
        30.0
    """
    check_choice(kind, ("final", "max"), name="kind")
    matrix = _matrix(A)
    final = matrix[..., -1, :-1]
    if kind == "final":
        return (_diagonal(matrix)[..., :-1] - final).mean(-1)
    if matrix.shape[-1] == 1:
        return matrix.new_full(matrix.shape[:-2], torch.nan)
    later = torch.ones(matrix.shape[-2:], device=matrix.device).triu(1).bool()
    best = matrix.masked_fill(later, -torch.inf)[..., :-1, :-1].amax(-2)
    return (best - final).mean(-1)


def backward_transfer(A: Any) -> Tensor:
    """Return the mean change on earlier tasks by the end: minus ``forgetting``.

    Args:
        A: Accuracy matrix, shape ``(..., n_tasks, n_tasks)``.

    Returns:
        Shape ``(...)``, in the unit of ``A``; positive where later tasks helped, NaN
        for a single task.

    References:
        Lopez-Paz and Ranzato (2017), Gradient episodic memory, NeurIPS.

    Example:
        >>> backward_transfer([[90.0, float("nan")], [60.0, 80.0]]).item()
        -30.0
    """
    return -forgetting(A)


def old_task_accuracy(A: Any) -> Tensor:
    """Return the mean accuracy at the end over all tasks but the last.

    With ``last_task_accuracy`` it spans the trade of stability against plasticity.

    Args:
        A: Accuracy matrix, shape ``(..., n_tasks, n_tasks)``.

    Returns:
        Shape ``(...)``, in the unit of ``A``; NaN for a single task.

    Example:
        >>> old_task_accuracy([[90.0, float("nan")], [60.0, 80.0]]).item()
        60.0
    """
    return _matrix(A)[..., -1, :-1].mean(-1)


def last_task_accuracy(A: Any) -> Tensor:
    """Return the accuracy at the end on the last task.

    Args:
        A: Accuracy matrix, shape ``(..., n_tasks, n_tasks)``.

    Returns:
        Shape ``(...)``, in the unit of ``A``.

    Example:
        >>> last_task_accuracy([[90.0, float("nan")], [60.0, 80.0]]).item()
        80.0
    """
    return _matrix(A)[..., -1, -1]


def plasticity(A: Any, fresh: Any) -> Tensor:
    r"""Return how much better each task was learned than by a fresh network.

    :math:`A_{jj} - f_j` with :math:`f_j` the accuracy on task j of a network trained on
    it alone from new initial weights, with the same budget. :math:`A_{jj}` by itself
    also tells how hard the tasks are.

    Args:
        A: Accuracy matrix, shape ``(..., n_tasks, n_tasks)``.
        fresh: Accuracy of the fresh networks, shape ``(..., n_tasks)``; leading
            dimensions broadcast.

    Returns:
        Shape ``(..., n_tasks)``, in the unit of ``A``; negative where the ability to
        learn was lost. The first task is learned by a fresh network either way: its
        value is noise.

    Raises:
        MetricError: If there is not one fresh accuracy a task.
        NonFiniteError: If one of them is not finite.

    References:
        Dohare et al. (2024), Loss of plasticity in deep continual learning, Nature 632.

    Example:
        >>> plasticity([[90.0, float("nan")], [60.0, 80.0]], [89.0, 91.0]).tolist()
        [1.0, -11.0]
    """  # noqa: DOC502 - raised by check_finite
    learned = _diagonal(_matrix(A))
    alone = as_float(fresh, name="fresh").to(learned)
    if alone.ndim == 0 or alone.shape[-1] != learned.shape[-1]:
        raise MetricError(
            f"fresh must have shape (..., {learned.shape[-1]}), one accuracy a task of "
            f"A, got {tuple(alone.shape)}"
        )
    check_finite(alone, name="fresh")
    return learned - alone


def interference(old_gradient: Any, step: Any) -> Interference:
    r"""Return the change that a step is predicted to make to the loss of an old task.

    To first order :math:`\langle \nabla L_\mathrm{old}, \Delta\theta \rangle`, and the
    cosine of the two, summed over all parameters. The prediction is good for small
    steps: its error is of the order of :math:`\|\Delta\theta\|^2` times the curvature.

    Args:
        old_gradient: Gradient of the old loss before the step: a tensor, a list or
            tuple with one for each parameter, or name -> tensor. ``None`` among
            them counts as zero.
        step: What the step added to the parameters, in the same form.

    Returns:
        ``predicted_change`` in units of the loss, positive where the step harms the
        old task, and ``cosine`` in [-1, 1], NaN when either is zero.

    Raises:
        MetricError: If the two do not hold the same parameters.
        NonFiniteError: If an entry is not finite.

    References:
        Lopez-Paz and Ranzato (2017), Gradient episodic memory, NeurIPS; Riemer et al.
        (2019), Learning to learn without forgetting, ICLR.

    Example:
        >>> found = interference({"w": [1.0, 0.0]}, {"w": [0.3, 0.4]})
        >>> round(found.predicted_change.item(), 4), round(found.cosine.item(), 4)
        (0.3, 0.6)
    """  # noqa: DOC502 - raised by check_finite
    first, second = _named(old_gradient), _named(step)
    if first.keys() != second.keys():
        raise MetricError(
            f"old_gradient and step must hold the same parameters; only in "
            f"old_gradient: {[key for key in first if key not in second]}, only in "
            f"step: {[key for key in second if key not in first]}"
        )
    for name, values in (("old_gradient", first), ("step", second)):
        if all(value is None for value in values.values()):
            raise MetricError(f"{name} holds no parameter")
    g, top_g, norm_g = _scaled(first, name="old_gradient")
    d, top_d, norm_d = _scaled(second, name="step")
    product = norm_g.new_zeros(())
    for key in [key for key in g if key in d]:
        if g[key].shape != d[key].shape:
            raise MetricError(
                f"{_label('old_gradient', key)} and {_label('step', key)} must have "
                f"the same shape, got {tuple(g[key].shape)} and {tuple(d[key].shape)}"
            )
        product = product + (g[key] * d[key]).sum()
    cosine = (product / (norm_g * norm_d)).clamp(-1, 1)
    return Interference(product * top_g * top_d, cosine)


# -- helpers -----------------------------------------------------------------
def _named(value: Any) -> dict[Any, Any]:
    """Return parameters by name or position; one tensor is one parameter."""
    if isinstance(value, Mapping):
        return dict(value)
    several = isinstance(value, (list, tuple)) and any(
        item is None or hasattr(item, "shape") for item in value
    )
    return dict(enumerate(value)) if several else {None: value}


def _label(name: str, key: Any) -> str:
    return name if key is None else f"{name}[{key!r}]"


def _scaled(
    parameters: Mapping[Any, Any], *, name: str
) -> tuple[dict[Any, Tensor], Tensor, Tensor]:
    """Return what is not None over the largest magnitude, that, and the norm."""
    values = {
        key: as_float(value, name=_label(name, key)).to(torch.float64)
        for key, value in parameters.items()
        if value is not None
    }
    for key, value in values.items():
        check_finite(value, name=_label(name, key))
    tops = [value.abs().amax() for value in values.values() if value.numel()]
    top = torch.stack(tops or [torch.zeros((), dtype=torch.float64)]).amax()
    values = {key: torch.where(top > 0, v / top, 0.0) for key, v in values.items()}
    squares = torch.stack([value.square().sum() for value in values.values()])
    return values, top, squares.sum().sqrt()


def _matrix(A: Any) -> Tensor:
    matrix = as_float(A, name="A").to(torch.float64)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.numel():
        raise MetricError(
            f"A must have shape (..., n_tasks, n_tasks), got {tuple(matrix.shape)}"
        )
    bad = ~torch.isfinite(matrix).tril() & torch.ones_like(matrix).tril().bool()
    if bool(bad.any()):
        *_, i, j = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"A[{i}, {j}] is not finite: the accuracy on task {j} after task {i} is "
            f"needed (only entries above the diagonal may be missing)"
        )
    return matrix


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _forgetting_max(A: Any) -> Tensor:
    return forgetting(A, kind="max")


CONTINUAL_METRICS: dict[str, Callable[[Any], Tensor]] = {
    "average_accuracy": average_accuracy,
    "learning_accuracy": learning_accuracy,
    "forgetting": forgetting,
    "forgetting_max": _forgetting_max,
    "backward_transfer": backward_transfer,
    "old_task_accuracy": old_task_accuracy,
    "last_task_accuracy": last_task_accuracy,
}
