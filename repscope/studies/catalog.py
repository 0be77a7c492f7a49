"""The studies: what they ask, how they train, with which settings.

Learning rates are those of earlier scans and were fixed before any reported run. Where
we scanned them here (Shampoo in the sparsity study: the best dense accuracy among 0.01,
0.03, 0.1, 0.3, 0.6 and 1), it was on the tuning seed, which `plan` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol as Callback

from repscope.studies import tasks, training
from repscope.studies.config import Protocol
from repscope.studies.data import DATASETS, Data


class MakeTasks(Callback):
    """Turns a data set and a seed into tasks."""

    def __call__(self, data: Data, *, seed: int) -> list[tasks.Task]:
        """Return the tasks in their order."""


@dataclass(frozen=True)
class Study:
    """A question, and the training that answers it.

    Attributes:
        title: For headings.
        question: One sentence.
        tasks: Makes the tasks.
        train: Trains a session and records it.
        protocols: Data set -> settings.
    """

    title: str
    question: str
    tasks: MakeTasks
    train: Callable[[training.Session], None]
    protocols: Mapping[str, Protocol]


def _by_data(*, digits: Protocol, idx: Protocol) -> dict[str, Protocol]:
    """Return the protocols by data set; what looks like MNIST is treated like it."""
    look_alikes = [name for name in DATASETS if name != "digits"]
    return {"digits": digits, **dict.fromkeys(look_alikes, idx)}


_PERMUTED = _by_data(
    digits=Protocol(
        sizes=(64, 50, 10),
        batch_size=32,
        epochs=20,
        capture_every=200,
        eval_every=20,
        patience=10,
        optimizers={
            "sgd": {"lr": 0.3},
            "adamw": {"lr": 1e-3},
            "shampoo": {"lr": 0.1, "root_every": 1},
        },
    ),
    idx=Protocol(
        sizes=(784, 100, 10),
        batch_size=128,
        epochs=2,
        capture_every=200,
        eval_every=100,
        patience=5,
        optimizers={
            "sgd": {"lr": 0.3},
            "adamw": {"lr": 1e-3},
            "shampoo": {"lr": 0.12, "root_every": 25},
        },
    ),
)
_PAIRS = _by_data(
    digits=Protocol(
        sizes=(64, 50, 50, 10),
        batch_size=16,
        epochs=5,
        capture_every=50,
        optimizers={
            "sgd": {"lr": 0.1},
            "adam": {"lr": 1e-3},
            "shampoo": {"lr": 0.02, "root_every": 1},
        },
    ),
    idx=Protocol(
        sizes=(784, 100, 100, 10),
        batch_size=128,
        epochs=1,
        capture_every=50,
        optimizers={
            "sgd": {"lr": 0.1},
            "adam": {"lr": 3e-4},
            "shampoo": {"lr": 0.015, "root_every": 25},
        },
    ),
)
_SPARSITY = _by_data(
    digits=Protocol(
        sizes=(64, 100, 50, 10),
        batch_size=32,
        epochs=40,
        capture_every=200,
        optimizers={
            "sgd": {"lr": 0.3},
            "adamw": {"lr": 3e-3},
            "shampoo": {"lr": 0.3, "root_every": 10},
            "p-sgd": {"lr": 1.0, "beta": 1.0},
            "p-adam": {"lr": 0.02, "beta": 1.0},
        },
    ),
    idx=Protocol(
        sizes=(784, 300, 100, 10),
        batch_size=128,
        epochs=5,
        capture_every=500,
        optimizers={
            "sgd": {"lr": 0.5},
            "adamw": {"lr": 1e-3},
            "p-sgd": {"lr": 3.0, "beta": 1.0},
            "p-adam": {"lr": 0.02, "beta": 1.0},
        },
    ),
)

STUDIES: Mapping[str, Study] = {
    "permuted": Study(
        "Permuted tasks",
        "Three pixel permutations in sequence: who remembers the first, and in how "
        "many directions do the hidden activations spread?",
        tasks.permuted,
        training.permuted,
        _PERMUTED,
    ),
    "pairs": Study(
        "Class pairs in sequence",
        "Two classes at a time: what is left of the earlier pairs, and how alike are "
        "the features of different classes?",
        tasks.class_pairs,
        training.pairs,
        _PAIRS,
    ),
    "sparsity": Study(
        "Sparsity after training",
        "All classes at once, then the smallest weights set to zero: how much can go "
        "before the accuracy does?",
        tasks.whole,
        training.sparsity,
        _SPARSITY,
    ),
}
