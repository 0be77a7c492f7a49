"""The frames of a store, wherever it is: a directory or one file, trusted or not."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from repscope.errors import UntrustedStore
from repscope.store import manifest, packed, schema, segment, wal, walker
from repscope.store.guard import Guard
from repscope.store.index import Part

Trust = Literal["default", "untrusted"]
Frame = dict[str, Any]
_TRIES = 20  # a writer folds its log every 10 s at most


def read(path: Path, *, trust: Trust = "default") -> tuple[list[Frame], list[Frame]]:
    """Return the frames of a store, and what a log has beyond them.

    Args:
        path: A directory, or a packed file.
        trust: ``"untrusted"`` looks at every file in a child process first.

    Returns:
        Checked frames.
    """
    if not os.path.lexists(path):
        manifest.check_format(path)  # which says so
    if trust == "untrusted":
        with Guard() as guard:
            return _untrusted(path, guard)
    if path.is_dir():
        frames, logged = _directory(path)
        schema.check_all(path, frames + logged)
        return frames, logged
    return packed.frames(path), []


def _directory(path: Path) -> tuple[list[Frame], list[Frame]]:
    manifest.check_format(path)
    for _ in range(_TRIES):
        before = (path / "MANIFEST").stat() if (path / "wal").is_dir() else None
        frames = manifest.read(path)
        logged, _ = wal.read(path, len(frames))
        if before is None or _same_file(before, (path / "MANIFEST").stat()):
            wal.check_numbers(path, len(frames))
            break
        # The log was folded into a segment meanwhile: look again.
    return frames, logged


def _same_file(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_ino, a.st_size) == (b.st_ino, b.st_size)


# -- without trust -----------------------------------------------------------
def _untrusted(path: Path, guard: Guard) -> tuple[list[Frame], list[Frame]]:
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode):
        return packed.frames(path, guard=guard), []
    for folder in (path / "segments", path / "wal"):
        if os.path.lexists(folder) and not stat.S_ISDIR(folder.lstat().st_mode):
            _refuse(folder, "it is not a directory")
    for file in (path / "FORMAT", path / "MANIFEST", *(path / "wal").glob("*")):
        if os.path.lexists(file):
            _regular(file)
    frames, logged = _directory(path)
    for entry in schema.check_all(path, frames + logged):
        if entry.get("log"):
            continue
        file = manifest.locate(path, entry["number"])
        _regular(file)
        if (size := file.lstat().st_size) != entry["bytes"]:
            _refuse(file, f"{size} bytes, {entry['bytes']} in the manifest")
        try:
            guard.walk(file, expected(map(Part.from_json, entry["parts"])))
        except walker.Refused as error:
            _refuse(file, f"{error.reason}, at {error.where}")
    return frames, logged


def _regular(file: Path) -> None:
    try:
        info = file.lstat()
    except FileNotFoundError:
        _refuse(file, "it is missing")
    if not stat.S_ISREG(info.st_mode):
        _refuse(file, "it is not a regular file")
    if info.st_size > walker.MANIFEST_BYTES and file.suffix != ".h5":
        _refuse(file, f"it has {info.st_size} bytes")


def expected(parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """Return what a walk expects of the segment that holds these parts."""
    wanted: dict[str, dict[str, Any]] = {}
    n_sums = 1
    for part in parts:
        packed.add(wanted, part)
        n_sums += len(part.chunks)
    wanted[segment.CRC32] = {"shape": [n_sums], "dtype": "<u4", "filters": []}
    wanted[segment.FRAME] = {"dtype": "|u1", "filters": []}
    return wanted


def _refuse(file: Path, reason: str) -> NoReturn:
    raise UntrustedStore(
        f"{file} was not read: {reason}; a sound store never has that. It is damaged, "
        "or made to do harm"
    )
