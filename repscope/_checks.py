"""Checks on inputs that every metric family shares, one message for one fault."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repscope.errors import (
    LabelError,
    LabelMismatch,
    MetricError,
    NonFiniteError,
    NotEnoughSamples,
    UsageError,
    suggest,
)


def as_tensor(value: Any, *, plain: torch.dtype | None = torch.float64) -> Tensor:
    """Return ``value`` as a detached tensor that shares memory where it can.

    Args:
        value: A tensor, anything numpy takes, or (nested lists of) Python numbers.
        plain: Dtype of Python numbers; ``None`` keeps integers and makes floats
            float32, which costs 93.1 eight of its digits.

    Returns:
        A tensor on the device ``value`` lives on.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if not hasattr(value, "__array__"):
        return torch.as_tensor(value, dtype=plain).detach()
    array = np.asarray(value)
    # torch refuses reversed arrays and warns about read-only ones.
    usable = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if usable else array.copy())


def as_float(value: Any, *, name: str) -> Tensor:
    """Return ``value`` as a detached floating tensor on the device it lives on.

    float32 and float64 keep their dtype; integers, booleans, float16 and bfloat16
    become float64, because a Gram matrix in those types wraps or overflows.

    Args:
        value: Anything ``torch.as_tensor`` takes.
        name: Argument name for the message.

    Returns:
        A tensor of dtype float32 or float64 that shares no graph with the input.

    Raises:
        MetricError: If ``value`` is complex, sparse or quantised.
    """  # noqa: DOC502 - raised by _as_dense
    tensor = _as_dense(value, name=name)
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.float64)


def _as_dense(value: Any, *, name: str) -> Tensor:
    tensor = as_tensor(value)
    if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_quantized:
        raise MetricError(
            f"{name} must be a dense real tensor, got {tensor.dtype} with layout "
            f"{tensor.layout}; convert it first"
        )
    return tensor


def check_finite(X: Tensor, *, name: str) -> None:
    """Refuse NaN and infinity, naming the first place.

    Args:
        X: Any real tensor.
        name: Argument name for the message.

    Raises:
        NonFiniteError: If an entry is NaN or infinite.
    """
    if is_finite(X):
        return
    bad = ~torch.isfinite(X)
    count = int(bad.sum())
    if count:
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"{name} has {count} non-finite of {X.numel()} entries, the first at "
            f"{first}; drop those rows or look for divergence at that step"
        )


def is_finite(X: Tensor) -> bool:
    """Return whether no entry is NaN or infinite, in one pass and without a copy.

    Args:
        X: Any real tensor.

    Returns:
        True for no entries, too.
    """
    if not X.numel():
        return True
    low, high = torch.aminmax(X.detach())  # both are NaN when an entry is
    return math.isfinite(low) and math.isfinite(high)


def as_features(value: Any, *, name: str = "X", minimum: int = 2) -> Tensor:
    """Return features ``(..., n_samples, n_features)``, checked.

    Args:
        value: Anything ``torch.as_tensor`` takes.
        name: Argument name for the message.
        minimum: Fewest samples that make sense.

    Returns:
        A finite float32 or float64 tensor with at least 2 dimensions.

    Raises:
        MetricError: If there are fewer than 2 dimensions or no features.
        NotEnoughSamples: If there are fewer than ``minimum`` samples.
        NonFiniteError: If an entry is NaN or infinite.
    """  # noqa: DOC502 - raised by what it calls
    X = as_float(as_matrices(value, name=name, minimum=minimum), name=name)
    check_finite(X, name=name)
    return X


def as_matrices(value: Any, *, name: str, minimum: int = 2) -> Tensor:
    """Return features in their own dtype, of which only the shape has been checked.

    Args:
        value: Anything ``torch.as_tensor`` takes.
        name: Argument name for the message.
        minimum: Fewest samples that make sense.

    Returns:
        A real tensor ``(..., n_samples, n_features)``.

    Raises:
        MetricError: If it is not dense and real, there are fewer than 2 dimensions or
            no features.
        NotEnoughSamples: If there are fewer than ``minimum`` samples.
    """
    X = _as_dense(value, name=name)
    if X.ndim < 2:
        raise MetricError(
            f"{name} must have shape (..., n_samples, n_features), got {tuple(X.shape)}"
        )
    if X.shape[-1] == 0 or 0 in X.shape[:-2]:
        raise MetricError(f"{name} is empty: shape {tuple(X.shape)}")
    if X.shape[-2] < minimum:
        raise NotEnoughSamples(
            f"{name} needs at least {minimum} samples, got {X.shape[-2]} "
            f"(shape {tuple(X.shape)})"
        )
    return X


def as_labels(value: Any, *, n_samples: int, device: torch.device) -> Tensor:
    """Return integer labels ``(n_samples,)`` on ``device``, checked.

    Args:
        value: Anything ``torch.as_tensor`` takes.
        n_samples: Rows of the features the labels belong to.
        device: Where those features live.

    Returns:
        An int64 tensor.

    Raises:
        LabelError: If the labels are not integers.
        LabelMismatch: If they are not one-dimensional or differ in number.
    """
    y = as_tensor(value, plain=None)
    if y.is_floating_point() or y.is_complex():
        raise LabelError(
            f"labels must be integers, got {y.dtype}; round and cast them first"
        )
    if y.ndim != 1 or y.shape[0] != n_samples:
        raise LabelMismatch(
            f"labels must have shape ({n_samples},) to match the features, got "
            f"{tuple(y.shape)}"
        )
    return y.to(device=device, dtype=torch.int64)


def check_choice(value: str, choices: Iterable[str], *, name: str) -> None:
    """Refuse an option that is none of ``choices``.

    Args:
        value: What the user wrote.
        choices: What would have been understood.
        name: Argument name for the message.

    Raises:
        UsageError: If ``value`` is not among them.
    """
    known = list(choices)
    if value not in known:
        raise UsageError(
            f"{name}={value!r} is not one of {known}{suggest(str(value), known, n=1)}"
        )
