"""Copy hidden state out of a model: which layers, when, on what inputs."""

from repscope.capture.choice import Choice
from repscope.capture.compiled import original
from repscope.capture.forward import Settings
from repscope.capture.hooks import Taken, Taps
from repscope.capture.pool import Pool
from repscope.capture.probe import Probe, as_probe
from repscope.capture.rows import REDUCTIONS
from repscope.capture.schedules import (
    Schedule,
    as_schedule,
    at_steps,
    every,
    log_spaced,
)
from repscope.capture.selection import LayerSpec, Selected, layers, select
from repscope.capture.streaming import Streaming
from repscope.capture.targets import TARGETS, Target, check_targets, is_sharded
from repscope.capture.updates import Updates

__all__ = [
    "REDUCTIONS",
    "TARGETS",
    "Choice",
    "LayerSpec",
    "Pool",
    "Probe",
    "Schedule",
    "Selected",
    "Settings",
    "Streaming",
    "Taken",
    "Taps",
    "Target",
    "Updates",
    "as_probe",
    "as_schedule",
    "at_steps",
    "check_targets",
    "every",
    "is_sharded",
    "layers",
    "log_spaced",
    "original",
    "select",
]
