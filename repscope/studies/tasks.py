"""Sequences of tasks made from one data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repscope.studies.data import Data


@dataclass(frozen=True, eq=False)
class Task:
    """One thing to learn: training rows and the test rows that judge it.

    Attributes:
        name: What a figure calls it.
        x_train: Shape ``(n_samples, n_features)``.
        y_train: Shape ``(n_samples,)``.
        x_test: Held-out rows.
        y_test: Their labels.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def permuted(data: Data, *, seed: int, n_tasks: int = 3) -> list[Task]:
    """Return the data set under ``n_tasks`` random pixel orders.

    Args:
        data: The images.
        seed: Decides the orders; equal for every optimizer of a seed.
        n_tasks: How many.

    Returns:
        Tasks with the same labels and permuted columns.

    References:
        Goodfellow et al. (2013), An empirical investigation of catastrophic
        forgetting in gradient-based neural networks, arXiv 1312.6211.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [
        torch.randperm(data.x_train.shape[1], generator=generator)
        for _ in range(n_tasks)
    ]
    return [
        Task(
            f"permutation {i}",
            data.x_train[:, order],
            data.y_train,
            data.x_test[:, order],
            data.y_test,
        )
        for i, order in enumerate(orders, start=1)
    ]


def class_pairs(data: Data, *, seed: int = 0) -> list[Task]:
    """Return one task per pair of classes: 0/1, 2/3, ...

    Args:
        data: The images.
        seed: Not used: the order of the classes is fixed, as in the paper.

    Returns:
        Tasks whose labels stay those of the whole set (a shared, full-width head).
    """
    n_classes = int(data.y_train.max()) + 1
    tasks = []
    for first in range(0, n_classes - 1, 2):
        train = (data.y_train == first) | (data.y_train == first + 1)
        test = (data.y_test == first) | (data.y_test == first + 1)
        tasks.append(
            Task(
                f"{first}/{first + 1}",
                data.x_train[train],
                data.y_train[train],
                data.x_test[test],
                data.y_test[test],
            )
        )
    return tasks


def whole(data: Data, *, seed: int = 0) -> list[Task]:
    """Return the data set as a single task.

    Args:
        data: The images.
        seed: Not used.

    Returns:
        A list of one.
    """
    return [Task("all", data.x_train, data.y_train, data.x_test, data.y_test)]


def pooled_test(tasks: list[Task]) -> tuple[Tensor, Tensor]:
    """Return the test rows of all tasks together: the studies' probe.

    Args:
        tasks: At least one.

    Returns:
        Inputs and labels.
    """
    return (
        torch.cat([task.x_test for task in tasks]),
        torch.cat([task.y_test for task in tasks]),
    )
