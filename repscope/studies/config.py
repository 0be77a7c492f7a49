"""The resolved configuration of a run, and the key that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from repscope import __version__

Hyper = Mapping[str, float]


@dataclass(frozen=True)
class Protocol:
    """How a study runs on one data set.

    Attributes:
        sizes: Layer widths from input to output.
        batch_size: Rows per update.
        epochs: Passes over a task's training rows, at most.
        capture_every: Updates between captures (task ends are always captured).
        optimizers: Optimizer -> hyper-parameters.
        eval_every: Updates between evaluations on the task's test rows, or ``None``.
        patience: Evaluations without a new best before a task is stopped.
    """

    sizes: tuple[int, ...]
    batch_size: int
    epochs: int
    capture_every: int
    optimizers: Mapping[str, Hyper]
    eval_every: int | None = None
    patience: int | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides one run.

    Attributes:
        study: A row of ``STUDIES``.
        data: A row of ``DATASETS``.
        optimizer: A row of ``OPTIMIZERS``.
        hyper: Its hyper-parameters.
        seed: Decides initial weights, row order and permutations; equal seeds share
            all three across optimizers.
        sizes: Layer widths from input to output.
        batch_size: Rows per update.
        epochs: Passes over a task's training rows, at most.
        capture_every: Updates between captures.
        eval_every: Updates between evaluations, or ``None``.
        patience: Evaluations without a new best before a task is stopped.
    """

    study: str
    data: str
    optimizer: str
    hyper: Hyper
    seed: int
    sizes: tuple[int, ...]
    batch_size: int
    epochs: int
    capture_every: int
    eval_every: int | None = None
    patience: int | None = None

    @property
    def key(self) -> str:
        """A hash of the resolved configuration and of RepScope's version."""
        text = json.dumps({**asdict(self), "repscope": __version__}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The name of the run's store."""
        return f"{self.study}-{self.optimizer}-s{self.seed}-{self.key}"
