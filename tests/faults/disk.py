"""A disk that forgets: what may be on it after a kill or a power cut."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from faults.syscalls import Call
from faults.workload import age


class File:
    """Bytes, and every earlier content that a power cut may still bring back.

    After a failed fsync nothing is certain any more, whatever later ones return.
    """

    def __init__(self) -> None:
        self.versions = [b""]
        self._broken = False

    def write(self, offset: int, data: bytes) -> None:
        old = self.versions[-1].ljust(offset, b"\0")
        self.versions.append(old[:offset] + data + old[offset + len(data) :])

    def truncate(self, size: int) -> None:
        self.versions.append(self.versions[-1][:size].ljust(size, b"\0"))

    def sync(self, *, failed: bool) -> None:
        self._broken |= failed
        if not self._broken:
            del self.versions[:-1]

    def after_power_cut(self, rng: random.Random) -> bytes:
        """Return any size and any mixture of pages since the last fsync."""
        size = len(rng.choice(self.versions))
        page = rng.choice((512, 4096))
        latest = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        whole = bytearray(size)
        for start in range(0, size, page):
            choice = -1 if rng.random() < latest else rng.randrange(len(self.versions))
            piece = self.versions[choice][start : min(start + page, size)]
            whole[start : start + len(piece)] = piece
        return bytes(whole)


class Folder:
    """Names, and what each may still stand for after a power cut."""

    def __init__(self) -> None:
        self.names: dict[str, list[File | Folder | None]] = {}

    def get(self, name: str) -> File | Folder | None:
        return self.names.get(name, [None])[-1]

    def set(self, name: str, node: File | Folder | None) -> None:
        self.names.setdefault(name, [None]).append(node)

    def sync(self, *, failed: bool) -> None:
        if not failed:
            for versions in self.names.values():
                del versions[:-1]


class Disk:
    """The folder of a recorded program, rebuilt call by call.

    Args:
        root: Where the folder was.

    Attributes:
        acked: The latest number that the program wrote to ``acks``; -1 before.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.top = Folder()
        self.acked = -1
        self._opened: dict[int, tuple[File | Folder, int]] = {}

    def _find(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).relative_to(self._root).parts
        folder = self.top
        for parent in parents:
            inner = folder.get(parent)
            assert isinstance(inner, Folder), path
            folder = inner
        return folder, name

    def apply(self, call: Call, *, cut: int | None = None) -> None:
        """Do what a call did; of a write only the first ``cut`` bytes."""
        getattr(self, f"_{call.name}")(call._replace(data=call.data[:cut]))

    def _mkdir(self, call: Call) -> None:
        folder, name = self._find(call.path)
        folder.set(name, Folder())

    def _unlink(self, call: Call) -> None:
        folder, name = self._find(call.path)
        folder.set(name, None)

    def _rename(self, call: Call) -> None:
        (source, old), (target, new) = self._find(call.path), self._find(call.to)
        node = source.get(old)
        target.set(new, node)
        source.set(old, None)

    def _open(self, call: Call) -> None:
        self._opened[call.fd] = (self._node(call), 0)

    def _node(self, call: Call) -> File | Folder:
        if Path(call.path) == self._root:
            return self.top
        folder, name = self._find(call.path)
        node = folder.get(name)
        if node is None:
            assert "O_CREAT" in call.flags, call
            folder.set(name, node := File())
        if "O_TRUNC" in call.flags and isinstance(node, File):
            node.truncate(0)
        return node

    def _seek(self, call: Call) -> None:
        self._opened[call.fd] = (self._opened[call.fd][0], call.offset or 0)

    def _truncate(self, call: Call) -> None:
        file = self._opened[call.fd][0]
        assert isinstance(file, File)
        file.truncate(call.offset or 0)

    def _sync(self, call: Call) -> None:
        self._opened[call.fd][0].sync(failed=call.failed)

    def _write(self, call: Call) -> None:
        file, at = self._opened[call.fd]
        assert isinstance(file, File)
        if call.offset is not None:
            file.write(call.offset, call.data)
            return
        file.write(at, call.data)
        self._opened[call.fd] = (file, at + len(call.data))
        if file is self.top.get("acks") and len(call.data) == 8:
            (self.acked,) = struct.unpack("<q", call.data)


def materialize(folder: Folder, path: Path, rng: random.Random | None) -> None:
    """Put a state of the disk into a real folder.

    Args:
        folder: What the calls made of it.
        path: An existing empty folder.
        rng: Chooses what a power cut left; None for a kill, which loses no call.
    """
    for name, versions in folder.names.items():
        node = rng.choice(versions) if rng else versions[-1]
        here = path / name
        if isinstance(node, Folder):
            here.mkdir()
            materialize(node, here, rng)
        elif node is not None:
            here.write_bytes(node.after_power_cut(rng) if rng else node.versions[-1])
            age(here)


def cuts(call: Call, rng: random.Random, n: int) -> list[int]:
    """Return at which bytes a kill may end a write: its ends, and some between."""
    size = len(call.data)
    if call.name != "write" or not size:
        return []
    inside = range(1, size)
    return sorted(rng.sample(inside, min(n, len(inside))))
