"""The store of a recorder: a new one, or one to go on with."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repscope import store
from repscope.errors import ProbeMismatch, RepScopeWarning, UsageError


def open_or_create(
    path: Path,
    facts: dict[str, Any],
    resume: bool | int,
    **options: Any,
) -> tuple[store.Writer, bool]:
    """Return a writer for the run at ``path``, and whether that is a new store.

    Args:
        path: Where the store is, or will be.
        facts: What it says about the run.
        resume: As given to the recorder.
        **options: Of the writer.
    """
    if resume is False:
        return store.create(path, meta=facts, **options), True
    at = None if resume is True else operator.index(resume)
    if not at and store.is_stillborn(path):
        store.remove(path)
    if not at and not store.exists(path):
        return store.create(path, meta=facts, **options), True
    run = store.open(path)
    _check_same(run, facts["recorder"])
    writer = store.reopen(path, at=at, **options)
    if at is not None and at > run.progress:
        warnings.warn(
            f"{path} was last made durable at step {run.progress}, and goes on at step "
            f"{at}: what was recorded in between is missing; commit() where you save a "
            "checkpoint",
            RepScopeWarning,
            stacklevel=4,
        )
    writer.annotate(**{name: facts[name] for name in facts if name != "recorder"})
    return writer, False


def progress(path: Path, resume: bool | int) -> int:
    """Return the step that a run goes on from, as far as can be seen from here.

    Args:
        path: Where its store is, or will be.
        resume: As given to the recorder.
    """
    if resume is not True:
        return operator.index(resume)
    if store.is_stillborn(path) or not store.exists(path):
        return 0
    return store.open(path).progress


def _check_same(run: store.Run, now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that recorded something else.

    Raises:
        ProbeMismatch: If it had another probe, or none.
        UsageError: If it had other layers or targets.
    """
    was = run.meta.get("recorder") or {}
    if was.get("probe") != now["probe"]:
        raise ProbeMismatch(
            f"{run.path} was recorded on {_inputs(was)}, not on {_inputs(now)}: one "
            "run has one probe; give the same, or record into a new store"
        )
    for what in ("reduce", "dtype", "max_rows"):
        if was.get(what, now[what]) != now[what]:
            raise UsageError(
                f"{run.path} was recorded with {what}={was[what]!r}, not "
                f"{now[what]!r}; give the same, or record into a new store"
            )
    for what in ("layers", "targets"):
        if sorted(was.get(what, ())) != sorted(now[what]):
            raise UsageError(
                f"{run.path} was recorded with {what} {sorted(was.get(what, ()))}, not "
                f"{sorted(now[what])}; select the same, or record into a new store"
            )


def _inputs(facts: Mapping[str, Any]) -> str:
    probe = facts.get("probe")
    if probe is None:
        return "training batches"
    return f"a probe of {probe['n_samples']} samples (sha256 {probe['sha256'][:12]})"
