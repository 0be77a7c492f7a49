"""Go on with a store: after a kill, a power cut, or because training goes on."""

from __future__ import annotations

import contextlib
import operator
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from repscope.errors import CorruptSegment, FormatTooNew, NotAStore, UsageError
from repscope.store import files, manifest, onefile, rebuild, wal
from repscope.store.catalog import Catalog
from repscope.store.creation import check_options, create
from repscope.store.lock import Lock
from repscope.store.writer import Durability, Writer

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
        path: A store, whether it was closed or not. One that was packed into a file
            is unpacked, and packed again by `Writer.close`.
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
    one_file = path if onefile.is_one_file(path) else None
    if one_file is not None:
        path = onefile.workplace(path)
        if not path.exists():
            _unpack(one_file, path)
    manifest.check_format(path)  # no LOCK in a directory that is no store
    lock = Lock(path / "LOCK")
    try:
        with files.disk_errors(
            f"recovering the store {path}", advice="what was acknowledged is safe"
        ):
            if one_file is not None:
                onefile.sweep(one_file)
            writer = _go_on(path, lock, at, durability, max_store_bytes)
    except BaseException:
        lock.release()
        raise
    writer.one_file = one_file
    return writer


def _unpack(file: Path, path: Path) -> None:
    """Make the directory that a packed store would come from; it is whole or absent.

    Raises:
        OSError: If the operating system refuses it.
    """
    while not path.exists():
        before = file.stat()
        temp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        shutil.rmtree(temp, ignore_errors=True)
        try:
            _copy_out(file, temp)
            lock = Lock(temp / "LOCK")
            try:
                temp.rename(path)
                files.sync_directory(path.parent)
                if not os.path.samestat(before, file.stat()):
                    # Somebody went on with the run and packed it meanwhile.
                    shutil.rmtree(path)
            finally:
                lock.release()
        except OSError:
            # Another process that unpacks the same file was first, or swept ours away.
            shutil.rmtree(temp, ignore_errors=True)
            if not path.exists() and file.exists():
                raise
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


def _copy_out(file: Path, path: Path) -> None:
    catalog = Catalog(file)
    writer = create(path, meta=catalog.meta)
    try:
        for record, *_ in catalog.visible():
            writer.append(catalog.snapshot(record, list(catalog.last)))
        writer.progress = catalog.done
        writer.close()
    finally:
        writer.abort()


def is_stillborn(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a directory that a writer died in before its start."""
    path = onefile.located(Path(path))
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


def repair(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Put right what can be put right, and say what that was.

    A manifest that is damaged or missing is made again from the segments, whole
    segments that it does not name are adopted, what a dead writer left half done is put
    aside as by `reopen`, and what a log holds is committed. Damaged rows stay as they
    are: reading them raises `CorruptSegment`, and only a copy brings them back.

    Args:
        path: A store that nobody is writing to. A packed file has nothing to repair.

    Returns:
        What was found, as JSON; empty if nothing was.

    Raises:
        NotAStore: If ``path`` is no store at all.
    """
    path = onefile.located(Path(path).absolute())
    found: dict[str, Any] = {}
    if path.is_file():
        Catalog(path)
        return found
    if not (path / "segments").is_dir() and not (path / "FORMAT").is_file():
        raise NotAStore(f"{path} has neither FORMAT nor segments/: it is no store")
    lock = Lock(path / "LOCK")
    try:
        with files.disk_errors(f"repairing {path}", advice="nothing was removed"):
            if not _is_whole(path):
                found = rebuild.rebuild(path)
                _renew_format(path)
            closed = Catalog(path).closed
            writer = _go_on(path, lock, None, "batch", None, repaired=True)
            found |= writer.recovered
            (writer.close if closed and writer.recovered else writer.abort)()
    except BaseException:
        lock.release()
        raise
    return found


def _is_whole(path: Path) -> bool:
    """Return whether the manifest names all that the segments carry.

    Raises:
        FormatTooNew: If a newer RepScope wrote it.
    """
    try:
        frames, _, _ = manifest.load(path)
        wal.check_numbers(path, len(frames))
    except FormatTooNew:
        raise
    except (NotAStore, CorruptSegment):
        return False
    # What comes next after its frames is adopted; more than that no crash leaves.
    return not any(seq > len(frames) for seq in rebuild.unnamed(path, frames))


def _renew_format(path: Path) -> None:
    try:
        manifest.check_format(path)
    except NotAStore:
        files.discard(path / "FORMAT")
        manifest.write_format(path)


def _go_on(
    path: Path,
    lock: Lock,
    at: int | None,
    durability: Durability,
    max_store_bytes: int | None,
    *,
    repaired: bool = False,
) -> Writer:
    frames, whole, tail = manifest.load(path)
    wal.check_numbers(path, len(frames))
    found = _set_tail_aside(path, tail)
    writable = manifest.Manifest(path, frames=len(frames), size=len(whole))
    try:
        if adopted := _adoptable(path, frames):
            writable.write(adopted)
            writable.sync()
            found["adopted"] = [entry["number"] for entry in adopted["segments"]]
        catalog = Catalog(path)
        found |= _tidy(path, catalog)
        writer = Writer(path, lock, writable, catalog)
    except BaseException:
        writable.close()
        raise
    done = catalog.done
    at = done if at is None else operator.index(at)
    frame: dict[str, Any] = {"progress": at}
    frame["repaired" if repaired else "reopened"] = time.time()
    if at < done:
        frame["rewind"] = at
    if found:
        notes = [*catalog.meta.get("recovered", []), found]
        frame["meta"] = {"recovered": notes}
    try:
        if snapshots := catalog.logged():
            writer.fold(snapshots, done)
        if found or not repaired:
            writer.write_frame(frame)
        _clear_logs(path, catalog.n_frames, torn="torn_log_bytes" in found)
        writer.keep_log(durability)
        writer.max_store_bytes = max_store_bytes
        catalog = Catalog(path)
    except BaseException:
        writer.abort()
        raise
    writer.start_from(at, catalog, recovered=found)
    return writer


def _set_tail_aside(path: Path, tail: bytes) -> dict[str, Any]:
    if not tail:
        return {}
    name = files.set_aside(path, "MANIFEST-tail")
    files.write_new(path / "quarantine" / name, [tail])
    return {"torn_bytes": len(tail)}


def _adoptable(path: Path, frames: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the frame of segments that a dead writer had finished, but not named.

    Raises:
        CorruptSegment: If more than one frame is missing: no crash leaves that.
    """
    found = rebuild.unnamed(path, frames)
    if any(seq > len(frames) for seq in found):
        raise CorruptSegment(
            f"{path}/MANIFEST has lost its end: it has {len(frames)} frames, and "
            f"segments carry frames up to number {max(found)}; `repscope check "
            f"--repair {path}` restores them"
        )
    frame = found.get(len(frames))
    return None if frame is None else {k: v for k, v in frame.items() if k != "run"}


def _tidy(path: Path, catalog: Catalog) -> dict[str, Any]:
    """Put aside what no frame names.

    Args:
        path: The store; its lock is held.
        catalog: What its frames say.

    Returns:
        What was found, as JSON; empty if nothing was.
    """
    found: dict[str, Any] = {}
    (path / "segments").mkdir(exist_ok=True)
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
            name = files.set_aside(path, file.name, file=file)
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
            files.set_aside(path, file.name, file=file)


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
