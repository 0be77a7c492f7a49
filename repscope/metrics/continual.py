"""What is learned, kept and lost over a sequence of tasks.

An accuracy matrix has shape ``(..., n_tasks, n_tasks)``; ``A[i, j]`` is the accuracy on
task j after training on task i, in any unit. Above the diagonal, where a task has not
been trained yet, it may be NaN: those entries are never read. Forgetting alone favours
a learner that learned little, so read it beside learning accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from repscope._checks import as_float, check_choice
from repscope.errors import MetricError, NonFiniteError


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


# -- helpers -----------------------------------------------------------------
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
