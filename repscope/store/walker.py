"""Look at an HDF5 file without trusting it: an allow-list, and nothing is followed.

HDF5 files can name other files, declare sizes that nobody has, and make the library
load plugins. So every object is compared with what a RepScope store may have, by
reading its header only: no data goes through the library.

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
MANIFEST_BYTES = 2**28
MEMORY, SECONDS = 2**31, 60
_NUMBERS = frozenset({h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM})

Expected = Mapping[str, Mapping[str, Any]]


class Refused(Exception):
    """A file has something that a store never has.

    Args:
        reason: What.
        where: Which object of the file.
    """

    def __init__(self, reason: str, where: str = "/") -> None:
        super().__init__(f"{where}: {reason}")
        self.reason, self.where = reason, where


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
    try:
        found = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, access)
    except (OSError, RuntimeError, KeyError) as error:
        raise Refused(f"HDF5 cannot open it ({error})") from None
    try:
        yield found
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
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
    groups: dict[str, set[str]] | None = None
    if expected is not None:
        groups = {}
        for name in expected:
            parts = name.split("/")
            for depth in range(len(parts)):
                inner = groups.setdefault("/".join(parts[:depth]), set())
                inner.add("/".join(parts[: depth + 1]))
    seen: set[Any] = set()
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
            _dataset(found, name, file.get_filesize())
            if expected is not None:
                if name not in expected:
                    _refuse("a dataset where a group should be", name)
                _compare(found, expected[name], name)


def _members(
    group: h5py.h5g.GroupID,
    path: str,
    groups: Mapping[str, set[str]] | None,
    seen: set[Any],
) -> Iterator[tuple[str, Any]]:
    """Yield every object of a group, opened, none of them twice."""
    count = group.get_num_objs()
    allowed = MOST_OBJECTS - len(seen) if groups is None else len(groups[path])
    if count > allowed or path.count("/") >= DEEPEST:
        _refuse(f"{count} objects, {allowed} at most", path or "/")
    if groups is not None and count < allowed:
        _refuse(f"{count} objects, {allowed} should be there", path or "/")
    for i in range(count):
        raw = group.get_objname_by_idx(i)
        name = f"{path}/{raw.decode('ascii', 'backslashreplace')}".lstrip("/")
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
    stored = dataset.get_storage_size()
    if layout == h5py.h5d.CHUNKED:
        _chunks(plan.get_chunk(), shape, itemsize, name)
    declared = math.prod(shape) * itemsize
    if stored > file_bytes:
        _refuse(f"{stored} bytes in a file of {file_bytes}", name)
    if declared > max(FREE_BYTES, EXPANSION * stored):
        _refuse(f"{declared} bytes declared, {stored} stored", name)
    for i in range(plan.get_nfilters()):
        if (number := plan.get_filter(i)[0]) not in FILTERS:
            _refuse(f"filter {number}, which needs a plugin", name)


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
    for number in reversed(range(h5py.h5pl.size())):
        h5py.h5pl.remove(number)
    for line in sys.stdin:
        answer = _answer(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
