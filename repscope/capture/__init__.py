"""Copy hidden state out of a model: which layers, when, on what inputs."""

from repscope.capture.hooks import Taken, Taps
from repscope.capture.probe import Probe
from repscope.capture.rows import REDUCTIONS
from repscope.capture.schedules import (
    Schedule,
    as_schedule,
    at_steps,
    every,
    log_spaced,
)
from repscope.capture.selection import Selected, layers, select
from repscope.capture.targets import TARGETS, Target
from repscope.capture.updates import Updates

__all__ = [
    "REDUCTIONS",
    "TARGETS",
    "Probe",
    "Schedule",
    "Selected",
    "Taken",
    "Taps",
    "Target",
    "Updates",
    "as_schedule",
    "at_steps",
    "every",
    "layers",
    "log_spaced",
    "select",
]
