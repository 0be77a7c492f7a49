"""Look at an HDF5 file without trusting it: an allow-list, and nothing is followed.

HDF5 files can name other files, declare sizes that nobody has, and make the library
load plugins, even for the names of a group. So plugins are switched off meanwhile, and
every object is compared with what a RepScope store may have, by reading its header
only: no data goes through the library.

This file imports nothing of ours. Run as a program it answers requests, one JSON a
line, and the process that asked survives whatever a hostile file does to the library.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

MAGIC = b"\x89HDF\r\n\x1a\n"
FILTERS = frozenset({1, 2, 3, 32015})  # deflate, shuffle, fletcher32, Zstandard
MOST_OBJECTS = 10_000  # in a file of which nothing is known
DEEPEST = 32
CHUNK_BYTES = 2**26
MOST_CHUNKS = 10**6
MOST_ATTRIBUTES, ATTRIBUTE_BYTES = 64, 2**16
EXPANSION, FREE_BYTES = 1100, 2**20  # no deflate stream expands more
ZSTD, ZSTD_EXPANSION = 32015, 2**15  # four bytes can stand for a block of 128 KiB
MANIFEST_BYTES = 2**28
MEMORY, SECONDS = 2**31, 60
_ODD_BYTES = frozenset({*range(32), ord("/"), 127})
_NUMBERS = frozenset({h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM})
_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError)  # what h5py makes

Expected = Mapping[str, Mapping[str, Any]]


class Refused(Exception):
    """A file has something that a store never has.

    Args:
        reason: What.
        where: Which object of the file.
    """

    def __init__(self, reason: str, where: str = "/") -> None:
        self.reason, self.where = _printable(reason), _printable(where)
        super().__init__(f"{self.where}: {self.reason}")


def _printable(text: str) -> str:
    """Return the start of a text, without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:300])


@contextlib.contextmanager
def _no_plugins() -> Iterator[None]:
    """Let HDF5 find no plugin, and no other thread use h5py meanwhile."""
    with h5py._objects.phil:
        paths = [h5py.h5pl.get(i) for i in range(h5py.h5pl.size())]
        for _ in paths:
            h5py.h5pl.remove(0)
        try:
            yield
        finally:
            for path in paths:
                h5py.h5pl.append(path)


@contextlib.contextmanager
def opened(path: str, *, follow: bool) -> Iterator[h5py.h5f.FileID]:
    """Open a regular HDF5 file for reading.

    Args:
        path: The file.
        follow: Whether ``path`` may be a symbolic link.

    Yields:
        The file, of which only headers were read.

    Raises:
        Refused: If it is none.
    """
    info = Path(path).stat(follow_symlinks=follow)
    if not stat.S_ISREG(info.st_mode):
        raise Refused("it is not a regular file")
    with Path(path).open("rb", buffering=0) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise Refused("it does not begin as an HDF5 file does")
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_file_locking(False, True)
    with _no_plugins():
        try:
            found = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, access)
        except _FAULTS as error:
            raise Refused(f"HDF5 cannot open it ({error})") from None
        try:
            yield found
        except _FAULTS as error:
            raise Refused(f"HDF5 cannot read its structure ({error})") from None
        finally:
            found.close()


def manifest(file: h5py.h5f.FileID) -> tuple[int, int] | None:
    """Return where the bytes of the dataset ``@manifest`` are, and how many.

    Args:
        file: From `opened`.

    Returns:
        Offset and size, or None if there is no such dataset.
    """
    root, name = h5py.h5g.open(file, b"/"), b"@manifest"
    _group(root, "/")
    if not root.links.exists(name):
        return None
    _hard(root, name, "/@manifest")
    dataset = h5py.h5d.open(root, name)
    size = math.prod(dataset.shape)
    _dataset(dataset, "/@manifest", file.get_filesize())
    expected = {"shape": [size], "dtype": "|u1", "chunk": None, "filters": []}
    _compare(dataset, expected, "/@manifest")
    if size > MANIFEST_BYTES:
        _refuse(f"a manifest of {size} bytes", "/@manifest")
    return dataset.get_offset() or 0, size


