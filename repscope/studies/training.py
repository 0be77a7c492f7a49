"""One recorded run of a study: the training loop and what it writes down."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repscope.errors import NonFiniteError
from repscope.landscape import sparsity_curve
from repscope.optim import make
from repscope.recorder import Recorder
from repscope.studies.config import RunConfig
from repscope.studies.models import mlp
from repscope.studies.tasks import Task, pooled_test


class Diverged(Exception):
    """The loss left the finite numbers; the run ends and is reported as such."""


def accuracy(
    model: nn.Module, x: Tensor, y: Tensor, *, classes: Tensor | None = None
) -> float:
    """Return the share of rows whose largest logit is their label.

    Args:
        model: A classifier.
        x: Inputs ``(n_samples, n_features)``.
        y: Labels ``(n_samples,)``.
        classes: When given, only these logits compete.

    Returns:
        A number in [0, 1].
    """
    with torch.no_grad():
        logits = model(x)
    if classes is not None:
        others = torch.ones(logits.shape[1], dtype=torch.bool)
        others[classes] = False
        logits = logits.masked_fill(others, -math.inf)
    return float((logits.argmax(1) == y).double().mean())


class Session:
    """A model in training, with its tasks, its optimizer and its recorder.

    Args:
        config: The resolved configuration.
        tasks: What to learn, in order.
        path: Where the store goes.
        data_sha256: Hash of the data the tasks were made from.
    """

    def __init__(
        self, config: RunConfig, tasks: Sequence[Task], path: Path, *, data_sha256: str
    ) -> None:
        self.config = config
        self.tasks = tasks
        self.model = mlp(config.sizes, seed=config.seed)
        self.renew_optimizer()
        self.recorder = Recorder(
            self.model,
            path,
            layers="hidden*",
            capture=("outputs", "weights"),
            every=config.capture_every,
            probe=pooled_test(list(tasks)),
            optimizer=self.optimizer,
            meta={
                "study": config.study,
                "task": f"{config.study} {config.data}",
                "optimizer": config.optimizer,
                "seed": config.seed,
                "key": config.key,
                "data_sha256": data_sha256,
                "config": asdict(config),
                "tasks": [task.name for task in tasks],
            },
            on_error="raise",
        )

    def renew_optimizer(self) -> None:
        """Start the optimizer again with empty state."""
        parameters = self.model.parameters()
        self.optimizer = make(self.config.optimizer, parameters, **self.config.hyper)
        if hasattr(self, "recorder"):
            self.recorder.optimizer = self.optimizer

    def _batches(self, number: int) -> Iterator[tuple[Task, Tensor]]:
        # A stream for each task: when an optimizer stops one early, the next task
        # still comes in the same order for all optimizers of a seed.
        task, seed = self.tasks[number - 1], self.config.seed
        order = torch.Generator().manual_seed(1000 * seed + number)
        for _ in range(self.config.epochs):
            rows = torch.randperm(len(task.y_train), generator=order)
            for batch in rows.split(self.config.batch_size):
                yield task, batch

    def _update(self, task: Task, rows: Tensor) -> Tensor:
        loss = cross_entropy(self.model(task.x_train[rows]), task.y_train[rows])
        if not math.isfinite(loss.item()):
            raise Diverged
        self.optimizer.zero_grad()
        loss.backward()
        try:
            self.optimizer.step()
        except NonFiniteError as error:
            raise Diverged from error
        return loss.detach()

    def fit(self, number: int) -> None:
        """Train on one task (numbered from 1) for the configured epochs."""
        for task, rows in self._batches(number):
            self.recorder.step(loss=self._update(task, rows))

    def fit_until_stopped(self, number: int) -> bool:
        """Train on one task, stop early, and go back to its best weights.

        As in the paper, the *test* accuracy of the task decides when to stop.

        Args:
            number: Its place in the sequence, from 1.

        Returns:
            Whether the epochs ran out first: such a run has not converged.

        Raises:
            Diverged: If the loss leaves the finite numbers.
        """  # noqa: DOC502 - raised by the update
        every, patience = self.config.eval_every, self.config.patience
        assert every is not None
        assert patience is not None
        best, best_weights, waited = -1.0, self.model.state_dict(), 0
        capped = True
        for step, (task, rows) in enumerate(self._batches(number), start=1):
            loss = self._update(task, rows)
            if step % every:
                self.recorder.step(loss=loss)
                continue
            now = accuracy(self.model, task.x_test, task.y_test)
            self.recorder.step(loss=loss, **{f"accuracy/{number}": now})
            waited += 1
            if now > best:
                best, waited = now, 0
                best_weights = copy.deepcopy(self.model.state_dict())
            if waited >= patience:
                capped = False
                break
        self.model.load_state_dict(best_weights)
        return capped

    def end_task(self, number: int, **scalars: float) -> None:
        """Record the accuracy on every task, and the state, under ``task-<number>``."""
        row = {
            f"accuracy/{j}": accuracy(self.model, task.x_test, task.y_test)
            for j, task in enumerate(self.tasks, start=1)
        }
        self.recorder.capture_now(f"task-{number}", **row, **scalars)


def permuted(session: Session) -> None:
    """Learn the tasks one after the other, each to its best, optimizer renewed."""
    for number in range(1, len(session.tasks) + 1):
        session.renew_optimizer()
        capped = session.fit_until_stopped(number)
        session.end_task(number, **{f"capped/{number}": float(capped)})


def pairs(session: Session) -> None:
    """Learn pairs of classes one after the other, optimizer state kept."""
    for number in range(1, len(session.tasks) + 1):
        session.fit(number)
        own = {
            f"own_pair/{j}": accuracy(
                session.model, t.x_test, t.y_test, classes=t.y_test.unique()
            )
            for j, t in enumerate(session.tasks, start=1)
        }
        session.end_task(number, **own)


def sparsity(session: Session) -> None:
    """Learn everything at once, then set the smallest weights to zero."""
    (task,) = session.tasks
    session.fit(1)

    def evaluate(model: nn.Module) -> float:
        return accuracy(model, task.x_test, task.y_test)

    scores = {}
    for scope in ("global", "balanced"):
        curve = sparsity_curve(session.model, evaluate, scope=scope)
        for share, score in zip(curve.sparsity, curve.score, strict=True):
            scores[f"pruned/{scope}/{float(share):.4f}"] = float(score)
    session.end_task(1, **scores)
