"""Read the contents of a packed store: one HDF5 file with a manifest inside."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repscope.errors import CorruptSegment, FormatTooNew, NotAStore, UntrustedStore
from repscope.store import manifest, schema, walker
from repscope.store.filters import PIPELINES
from repscope.store.guard import Guard
from repscope.store.index import STORED_AS, Part
from repscope.store.names import path_of

VERSION = 1
INDEX = "@index"


def frames(path: Path, *, guard: Guard | None = None) -> list[dict[str, Any]]:
    """Return the frames of a packed store, after a look at the whole file.

    Args:
        path: A file.
        guard: The child process that looks at it; None looks in this process.

    Returns:
        Frames as in ``MANIFEST``; the segments in them are this file.

    Raises:
        NotAStore: If RepScope did not pack it.
        UntrustedStore: If it has anything that a packed store never has.
    """
    try:
        if guard is not None:
            place = guard.manifest(path)
            found = None if place is None else _frames(path, *place)
            guard.walk(path, None if found is None else expected(found, place))
        else:
            found = _look(path)
    except walker.Refused as error:
        raise UntrustedStore(
            f"{path} was not read: {error.reason}, at {error.where}; a store that "
            "RepScope packed never has that. It is damaged, made by something else, or "
            "made to do harm"
        ) from None
    if found is None:
        raise NotAStore(
            f"{path} is an HDF5 file, but none that RepScope packed: it has no "
            "@manifest"
        )
    return found


def _look(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        raise NotAStore(f"{path} is no store: neither a directory nor a regular file")
    with path.open("rb", buffering=0) as file:
        if file.read(len(walker.MAGIC)) != walker.MAGIC:
            raise NotAStore(
                f"{path} is a file, but no HDF5 file: a store is the directory that a "
                "Recorder made, or one .h5 file that `repscope pack` made"
            )
    with walker.opened(str(path), follow=True) as opened:
        place = walker.manifest(opened)
    found = None if place is None else _frames(path, *place)
    with walker.opened(str(path), follow=True) as opened:
        walker.walk(opened, None if found is None else expected(found, place))
    return found


def _frames(path: Path, offset: int, size: int) -> list[dict[str, Any]]:
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
        file_bytes = os.fstat(file.fileno()).st_size
    found = manifest.decode_all(data, path)
    head = found[0] if found else None
    version = head.get("packed") if isinstance(head, dict) else None
    if found is None or type(version) is not int:
        raise CorruptSegment(
            f"{path} has a damaged @manifest: nothing in it can be trusted. Restore "
            "the file from a copy"
        )
    if version > VERSION:
        raise FormatTooNew(
            f"{path} has format {version} of packed stores, this RepScope knows up to "
            f"{VERSION}; upgrade repscope to read it"
        )
    for entry in schema.check_all(path, found, file_bytes=file_bytes):
        entry["bytes"] = file_bytes
    return found


def expected(
    frames: Iterable[dict[str, Any]], manifest_place: tuple[int, int] | None
) -> dict[str, dict[str, Any]]:
    """Return what the file must hold, and nothing else.

    Args:
        frames: Checked.
        manifest_place: Where ``@manifest`` is, and how long.

    Raises:
        Refused: If the manifest gives two parts one dataset.
    """  # noqa: DOC502 - raised by add
    wanted: dict[str, dict[str, Any]] = {}
    if manifest_place is not None:
        wanted["@manifest"] = _plain([manifest_place[1]], "|u1")
    for frame in frames:
        for entry in frame.get("segments", ()):
            for part in (Part.from_json(part) for part in entry["parts"]):
                add(wanted, part)
                name = f"{INDEX}/{path_of(part.key)}"
                wanted[name] = _plain([len(part.where[0]), 3], "<i8")
    return wanted


def add(wanted: dict[str, dict[str, Any]], part: Part) -> None:
    """Note what a walk expects of the dataset of a part.

    Raises:
        Refused: If it is the dataset of another one.
    """
    if part.name in wanted:
        raise walker.Refused("one dataset, of which the manifest says two", part.name)
    sizes = [chunk[2] if len(chunk) > 2 else part.chunk_bytes for chunk in part.chunks]
    wanted[part.name] = {
        "shape": list(part.shape),
        "dtype": STORED_AS[part.torch_dtype],
        "chunk": list(part.chunk_shape) if part.chunks else None,
        "filters": list(PIPELINES[part.filter]),
        "stored": sum(sizes),
    }


def _plain(shape: list[int], dtype: str) -> dict[str, Any]:
    """Return what a walk expects of a contiguous dataset."""
    return {"shape": shape, "dtype": dtype, "chunk": None, "filters": []}