def walk(file: h5py.h5f.FileID, expected: Expected | None = None) -> None:
    """Refuse a file that has anything but what it may have.

    Args:
        file: From `opened`.
        expected: Maps the path of every dataset to ``shape``, ``dtype``, ``chunk`` (a
            shape, or None), ``filters`` (their numbers) and ``stored`` (bytes in the
            file), as far as they are known; None when nothing is known of the file.
    """
    groups = None if expected is None else _groups(expected)
    seen: set[Any] = set()
    file_bytes, total = file.get_filesize(), 0
    waiting = [("", h5py.h5g.open(file, b"/"))]
    _attributes(waiting[0][1], "/")
    while waiting:
        path, group = waiting.pop()
        for name, found in _members(group, path, groups, seen):
            if isinstance(found, h5py.h5g.GroupID):
                if groups is not None and name not in groups:
                    _refuse("a group where a dataset should be", name)
                waiting.append((name, found))
                continue
            _dataset(found, name, file_bytes)
            if (total := total + found.get_storage_size()) > file_bytes:
                _refuse("bytes that more than one dataset has", name)
            if expected is not None:
                if name not in expected:
                    _refuse("a dataset where a group should be", name)
                _compare(found, expected[name], name)


def _groups(expected: Expected) -> dict[str, set[str]]:
    """Return what every group should hold."""
    groups: dict[str, set[str]] = {"": set()}
    for name in expected:
        if name.count("/") >= DEEPEST:
            _refuse("a name that leads too deep", name)
        parts = name.split("/")
        for depth in range(len(parts)):
            inner = groups.setdefault("/".join(parts[:depth]), set())
            inner.add("/".join(parts[: depth + 1]))
    return groups


def _members(
    group: h5py.h5g.GroupID,
    path: str,
    groups: Mapping[str, set[str]] | None,
    seen: set[Any],
) -> Iterator[tuple[str, Any]]:
    """Yield every object of a group, opened, none of them twice."""
    _group(group, path or "/")
    allowed = MOST_OBJECTS - len(seen) if groups is None else len(groups[path])
    names = _names(group, allowed)
    if len(names) > allowed or path.count("/") >= DEEPEST:
        _refuse(f"more than {allowed} objects, or too deep", path or "/")
    if groups is not None and len(names) < allowed:
        _refuse(f"{len(names)} objects, {allowed} should be there", path or "/")
    for raw in names:
        name = f"{path}/{raw.decode('utf-8', 'surrogateescape')}".lstrip("/")
        if _ODD_BYTES & {*raw} or not raw.strip(b"."):
            _refuse("a name that is none", name)
        if groups is not None and name not in groups[path]:
            _refuse("an object that should not be there", name)
        _hard(group, raw, name)
        kind = h5py.h5g.get_objinfo(group, raw)
        if (mark := (kind.fileno, kind.objno)) in seen:
            _refuse("an object with two names", name)
        seen.add(mark)
        if kind.type == h5py.h5g.GROUP:
            found = h5py.h5g.open(group, raw)
        elif kind.type == h5py.h5g.DATASET:
            found = h5py.h5d.open(group, raw)
        else:
            _refuse("neither a group nor a dataset", name)
        _attributes(found, name)
        yield name, found


def _names(group: h5py.h5g.GroupID, most: int) -> list[bytes]:
    """Return the names in a group, or ``most`` of them and one more.

    All at once: to find one by its number, HDF5 reads them all.
    """
    names: list[bytes] = []

    def note(raw: bytes) -> bool | None:
        names.append(raw)
        return len(names) > most or None  # anything but None ends it

    group.links.iterate(note, order=h5py.h5.ITER_NATIVE)
    return names


def _group(group: h5py.h5g.GroupID, name: str) -> None:
    """Refuse a group whose names are compressed, before HDF5 reads one."""
    plan = group.get_create_plist()
    as_dataset = h5py.h5p.PropDCID(plan.id)  # h5py asks no other for its filters
    h5py.h5i.inc_ref(plan)  # both give it back
    if as_dataset.get_nfilters():
        _refuse("names that are compressed", name)


