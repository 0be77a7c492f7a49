"""Every error RepScope raises on purpose.

Each class also inherits the builtin a caller would expect, so ``except ValueError``
keeps working. Messages say what happened, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str], *, n: int = 3) -> str:
    """Return a sentence that offers the known names nearest to ``name``.

    Args:
        name: What the user wrote.
        known: Names that would have been understood.
        n: At most so many suggestions.

    Returns:
        ``"; did you mean 'a', 'b' or 'c'?"``, or ``""`` when ``known`` is empty.

    Example:
        >>> suggest("fc_1", ["fc1", "fc2", "head"], n=2)
        "; did you mean 'fc1' or 'fc2'?"
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.0)
    if not near:
        return ""
    quoted = [repr(item) for item in near]
    head = ", ".join(quoted[:-1])
    return (
        f"; did you mean {head} or {quoted[-1]}?"
        if head
        else (f"; did you mean {quoted[0]}?")
    )


class RepScopeError(Exception):
    """The common parent: ``except RepScopeError`` catches all of ours."""

    # KeyError would show the repr of the message, quotes and backslashes included.
    __str__ = Exception.__str__


class RepScopeWarning(UserWarning):
    """Something went on, but not as asked; the message says what."""


# -- the store ---------------------------------------------------------------
class StoreError(RepScopeError, OSError):
    """Something about a store on disk."""

    __str__ = OSError.__str__


class NotAStore(StoreError, ValueError):
    """The path holds no RepScope store."""


class StoreExists(StoreError, FileExistsError):
    """A store is already there; it was left untouched."""


class FormatTooNew(StoreError):
    """The store was written by a newer RepScope."""


class StoreLocked(StoreError):
    """Another process is writing to this store."""


class StoreFull(StoreError):
    """The disk or the quota is full (``errno`` is ENOSPC or EDQUOT)."""


class StoreWriteError(StoreError):
    """The operating system refused a write."""


class CorruptSegment(StoreError):
    """Bytes on disk differ from what was acknowledged; no number is returned."""


class ClosedStore(StoreError):
    """The store or recorder was used after ``close()``."""


class ProbeMismatch(StoreError, ValueError):
    """What belongs together was recorded with different probes, or without one."""


class ShardMismatch(StoreError):
    """The stores of the ranks of a job do not make one run, or one is missing."""


class UntrustedStore(StoreError):
    """A file holds something that a RepScope store never has; it was not read."""


# -- capture -----------------------------------------------------------------
class CaptureError(RepScopeError, RuntimeError):
    """Something about attaching to a model or copying out of it."""


class UnknownLayer(CaptureError, KeyError):
    """No module of the model has this name or matches this pattern."""


class LayerNeverFired(CaptureError):
    """A layer that was named exactly never ran in the first captured step."""


class AlreadyAttached(CaptureError):
    """A recorder is already attached to this model."""


class ForkedRecorder(CaptureError):
    """A recorder was used in a forked child process."""


class MissingOptimizer(CaptureError, ValueError):
    """A capture target needs ``optimizer=``."""


class UnsupportedOutput(CaptureError, TypeError):
    """A layer returned something that cannot be recorded as rows."""


class UnsupportedLayout(CaptureError, TypeError):
    """A layer returned a tensor whose values are not laid out densely."""


class UnsupportedModule(CaptureError, TypeError):
    """A module on which hooks do not work."""


class InsideTransform(CaptureError):
    """A hooked layer ran inside a function transform such as ``vmap``."""


class CompiledFullgraph(CaptureError):
    """A hook would break a graph that was compiled with ``fullgraph=True``."""


class ShardedParameter(CaptureError):
    """A parameter of which each rank has a part cannot be read whole."""


class QueueFull(CaptureError):
    """More waits to be written than ``queue_bytes`` allows."""


class ShapeChanged(CaptureError):
    """The width of a stream changed while recording."""


class DtypeChanged(CaptureError):
    """The dtype of a stream changed while recording."""


# -- numbers -----------------------------------------------------------------
class MetricError(RepScopeError, ValueError):
    """An input for which a metric has no meaning."""


class NonFiniteError(MetricError):
    """The input holds NaN or infinity."""


class NotEnoughSamples(MetricError):
    """Fewer samples than the definition needs."""


class LabelMismatch(MetricError):
    """Labels and samples differ in number."""


class LabelError(MetricError):
    """Labels that are not integers."""


class NotPositiveSemidefinite(MetricError):
    """A covariance with a truly negative eigenvalue."""


# -- usage -------------------------------------------------------------------
class UsageError(RepScopeError, ValueError):
    """A request that cannot be understood."""


class UnknownName(UsageError, KeyError):
    """No metric, optimizer, study or plot has this name."""


class DataError(UsageError):
    """Data files that are missing, unreadable or do not fit together."""


class MissingExtra(UsageError, ImportError):
    """An optional dependency is not installed; the message has the install line."""

    __str__ = Exception.__str__
