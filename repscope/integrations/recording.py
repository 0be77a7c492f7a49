"""What the callbacks of all training frameworks do alike."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from repscope.errors import RepScopeWarning
from repscope.recorder import Recorder


class Recording:
    """A recorder that begins and ends with a training that somebody else runs.

    As a context manager it closes the recorder at the latest when the block is left.

    Args:
        path: Where the store goes.
        options: Of `Recorder`; they win over what the training says.

    Attributes:
        recorder: The recorder of the training that began last; ``None`` before.
    """

    def __init__(self, path: str | Path, options: dict[str, Any]) -> None:
        self.recorder: Recorder | None = None
        self._path = path
        self._options = options
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(error)

    def _begin(
        self, model: nn.Module, optimizer: Optimizer | None, *, resume: bool | int
    ) -> Recorder:
        self._end()
        known: dict[str, Any] = {"optimizer": optimizer, "resume": resume}
        self.recorder = Recorder(model, self._path, **known | self._options)
        self._running = True
        return self.recorder

    def _commit(self) -> None:
        """Make the record durable before or after a checkpoint is.

        Raises:
            Exception: With ``on_error="raise"``, what went wrong. By default a
                training goes on that cannot be recorded.
        """  # noqa: DOC502 - re-raised as it was
        if self.recorder is None or not self._running:
            return
        try:
            self.recorder.commit()
        except Exception as error:
            if self._options.get("on_error") == "raise":
                raise
            if error is not self.recorder.error:  # that was warned about already
                warnings.warn(
                    f"the record at {self.recorder.path} could not be made durable "
                    f"with the checkpoint at step {self.recorder.step_number}: "
                    f"{type(error).__name__}: {error}. Training goes on; the end of "
                    "it tries again",
                    RepScopeWarning,
                    stacklevel=3,
                )

    def _end(self, error: BaseException | None = None) -> None:
        """Close the recorder; the exception of a training gets a note at most."""
        if self.recorder is None or not self._running:
            return
        self._running = False
        kind, trace = (type(error), error.__traceback__) if error else (None, None)
        self.recorder.__exit__(kind, error, trace)
