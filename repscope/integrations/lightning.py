"""Record a training that Lightning runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from repscope.integrations.extras import load
from repscope.integrations.recording import Recording

_Callback: Any = load(
    "lightning.pytorch", "pytorch_lightning", extra="lightning"
).Callback


class RecorderCallback(Recording, _Callback):  # type: ignore[misc]
    """Record what a ``Trainer`` trains.

    The recorder is built when training starts: the model is on its device, a
    checkpoint is loaded, the sanity check is over. Its steps are the updates of the
    first optimizer, so gradient accumulation, manual optimization and skipped steps
    count right. It is committed with every checkpoint, and closed when training ends,
    also by an exception, which passes through.

    A training that goes on from a checkpoint goes on in the store, from the step that
    the checkpoint was saved at.

    Args:
        path: Where the store goes, as in `repscope.Recorder`.
        labels: Takes a batch and returns the integer labels of its examples, for
            recordings of training batches.
        **options: Of `repscope.Recorder`, such as ``layers``, ``every`` and ``probe``.
            ``optimizer`` and ``resume`` are found out unless they are given.

    Attributes:
        recorder: The recorder, once training has started.

    Raises:
        MissingExtra: On import, if Lightning is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        labels: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, options)
        self._labels = labels
        self._saved_step: int | None = None

    # -- what Lightning calls -------------------------------------------------
    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Forget the step of another trainer's training.

        Args:
            trainer: Of Lightning.
            pl_module: The model.
            stage: ``"fit"`` or another.
        """
        if stage == "fit" and not trainer.global_step:
            self._saved_step = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach the recorder.

        Args:
            trainer: Of Lightning.
            pl_module: The model.
        """
        resume: bool | int = False
        if trainer.global_step or trainer.ckpt_path:
            # Lightning counts the updates of all optimizers, and skipped ones too.
            saved = self._saved_step
            resume = trainer.global_step if saved is None else saved
        recorder = self._begin(
            pl_module, next(iter(trainer.optimizers), None), resume=resume
        )
        self._saved_step = recorder.step_number

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: nn.Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Tell the recorder about the batch.

        Args:
            trainer: Of Lightning.
            pl_module: The model.
            outputs: What ``training_step`` returned.
            batch: The batch.
            batch_idx: Its number in the epoch.
        """
        if self.recorder is None or not self._running:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is not None and pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # Lightning divided by it
        labels = None if self._labels is None else self._labels(batch)
        self.recorder.step(loss=loss, labels=labels)
        self._saved_step = self.recorder.step_number

    def on_save_checkpoint(
        self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Commit, before the checkpoint is written.

        Args:
            trainer: Of Lightning.
            pl_module: The model.
            checkpoint: What will be written.
        """
        self._commit()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the step of the recorder.

        Returns:
            ``{"step": n}``, empty before training.
        """
        return {} if self._saved_step is None else {"step": self._saved_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step from a checkpoint.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._saved_step = state_dict.get("step")

    def on_exception(
        self, trainer: Any, pl_module: nn.Module, exception: BaseException
    ) -> None:
        """Close the recorder; its store says what interrupted it.

        Args:
            trainer: Of Lightning.
            pl_module: The model.
            exception: What ends the training.
        """
        self._end(exception)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Close the recorder, when the last checkpoint is written.

        Args:
            trainer: Of Lightning.
            pl_module: The model.
        """
        self._end()
