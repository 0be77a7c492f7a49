"""``runs/a.h5``: recorded into ``runs/a.h5.rscope/`` and packed when it is closed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from pathlib import Path

from repscope.errors import StoreExists, UsageError
from repscope.store import files, packing
from repscope.store.catalog import Catalog
from repscope.store.lock import Lock, check_not_held


def is_one_file(path: Path) -> bool:
    """Return whether a run at ``path`` is to be one file in the end."""
    return path.suffix == ".h5" and not path.is_dir()


def workplace(path: Path) -> Path:
    """Return where a run that becomes the file ``path`` is recorded."""
    return path.with_name(f"{path.name}.rscope")


def located(path: Path) -> Path:
    """Return where the store known as ``path`` is now.

    The directory is there while the run is recorded, and until its file is complete;
    when both are there it is the newer one, or the same.
    """
    if is_one_file(path) and workplace(path).is_dir():
        return workplace(path)
    return path


def check_free(path: Path) -> None:
    """Refuse to record where something is.

    Raises:
        StoreExists: If the file or its directory exists.
        StoreLocked: If somebody is recording there.
    """  # noqa: DOC502 - raised by the lock
    check_not_held(workplace(path) / "LOCK")
    for taken in (path, workplace(path)):
        if os.path.lexists(taken):
            raise StoreExists(
                f"{taken} exists already and was left untouched; choose another path, "
                "or remove it if it is no longer needed"
            )


def sweep(path: Path) -> None:
    """Remove what killed writers left half done beside a file.

    Args:
        path: The file; the lock of its workplace is held.
    """
    name = glob.escape(path.name)
    for left in (
        *path.parent.glob(f".tmp-{name}-*"),
        *path.parent.glob(f".tmp-{name}.rscope-*"),
    ):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            files.discard(left)


def finish(
    path: Path,
    *,
    compression: packing.Compression = "none",
    layout: packing.Layout = "step",
) -> None:
    """Pack the workplace of a run into its file, and remove it.

    Args:
        path: The file.
        compression: As for `pack`.
        layout: As for `pack`.
    """
    work = workplace(path)
    sweep(path)
    packing.write(
        Catalog(work), path, compression=compression, layout=layout, replace=True
    )
    # Whole or gone: a reader takes the directory for the run while it has its name.
    gone = work.with_name(f".tmp-{work.name}-{os.getpid()}")
    work.rename(gone)
    with contextlib.suppress(OSError):  # should it come back, it is the same run
        files.sync_directory(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def pack(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    compression: packing.Compression = "none",
    layout: packing.Layout = "step",
) -> None:
    """Make one portable HDF5 file of a store; the store stays as it is.

    The file has what readers see: what a rewind has hidden stays behind. It is complete
    or absent: written under another name, synced, read back and compared bit for bit,
    and renamed. A run that was killed while it was recorded for ``out`` is finished.

    Args:
        path: A store.
        out: Where the file goes; it must not exist. Its name ends in ``.h5``.
        compression: ``"none"`` can be mapped, ``"gzip"`` opens everywhere, ``"zstd"``
            is smaller and faster and needs hdf5plugin, here and where it is read.
        layout: ``"step"`` keeps the rows of a step together, ``"series"`` those of a
            unit, for reading few units over many steps.

    Raises:
        UsageError: If the name of ``out`` does not end in ``.h5``.
        StoreExists: If something is at ``out``, or another run becomes it.
    """
    path, out = Path(path).absolute(), Path(out).absolute()
    if out.suffix != ".h5":
        raise UsageError(f"a packed store is a file NAME.h5, got {out}")
    if workplace(out).is_dir():
        if path not in (out, workplace(out)):
            raise StoreExists(
                f"{workplace(out)} is a run that becomes {out}: choose another path"
            )
        lock = Lock(workplace(out) / "LOCK")
        try:
            finish(out, compression=compression, layout=layout)
        finally:
            lock.release()
        return
    catalog = Catalog(located(path))
    packing.write(catalog, out, compression=compression, layout=layout)
