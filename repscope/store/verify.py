"""Look for damage in a store, without changing anything."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from repscope.errors import FormatTooNew, NotAStore, StoreError
from repscope.store import manifest, onefile, rebuild, walker
from repscope.store.catalog import Catalog
from repscope.store.chunks import StoredPart, describe
from repscope.store.contents import Trust, expected
from repscope.store.index import from_spans

if TYPE_CHECKING:
    import pandas as pd


_TRIES = 5
_MOST = 6  # streams named for one file


@dataclass(frozen=True)
class Finding:
    """What was found about one part of a store.

    Attributes:
        item: A file of the store, or several.
        state: ``"ok"``, ``"note"`` (worth knowing, nothing is lost) or ``"damaged"``.
        detail: What is there, or which layers and steps are affected.
    """

    item: str
    state: Literal["ok", "note", "damaged"]
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        path: The store.
        full: Whether every byte was compared, or sizes only.
        findings: What was found, damage included.
    """

    path: Path
    full: bool
    findings: tuple[Finding, ...]

    @property
    def damaged(self) -> bool:
        """Whether something that was acknowledged cannot be read."""
        return any(finding.state == "damaged" for finding in self.findings)

    def to_frame(self) -> pd.DataFrame:
        """Return one row for each finding: item, state, detail."""
        import pandas as pd

        rows = [(found.item, found.state, found.detail) for found in self.findings]
        return pd.DataFrame(rows, columns=["item", "state", "detail"])


def check(
    path: str | os.PathLike[str], *, full: bool = False, trust: Trust = "default"
) -> Check:
    """Look for damage in a store.

    Args:
        path: A directory or a packed file; it may be recorded at this moment.
        full: Also read every byte from the disk and compare it with its checksum, and
            the structure of every HDF5 file with the manifest.
        trust: As for `open`.

    Returns:
        What was found; nothing on the disk is changed.

    Raises:
        NotAStore: If there is no store at ``path``.
        FormatTooNew: If a newer RepScope wrote it.
    """
    where = onefile.located(Path(path))
    if not where.exists() or (where.is_dir() and not _was_store(where)):
        raise NotAStore(f"{path} is no store: there is nothing to check")
    for _ in range(_TRIES):
        try:
            catalog = Catalog(where, trust=trust)
        except FormatTooNew:
            raise
        except StoreError as error:
            return Check(Path(path), full, tuple(_unreadable(where, error)))
        found = [Finding("MANIFEST", "ok", _extent(catalog)), *_segments(catalog, full)]
        if not where.is_dir():
            break
        found += _beside(catalog)
        if Catalog(where).files == catalog.files:
            break  # else a living writer has merged segments meanwhile: look again
    return Check(Path(path), full, tuple(found))


def _was_store(path: Path) -> bool:
    return (path / "FORMAT").is_file() or (path / "segments").is_dir()


def _unreadable(path: Path, error: StoreError) -> Iterator[Finding]:
    yield Finding("MANIFEST" if path.is_dir() else path.name, "damaged", str(error))
    if path.is_dir() and (path / "segments").is_dir():
        carried = dict(rebuild.from_segments(path / "segments", skip=set()))
        steps = sum(len(from_spans(frame["steps"])) for frame in carried.values())
        what = f"carry {len(carried)} frames of {steps} records for a repair"
        yield Finding("segments", "note", what)


def _extent(catalog: Catalog) -> str:
    state = "closed" if catalog.closed else "not closed"
    steps = (
        f", steps {catalog.steps[0]} to {catalog.steps[-1]}" if catalog.steps else ""
    )
    return f"{catalog.n_frames} frames, {len(catalog.steps)} steps{steps}, {state}"


def _segments(catalog: Catalog, full: bool) -> Iterator[Finding]:
    """Yield every damaged file, and how many are not."""
    files: dict[Path, list[StoredPart]] = defaultdict(list)
    for batch in catalog.batches:
        for parts in batch.parts.values():
            for stored in parts:
                files[stored.path].append(stored)
    sound = 0
    for path, parts in files.items():
        faults = [fault for stored in parts if (fault := stored.inspect(full=full))]
        if not faults and full and path != catalog.path:
            faults = _structure(path, parts)
        if faults:
            name = str(path.relative_to(catalog.path)) if path != catalog.path else ""
            more = [f"and {len(faults) - _MOST} more"] if len(faults) > _MOST else []
            what = "; ".join(faults[:_MOST] + more)
            yield Finding(name or path.name, "damaged", what)
        sound += not faults
    nbytes = sum(parts[0].size for parts in files.values())
    how = "every byte" if full else "their sizes; full compares every byte"
    what = f"{sound} of {len(files)} sound, {nbytes / 2**20:.1f} MB (compared: {how})"
    yield Finding("segments", "ok", what)


def _structure(path: Path, parts: list[StoredPart]) -> list[str]:
    """Return in what a segment is not the HDF5 file that the manifest describes."""
    try:
        with walker.opened(str(path), follow=True) as opened:
            walker.walk(opened, expected([stored.part for stored in parts]))
    except walker.Refused as error:
        return [
            f"its HDF5 structure is damaged ({error}): other HDF5 readers cannot be "
            "trusted with it; RepScope reads it by address, and what it reads is right"
        ]
    return []


def _beside(catalog: Catalog) -> Iterator[Finding]:
    """Yield what is in the directory and not in the store."""
    path = catalog.path
    frames, _, tail = manifest.load(path)
    if tail:
        what = "a writer is at work or died, or the last frame was damaged"
        yield Finding("MANIFEST", "note", f"{len(tail)} bytes after its end: {what}")
    for seq, frame in sorted(rebuild.unnamed(path, frames).items()):
        names = ", ".join(f"{entry['number']:08d}.h5" for entry in frame["segments"])
        steps = describe(from_spans(frame["steps"]))
        if seq > len(frames):
            what = "whole, but MANIFEST has lost their frame; a repair restores it"
            yield Finding(f"segments/{names}", "damaged", f"{steps}: {what}")
        else:
            what = (
                "whole, and no frame names them (yet); a repair or resume= adopts them"
            )
            yield Finding(f"segments/{names}", "note", f"{steps}: {what}")
    if catalog.n_logged:
        what = "records are in no segment yet; they are read from the log"
        yield Finding("wal", "note", f"{catalog.n_logged} {what}")
    if kept := list((path / "quarantine").glob("*")):
        what = "files that a recovery moved aside; nothing reads them"
        yield Finding("quarantine", "note", f"{len(kept)} {what}")
