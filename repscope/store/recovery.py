"""Go on with a store: after a kill, a power cut, or because training goes on."""

from __future__ import annotations

import contextlib
import operator
import os
import stat
import time
from pathlib import Path
from typing import Any

from repscope.errors import CorruptSegment, NotAStore, UsageError
from repscope.store import files, manifest, wal
from repscope.store.catalog import Catalog
from repscope.store.lock import Lock
from repscope.store.writer import Durability, Writer, check_options

_OWN = {"LOCK", "LOCK.excl", "FORMAT", "MANIFEST", "segments", "wal"}


def reopen(
    path: str | os.PathLike[str],
    *,
    at: int | None = None,
    durability: Durability = "batch",
    max_store_bytes: int | None = None,
) -> Writer:
    """Return a writer that goes on with a store.

    What was acknowledged is there. What a dead writer left half done is put aside:
    files that no frame of the manifest names, and the torn end of the manifest, are
    moved to ``quarantine/``; temporary files are removed. What was found is kept in
    `Writer.recovered` and in the ``recovered`` notes of `Run.meta`.

    Args:
        path: The directory of a store, whether it was closed or not.
        at: Go on after this step; records of later steps stay on disk and are hidden
            from every reader from now on. ``None`` goes on after the last
            acknowledged step.
        durability: As for `create`; it may differ from before.
        max_store_bytes: As for `create`.

    Returns:
        A writer that holds the lock; its ``progress`` is the step to go on from.

    Raises:
        UsageError: If ``at`` is negative.
    """
    path = Path(path).absolute()
    if at is not None and operator.index(at) < 0:
        raise UsageError(f"a run goes on at a step >= 0, got {at}")
    check_options(durability, max_store_bytes)
    manifest.check_format(path)  # no LOCK in a directory that is no store
    lock = Lock(path / "LOCK")
    try:
        with files.disk_errors(
            f"recovering the store {path}", advice="what was acknowledged is safe"
        ):
            return _go_on(path, lock, at, durability, max_store_bytes)
    except BaseException:
        lock.release()
        raise


def is_stillborn(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a directory that a writer died in before its start."""
    path = Path(path)
    if not path.is_dir():
        return False
    names = {f.name for f in path.iterdir() if not f.name.startswith(".tmp-")}
    if names and ("LOCK" not in names or not names <= _OWN):
        return False
    if any(any((path / name).iterdir()) for name in names & {"segments", "wal"}):
        return False
    try:
        manifest.load(path)
    except NotAStore:
        return True
    return False


def _go_on(
    path: Path,
    lock: Lock,
    at: int | None,
    durability: Durability,
    max_store_bytes: int | None,
) -> Writer:
    frames, whole, tail = manifest.load(path)
    if manifest.has_frame(tail):
        raise CorruptSegment(
            f"{path}/MANIFEST is damaged at byte {len(whole)}, but whole frames "
            "follow; going on would give up what they acknowledge: restore that file "
            "from a copy"
        )
    catalog = Catalog(path)
    done = catalog.done
    snapshots = catalog.logged()
    found = _tidy(path, catalog, tail)
    writer = Writer(
        path,
        lock,
        manifest.Manifest(path, frames=len(frames), size=len(whole)),
        catalog,
    )
    at = done if at is None else operator.index(at)
    frame: dict[str, Any] = {"reopened": time.time(), "progress": at}
    if at < done:
        frame["rewind"] = at
    if found:
        notes = [*catalog.meta.get("recovered", []), found]
        frame["meta"] = {"recovered": notes}
    try:
        if snapshots:
            writer.fold(snapshots, done)
        writer.write_frame(frame)
        _clear_logs(path, len(frames), torn="torn_log_bytes" in found)
        writer.keep_log(durability)
        writer.max_store_bytes = max_store_bytes
        catalog = Catalog(path)
    except BaseException:
        writer.abort()
        raise
    writer.start_from(at, catalog, recovered=found)
    return writer


def _tidy(path: Path, catalog: Catalog, tail: bytes) -> dict[str, Any]:
    """Put aside what no frame names.

    Args:
        path: The store; its lock is held.
        catalog: What its frames say.
        tail: What follows the last whole frame.

    Returns:
        What was found, as JSON; empty if nothing was.
    """
    found: dict[str, Any] = {}
    (path / "segments").mkdir(exist_ok=True)
    if tail:
        name = _free(path, "MANIFEST-tail")
        files.write_new(path / "quarantine" / name, [tail])
        found["torn_bytes"] = len(tail)
    if torn := wal.read(path, catalog.n_frames)[1]:
        found["torn_log_bytes"] = torn
    listed = {f"{number:08d}.h5" for number in catalog.files}
    old = catalog.replaced - set(catalog.files)
    replaced = {f"{number:08d}.h5" for number in old}
    for file in sorted([*path.iterdir(), *(path / "segments").iterdir()]):
        if file.name.startswith(".tmp-") and not file.is_dir():
            file.unlink()
            found["removed"] = found.get("removed", 0) + 1
        elif file.parent != path and file.name in replaced and file.is_file():
            file.unlink()  # its rows are elsewhere
        elif file.parent != path and file.name not in listed:
            name = _free(path, file.name)
            file.rename(path / "quarantine" / name)
            found.setdefault("quarantined", []).append(name)
    if damaged := _damaged(path, catalog):
        found["damaged"] = damaged
    for folder in (path / "segments", path / "quarantine"):
        with contextlib.suppress(FileNotFoundError):
            files.sync_directory(folder)
    return found


def _clear_logs(path: Path, number: int, *, torn: bool) -> None:
    """Remove logs that are folded; put aside what has more than that."""
    for file in sorted((path / "wal").glob("*")):
        folded = file.name < f"{number + (not torn):08d}.log"
        if folded and file.is_file():
            file.unlink()
        else:
            file.rename(path / "quarantine" / _free(path, file.name))


def _free(path: Path, name: str) -> str:
    """Return a name that is free in the quarantine, which is made if need be."""
    folder, tried, count = path / "quarantine", name, 0
    folder.mkdir(exist_ok=True)
    while os.path.lexists(folder / tried):
        count += 1
        tried = f"{name}.{count}"
    return tried


def _damaged(path: Path, catalog: Catalog) -> list[str]:
    """Return the listed segments that are missing or have another size."""
    damaged = []
    for number, size in catalog.files.items():
        file = path / "segments" / f"{number:08d}.h5"
        try:
            info = file.stat()
        except OSError:
            damaged.append(file.name)
            continue
        if info.st_size != size or not stat.S_ISREG(info.st_mode):
            damaged.append(file.name)
    return damaged
