"""Controlled studies: optimizers x seeds x tasks, every run recorded."""

from repscope.studies.catalog import STUDIES, Study
from repscope.studies.config import Protocol, RunConfig
from repscope.studies.data import DATASETS, Data, load
from repscope.studies.sweep import Finished, plan, sweep

__all__ = [
    "DATASETS",
    "STUDIES",
    "Data",
    "Finished",
    "Protocol",
    "RunConfig",
    "Study",
    "load",
    "plan",
    "sweep",
]
