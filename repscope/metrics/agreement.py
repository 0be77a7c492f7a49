"""Whether two networks answer alike.

Predictions are integer labels ``(..., n_samples)`` or scores
``(..., n_samples, n_classes)``, of which the largest counts (the first of equal ones).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_labels, as_tensor, check_finite
from repscope.errors import LabelError, LabelMismatch, NotEnoughSamples


def disagreement(predictions_a: Any, predictions_b: Any) -> Tensor:
    r"""Return the share of inputs on which two networks answer differently.

    :math:`\frac{1}{n} \sum_i [\hat y_{a,i} \ne \hat y_{b,i}]`. Two data orders of one
    optimizer disagree too: what an optimizer changes is the ratio to that.

    Args:
        predictions_a: Labels ``(..., n_samples)`` or scores
            ``(..., n_samples, n_classes)``.
        predictions_b: The same of another network, for the same inputs.

    Returns:
        Shape ``(...)``, in [0, 1].

    Raises:
        LabelError: If predictions are 1-D and not integers.
        LabelMismatch: If the two have different shapes.
        NotEnoughSamples: If there are none.

    References:
        Fort, Hu and Lakshminarayanan (2019), Deep ensembles: a loss landscape
        perspective, arXiv 1912.02757.

    Example:
        >>> disagreement([0, 1, 2, 2], [[9.0, 0, 0], [0, 9, 0], [0, 9, 0], [0, 0, 9]])
        tensor(0.2500, dtype=torch.float64)
    """  # noqa: DOC502 - raised by _pair
    a, b = _pair(predictions_a, predictions_b)
    return (a != b).to(torch.float64).mean(-1)


def error_consistency(predictions_a: Any, predictions_b: Any, labels: Any) -> Tensor:
    r"""Return Cohen's kappa of being right: do two networks fail on the same inputs?

    :math:`\kappa = (c - e) / (1 - e)` with :math:`c` the share of inputs on which both
    are right or both wrong, and :math:`e = p_a p_b + (1 - p_a)(1 - p_b)` what two
    independent networks of those accuracies would have.

    Args:
        predictions_a: As in ``disagreement``.
        predictions_b: As in ``disagreement``.
        labels: The right answers, shape ``(n_samples,)``.

    Returns:
        Shape ``(...)``, at most 1 (the same errors), 0 for independent ones; NaN when
        both are always right or both always wrong.

    Raises:
        LabelError: If predictions are 1-D and not integers.
        LabelMismatch: If shapes differ.
        NotEnoughSamples: If there are no samples.

    References:
        Geirhos, Meding and Wichmann (2020), Beyond accuracy: quantifying trial-by-trial
        behaviour of CNNs and humans by measuring error consistency, NeurIPS.

    Example:
        >>> error_consistency([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]).item()
        0.0
    """  # noqa: DOC502 - raised by _pair and as_labels
    a, b = _pair(predictions_a, predictions_b)
    y = as_labels(labels, n_samples=a.shape[-1], device=a.device)
    right_a, right_b = (a == y).to(torch.float64), (b == y).to(torch.float64)
    same = (right_a == right_b).to(torch.float64).mean(-1)
    p_a, p_b = right_a.mean(-1), right_b.mean(-1)
    expected = p_a * p_b + (1 - p_a) * (1 - p_b)
    return (same - expected) / (1 - expected)


# -- helpers -----------------------------------------------------------------
def _pair(predictions_a: Any, predictions_b: Any) -> tuple[Tensor, Tensor]:
    a = _answers(predictions_a, name="predictions_a")
    b = _answers(predictions_b, name="predictions_b").to(a.device)
    if a.shape != b.shape:
        raise LabelMismatch(
            f"predictions must be of the same inputs: predictions_a has answers of "
            f"shape {tuple(a.shape)}, predictions_b {tuple(b.shape)}"
        )
    return a, b


def _answers(predictions: Any, *, name: str) -> Tensor:
    values = as_tensor(predictions, plain=None)
    if values.is_floating_point():
        if values.ndim < 2:
            raise LabelError(
                f"{name} must be integer labels (..., n_samples) or scores (..., "
                f"n_samples, n_classes), got {values.dtype} of shape "
                f"{tuple(values.shape)}"
            )
        check_finite(values, name=name)
        values = values.argmax(-1) if values.numel() else values[..., 0]
    if not values.ndim or not values.numel():
        raise NotEnoughSamples(f"{name} holds no predictions")
    return values
