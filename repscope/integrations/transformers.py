"""Record a training that the Trainer of Transformers runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from repscope.integrations.extras import load
from repscope.integrations.recording import Recording

_Callback: Any = load("transformers", extra="transformers").TrainerCallback

_KEY = "repscope"


class RecorderCallback(Recording, _Callback):  # type: ignore[misc]
    """Record what a ``Trainer`` trains.

    The recorder is built when training begins: the model is on its device and a
    checkpoint is loaded. Its steps are the updates of the optimizer, so gradient
    accumulation and skipped steps count right. It is committed with every checkpoint,
    and closed when training ends.

    The loss is the one that the model returns, seen by a hook, because the Trainer
    tells callbacks only what it logs. It stays on its device. With gradient
    accumulation it is that of all micro-batches, put together as the Trainer does. A
    loss computed outside the model (``compute_loss_func``, label smoothing) is not
    recorded.

    A training that goes on from a checkpoint goes on in the store, from the step that
    the checkpoint was saved at.

    The Trainer does not tell callbacks about an exception: what was recorded is then
    saved when the program ends. Used as ``with RecorderCallback(...) as callback:``
    around the training, it is closed at once, and says what interrupted it.

    Args:
        path: Where the store goes, as in `repscope.Recorder`.
        labels: Takes the keyword arguments of the model, as a dict, and returns the
            integer labels of the examples, for recordings of training batches.
        **options: Of `repscope.Recorder`, such as ``layers``, ``every`` and ``probe``.
            ``optimizer`` and ``resume`` are found out unless they are given.

    Attributes:
        recorder: The recorder, once training has begun.

    Raises:
        MissingExtra: On import, if Transformers is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        labels: Callable[[Mapping[str, Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, options)
        self._labels = labels
        self._handle: RemovableHandle | None = None
        self._forget()

    # -- what the Trainer calls -----------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Attach the recorder.

        Args:
            args: Of the training.
            state: Of the Trainer.
            control: Of the Trainer; never changed.
            **known: The model, the optimizer and more.
        """
        resume: bool | int = False
        if state.global_step:
            # The Trainer counts the steps that gradient scaling skipped, too.
            saved = state.stateful_callbacks.get(_KEY, {})
            resume = saved.get("step", state.global_step)
        model = known["model"]
        self._begin(model, _unwrapped(known["optimizer"]), resume=resume)
        self._forget()
        _watching[model] = self
        self._handle = model.register_forward_hook(_see, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Tell the recorder about the step.

        Args:
            args: Of the training.
            state: Of the Trainer.
            control: Of the Trainer; never changed.
            **known: The model, the optimizer and more.
        """
        if self.recorder is None or not self._running:
            return
        y = self._seen_labels
        labels = torch.cat([torch.as_tensor(each) for each in y]) if y else None
        self.recorder.step(loss=self._loss(args), labels=labels)
        self._forget()
        state.stateful_callbacks[_KEY] = {"step": self.recorder.step_number}

    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Commit, as a checkpoint has been written.

        Args:
            args: Of the training.
            state: Of the Trainer.
            control: Of the Trainer; never changed.
            **known: The model, the optimizer and more.
        """
        self._commit()

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Close the recorder.

        Args:
            args: Of the training.
            state: Of the Trainer.
            control: Of the Trainer; never changed.
            **known: The model, the optimizer and more.
        """
        self._end()

    def _end(self, error: BaseException | None = None) -> None:
        if self._handle is not None:
            self._handle.remove()
        super()._end(error)

    # -- micro-batches --------------------------------------------------------
    def _forget(self) -> None:
        self._losses: list[Tensor] = []
        self._seen_labels: list[Any] = []
        self._parts = False

    def _take(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep the loss and the labels of one training forward."""
        first = next(iter(output), None) if isinstance(output, tuple) else None
        loss = output.get("loss") if isinstance(output, Mapping) else first
        if isinstance(loss, Tensor) and loss.ndim == 0:
            self._losses.append(loss.detach().clone())  # the Trainer may scale it
        if self._labels is not None:
            self._seen_labels.append(self._labels(kwargs))
        # Divided by the count of the whole step already: parts of a loss, not losses.
        self._parts = kwargs.get("num_items_in_batch") is not None

    def _loss(self, args: Any) -> Tensor | None:
        if not self._losses:
            return None
        total = torch.stack(self._losses).sum()
        if not self._parts:
            return total / len(self._losses)
        # The count is that of all processes: as the Trainer, make up for the others.
        everywhere = getattr(args, "average_tokens_across_devices", False)
        return total * args.world_size if everywhere else total


# A hook by itself, so that a copied or pickled model takes no callback along.
_watching: weakref.WeakKeyDictionary[nn.Module, RecorderCallback] = (
    weakref.WeakKeyDictionary()
)


def _see(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    callback = _watching.get(model)
    if callback is not None and model.training and torch.is_grad_enabled():
        callback._take(kwargs, output)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside what Accelerate made of it."""
    wrapper = load("accelerate.optimizer", extra="transformers").AcceleratedOptimizer
    while isinstance(optimizer, wrapper):
        optimizer = optimizer.optimizer
    return optimizer