def _hard(group: h5py.h5g.GroupID, raw: bytes, name: str) -> None:
    if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
        _refuse("a link to somewhere else", name)


def _attributes(owner: Any, name: str) -> None:
    count = h5py.h5a.get_num_attrs(owner)
    if count > MOST_ATTRIBUTES:
        _refuse(f"{count} attributes, {MOST_ATTRIBUTES} at most", name)
    for i in range(count):
        attribute = h5py.h5a.open(owner, index=i)
        kind = attribute.get_type()
        fixed = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str()
        if kind.get_class() not in _NUMBERS and not fixed:
            _refuse("an attribute that is no number and no plain text", name)
        if attribute.get_storage_size() > ATTRIBUTE_BYTES:
            _refuse(f"an attribute of {attribute.get_storage_size()} bytes", name)


def _dataset(dataset: h5py.h5d.DatasetID, name: str, file_bytes: int) -> None:
    """Refuse what no store has, whatever it is called."""
    kind, space = dataset.get_type(), dataset.get_space()
    if kind.get_class() not in _NUMBERS or kind.get_size() > 8:
        _refuse("elements that are no plain numbers", name)
    if space.get_simple_extent_type() != h5py.h5s.SIMPLE:
        _refuse("no simple array", name)
    plan = dataset.get_create_plist()
    layout = plan.get_layout()
    if layout not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        _refuse("data that is in other files", name)
    if plan.get_external_count():
        _refuse("data that is in other files", name)
    shape, itemsize = dataset.shape, kind.get_size()
    if layout == h5py.h5d.CHUNKED:
        _chunks(plan.get_chunk(), shape, itemsize, name)
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if not FILTERS.issuperset(filters):
        _refuse(f"filters {filters}, one of which needs a plugin", name)
    stored = dataset.get_storage_size()
    declared = math.prod(shape) * itemsize
    if stored > file_bytes:
        _refuse(f"{stored} bytes in a file of {file_bytes}", name)
    most = ZSTD_EXPANSION if ZSTD in filters else EXPANSION
    if declared > max(FREE_BYTES, most * stored):
        _refuse(f"{declared} bytes declared, {stored} stored", name)


def _chunks(
    chunk: tuple[int, ...], shape: tuple[int, ...], itemsize: int, name: str
) -> None:
    if len(chunk) != len(shape):
        _refuse(f"chunks of rank {len(chunk)} in an array of rank {len(shape)}", name)
    if math.prod(chunk) * itemsize > CHUNK_BYTES:
        _refuse(f"chunks of {math.prod(chunk) * itemsize} bytes", name)
    count = math.prod(
        -(-n // max(side, 1)) for n, side in zip(shape, chunk, strict=True)
    )
    if count > MOST_CHUNKS:
        _refuse(f"{count} chunks", name)


def _compare(dataset: h5py.h5d.DatasetID, want: Mapping[str, Any], name: str) -> None:
    """Refuse a dataset that is not as the manifest says."""
    plan = dataset.get_create_plist()
    chunked = plan.get_layout() == h5py.h5d.CHUNKED
    found = {
        "shape": list(dataset.shape),
        "chunk": list(plan.get_chunk()) if chunked else None,
        "filters": [plan.get_filter(i)[0] for i in range(plan.get_nfilters())],
    }
    for what, value in found.items():
        if value != want.get(what, value):
            _refuse(f"{what} {value}, {want[what]} in the manifest", name)
    if dataset.dtype != np.dtype(want["dtype"]):
        _refuse(f"elements {dataset.dtype}, {want['dtype']} in the manifest", name)
    stored = dataset.get_storage_size()
    if want.get("stored", stored) != stored:
        _refuse(f"{stored} bytes stored, {want['stored']} in the manifest", name)


def _refuse(reason: str, where: str) -> NoReturn:
    raise Refused(reason, where)


# -- as a program -------------------------------------------------------------
def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        with opened(request["path"], follow=False) as file:
            if "expected" not in request:
                return {"manifest": manifest(file)}
            walk(file, request["expected"])
            return {}
    except Refused as error:
        return {"refused": [error.reason, error.where]}
    except OSError as error:
        return {"refused": [str(error), "/"]}


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        answer = _answer(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
