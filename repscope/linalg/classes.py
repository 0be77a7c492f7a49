"""Sums and means over the samples of each class, for every family that has classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from repscope._checks import as_features, as_labels
from repscope.errors import MetricError


class Grouped(NamedTuple):
    """Samples and the class of each.

    Attributes:
        features: Float64, shape ``(n_samples, n_features)``.
        members: Row of ``classes`` that each sample belongs to, shape ``(n_samples,)``.
        classes: The labels that occur, ascending, shape ``(n_classes,)``.
    """

    features: Tensor
    members: Tensor
    classes: Tensor


def grouped(X: Any, y: Any) -> Grouped:
    """Return checked features and labels.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.

    Returns:
        Both on the device of ``X``.

    Raises:
        MetricError: If ``X`` has more than 2 dimensions.
    """
    features = as_features(X)
    if features.ndim != 2:
        raise MetricError(
            f"X must have shape (n_samples, n_features), got {tuple(features.shape)}"
        )
    labels = as_labels(y, n_samples=len(features), device=features.device)
    classes, members = torch.unique(labels, return_inverse=True)
    return Grouped(features.to(torch.float64), members, classes)


def class_sums(V: Tensor, members: Tensor) -> Tensor:
    """Return the sum over the samples of each class.

    Args:
        V: Shape ``(n_samples, ...)``.
        members: Class of each sample, counted from 0, none of them empty.

    Returns:
        Shape ``(n_classes, ...)``.
    """
    n_classes = int(members.max()) + 1
    return V.new_zeros(n_classes, *V.shape[1:]).index_add(0, members, V)


def class_averages(V: Tensor, members: Tensor) -> Tensor:
    """Return the mean over the samples of each class.

    Args:
        V: Shape ``(n_samples, ...)``.
        members: Class of each sample, counted from 0, none of them empty.

    Returns:
        Shape ``(n_classes, ...)``.
    """
    counts = members.bincount().view(-1, *[1] * (V.ndim - 1))
    return class_sums(V, members) / counts


def row_norms(V: Tensor) -> Tensor:
    """Return row norms whose squares can neither overflow nor underflow.

    Args:
        V: Shape ``(..., n, d)``.

    Returns:
        Shape ``(..., n)``.
    """
    top = V.abs().amax(-1, keepdim=True)
    scaled = torch.where(top > 0, V / top, 0.0)
    return top[..., 0] * scaled.square().sum(-1).sqrt()
