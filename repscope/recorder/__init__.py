"""Attach to a training run: schedule, hooks and store, and the thread that writes."""

from repscope.recorder.recorder import Recorder

__all__ = ["Recorder"]
