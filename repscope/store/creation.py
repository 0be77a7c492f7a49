"""Make a store, or remove one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repscope.errors import StoreExists, UsageError
from repscope.store import files, manifest, onefile
from repscope.store.facts import as_json
from repscope.store.lock import Lock, check_not_held
from repscope.store.writer import Durability, Writer


def create(
    path: str | os.PathLike[str],
    *,
    meta: Mapping[str, object],
    durability: Durability = "batch",
    max_store_bytes: int | None = None,
) -> Writer:
    """Make a new store and return its writer.

    Args:
        path: Where the directory of the store will be; parents are made. A name that
            ends in ``.h5`` becomes one file: `Writer.close` packs the directory
            ``<path>.rscope`` into it.
        meta: JSON-able facts about the run.
        durability: ``"append"`` makes every `Writer.append` durable before it returns;
            ``"batch"`` leaves that to `Writer.commit`.
        max_store_bytes: A snapshot that would make the store larger is refused with
            `StoreFull`; those before it can still be committed.

    Returns:
        A writer that holds the lock of the store until `Writer.close`.

    Raises:
        StoreLocked: If somebody is recording there.
        StoreExists: If anything else is at ``path``; it is left as it was.
    """  # noqa: DOC502 - raised by the lock
    # Absolute: a script may change its folder while it is recorded.
    path, facts = Path(path).absolute(), as_json(meta)
    check_options(durability, max_store_bytes)
    one_file = path if onefile.is_one_file(path) else None
    if one_file is not None:
        onefile.check_free(path)
        path = onefile.workplace(path)
    try:
        files.make_directory(path)
    except FileExistsError as error:
        check_not_held(path / "LOCK")
        raise StoreExists(
            f"{error.filename} exists already and was left untouched; choose another "
            "path, or remove it if it is no longer needed"
        ) from None
    try:
        with files.disk_errors(f"making the store {path}", advice="nothing is left"):
            writer = _begin(path, facts, durability)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    writer.max_store_bytes = max_store_bytes
    writer.one_file = one_file
    if one_file is not None:
        onefile.sweep(one_file)
    return writer


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether something is where a store would be, or is recorded."""
    path = Path(path)
    return os.path.lexists(path) or os.path.lexists(onefile.located(path))


def _begin(path: Path, facts: Mapping[str, Any], durability: Durability) -> Writer:
    """Return the writer of a store in a new directory."""
    lock = Lock(path / "LOCK")
    try:
        manifest.write_format(path)
        (path / "segments").mkdir()
        frames = manifest.Manifest(path)
    except BaseException:
        lock.release()
        raise
    writer = Writer(path, lock, frames)
    try:
        writer.write_frame({"created": time.time(), "meta": dict(facts)})
        files.sync_directory(path)
        writer.keep_log(durability)
    except BaseException:
        writer.abort()
        raise
    return writer


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a store that nobody is writing to, for example an interrupted one.

    While another process holds its lock the store is left untouched, and `StoreLocked`
    says who that is.

    Args:
        path: The directory of the store, or the file that it is packed into.
    """
    directory = onefile.located(Path(path))
    if directory.is_dir():
        lock = Lock(directory / "LOCK")
        try:
            shutil.rmtree(directory)
        finally:
            lock.release()
    if onefile.is_one_file(Path(path)):
        Path(path).unlink(missing_ok=directory != Path(path))


def check_options(durability: str, max_store_bytes: int | None) -> None:
    """Refuse options that cannot be meant.

    Args:
        durability: ``"batch"`` or ``"append"``.
        max_store_bytes: A positive number or None.

    Raises:
        UsageError: If they are anything else.
    """
    if durability not in ("batch", "append"):
        raise UsageError(f"durability is 'batch' or 'append', got {durability!r}")
    if max_store_bytes is not None and max_store_bytes <= 0:
        raise UsageError(f"max_store_bytes is above 0, got {max_store_bytes!r}")
