"""Stores: one directory per run that loses no acknowledged row.

A store is written by one `Writer` at a time, as immutable HDF5 segments and an
append-only manifest, and read as a `Run`, also while it is being written.
"""

from repscope.store.creation import create, exists, remove
from repscope.store.index import ROW_TARGETS
from repscope.store.onefile import pack
from repscope.store.reader import Run, open
from repscope.store.recovery import is_stillborn, reopen, repair
from repscope.store.verify import Check, check
from repscope.store.writer import Writer

__all__ = [
    "ROW_TARGETS",
    "Check",
    "Run",
    "Writer",
    "check",
    "create",
    "exists",
    "is_stillborn",
    "open",
    "pack",
    "remove",
    "reopen",
    "repair",
]
