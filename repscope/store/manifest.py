"""The manifest: what is in the store, as frames that are whole or absent.

A frame is ``magic, seq, length`` (16 bytes, little-endian), ``length`` bytes of JSON,
and the crc32 of all of these. What no whole frame names was never acknowledged.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repscope.errors import CorruptSegment, FormatTooNew, NotAStore
from repscope.store import files

VERSION = 1
_REPAIR = "`repscope check --repair {}`"
_FORMAT = "RepScope store\nversion "
MAGIC = b"RSF1"
_LONGEST_LOOK = 64
_HEAD = struct.Struct("<4sQI")
_CRC = struct.Struct("<I")

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync


def sync_data(fd: int) -> None:
    """Make what was written to a file durable."""
    _sync_data(fd)


# -- FORMAT ------------------------------------------------------------------
def write_format(path: Path) -> None:
    """Create the file ``FORMAT`` of a new store at ``path``."""
    files.write_new(path / "FORMAT", [f"{_FORMAT}{VERSION}\n".encode()])


def check_format(path: Path) -> None:
    """Refuse what is no store, or a newer one.

    Args:
        path: The store.

    Raises:
        NotAStore: If ``path`` holds no store.
        FormatTooNew: If a newer RepScope wrote it.
    """
    if not path.exists():
        raise NotAStore(f"{path} does not exist; check the path of the run")
    if not path.is_dir():
        raise NotAStore(
            f"{path} is a file; a store is the directory that a Recorder made"
        )
    for name in ("FORMAT", "MANIFEST"):
        if not (path / name).is_file():
            raise NotAStore(
                f"{path} has no {name}: it is no store, or one whose creation was cut "
                "short before anything was recorded; if segments/ has files, "
                f"{_REPAIR.format(path)} makes it again"
            )
    with (path / "FORMAT").open("rb") as file:
        text = file.read(64).decode("ascii", "replace")
    found = text.removeprefix(_FORMAT).strip()
    if not text.startswith(_FORMAT) or not found.isdigit():
        raise NotAStore(f"{path}/FORMAT does not say that this is a RepScope store")
    if int(found) > VERSION:
        raise FormatTooNew(
            f"{path} has store format {found}, this RepScope knows up to {VERSION}; "
            "upgrade repscope to read it"
        )


def locate(path: Path, number: int, *, log: bool = False) -> Path:
    """Return where a store has a segment, or the log since a frame."""
    folder, ending = ("wal", "log") if log else ("segments", "h5")
    return path / folder / f"{number:08d}.{ending}"


def follow(
    about: Mapping[str, Any], frame: Mapping[str, Any], seq: int
) -> dict[str, Any]:
    """Return what is known of a run after one more frame: every segment carries it.

    Args:
        about: What was known before; empty at the start.
        frame: A frame.
        seq: Its number.
    """
    changing = {"created", "rewind", "reopened"}
    if about and not frame.keys() & changing and not frame.get("meta"):
        return dict(about)
    rewinds = list(about.get("rewinds", ()))
    if "rewind" in frame:
        rewinds.append([seq, frame["rewind"]])
    meta = about.get("meta", {}) | frame.get("meta", {})
    if "reopened" in frame:
        meta.pop("interrupted", None)  # it went on
    return {
        "created": frame.get("created", about.get("created", 0.0)),
        "meta": meta,
        "rewinds": rewinds,
    }


# -- frames ------------------------------------------------------------------
def encode(seq: int, body: dict[str, Any]) -> bytes:
    """Return the bytes of one frame."""
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    data = _HEAD.pack(MAGIC, seq, len(text)) + text
    return data + _CRC.pack(zlib.crc32(data))


def decode(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the bodies of the whole frames, up to the first that is not.

    Args:
        data: The content of a manifest; its tail may be torn.

    Yields:
        One decoded JSON object per frame, in order.
    """
    for body, _ in scan(data):
        yield body


def scan(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield what `decode` does, each with the offset of the byte after the frame."""
    offset = expected = 0
    while (found := _whole(data, offset)) is not None:
        seq, text, offset = found
        if seq != expected:
            return
        expected += 1
        yield json.loads(text), offset


def _whole(data: bytes, at: int) -> tuple[int, bytes, int] | None:
    """Return number, text and end of the frame at an offset, or None if it is torn."""
    if not 0 <= at <= len(data) - _HEAD.size - _CRC.size:
        return None
    magic, seq, length = _HEAD.unpack_from(data, at)
    end = at + _HEAD.size + length
    whole = magic == MAGIC and end + _CRC.size <= len(data)
    if not whole or _CRC.unpack_from(data, end) != (zlib.crc32(data[at:end]),):
        return None
    return seq, data[at + _HEAD.size : end], end + _CRC.size


def frame_at(data: bytes, at: int) -> tuple[dict[str, Any], int, int]:
    """Return body, number and end of the frame at an offset.

    Args:
        data: Bytes that may hold one.
        at: Where it starts.

    Raises:
        ValueError: If none is there.
    """
    found = _whole(data, at)
    if found is None:
        raise ValueError(f"no whole frame at byte {at}")
    return json.loads(found[1]), found[0], found[2]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the frames of the store at ``path``, the header first.

    Args:
        path: The store.

    Returns:
        At least one frame.
    """
    frames, _, _ = load(path)
    return frames


def load(path: Path) -> tuple[list[dict[str, Any]], bytes, bytes]:
    """Return the frames of a store, their bytes, and what follows them.

    Args:
        path: The store.

    Returns:
        At least one frame; all whole frames; a tail that was never acknowledged.

    Raises:
        NotAStore: If there is no whole frame.
        CorruptSegment: If a frame with a good checksum is no JSON, or if whole frames
            follow a broken one: no crash leaves that.
    """
    check_format(path)
    data = (path / "MANIFEST").read_bytes()
    found = _scanned(data, path / "MANIFEST")
    end = found[-1][1] if found else 0
    if has_frame(data[end:]):
        raise CorruptSegment(
            f"{path}/MANIFEST is damaged at byte {end}, and whole frames follow, which "
            f"no crash leaves behind: {_REPAIR.format(path)} restores it from the "
            "segments"
        )
    if not found:
        raise NotAStore(
            f"{path}/MANIFEST holds no whole frame: nothing was ever recorded here, or "
            f"it is damaged; if segments/ has files, {_REPAIR.format(path)} makes it "
            "again"
        )
    return [body for body, _ in found], data[:end], data[end:]


def decode_all(data: bytes, path: Path) -> list[dict[str, Any]] | None:
    """Return the bodies of frames that fill ``data``, or None if they do not.

    Args:
        data: The content of a manifest.
        path: Where it is from, for the message.
    """
    found = _scanned(data, path)
    whole = found and found[-1][1] == len(data)
    return [body for body, _ in found] if whole else None


def _scanned(data: bytes, path: Path) -> list[tuple[dict[str, Any], int]]:
    try:
        return list(scan(data))
    except (ValueError, RecursionError) as error:
        raise CorruptSegment(
            f"{path} holds a frame that is no JSON ({error!r:.80}), though its "
            "checksum is good: no RepScope wrote it so. Restore it from a copy"
        ) from None


def has_frame(data: bytes) -> bool:
    """Return whether a whole frame is anywhere in ``data``."""
    at, looked = data.find(MAGIC), 0
    while at >= 0:
        if _whole(data, at) is not None:
            return True
        if at + _HEAD.size <= len(data):
            looked += min(_HEAD.unpack_from(data, at)[2], len(data))
        if looked > _LONGEST_LOOK * len(data):
            return True  # made to take for ever: no crash leaves that either
        at = data.find(MAGIC, at + 1)
    return False


class Manifest:
    """The writer's end of a manifest: `write` a frame, then `sync` it.

    Args:
        path: The store; its manifest must not exist, unless it goes on.
        frames: How many whole frames are there; 0 for a new manifest.
        size: Bytes of these.
    """

    def __init__(self, path: Path, *, frames: int = 0, size: int = 0) -> None:
        self._path = path / "MANIFEST"
        self._file = self._path.open("r+b" if frames else "xb", buffering=0)
        self._seq = frames
        self._good = size  # bytes known to be durable
        self._written = size
        # Whoever wrote the last frame may have died before it was durable.
        self._suspect = frames > 0

    @property
    def seq(self) -> int:
        """Sequence number of the next frame."""
        return self._seq

    @property
    def size(self) -> int:
        """Bytes of the durable frames."""
        return self._good

    def write(self, body: dict[str, Any]) -> None:
        """Write a frame after the durable ones, over what a failure left there."""
        if self._suspect:
            self._renew()
        frame = encode(self._seq, body)
        fd = self._file.fileno()
        os.ftruncate(fd, self._good)
        os.lseek(fd, self._good, os.SEEK_SET)
        files.write_all(fd, frame)
        self._written = self._good + len(frame)

    def undo(self) -> None:
        """Take back what `write` did, whether it finished or not."""
        os.ftruncate(self._file.fileno(), self._good)

    def sync(self) -> None:
        """Make the frame just written durable."""
        self._suspect = True
        _sync_data(self._file.fileno())
        self._suspect = False
        self._good = self._written
        self._seq += 1

    def _renew(self) -> None:
        """Go on in a new file: after a failed fsync the kernel may drop old pages."""
        temp = self._path.with_name(f".tmp-MANIFEST-{os.getpid()}")
        files.discard(temp)
        files.write_new(temp, [self._path.read_bytes()[: self._good]])
        temp.rename(self._path)
        files.sync_directory(self._path.parent)
        old, self._file = self._file, self._path.open("r+b", buffering=0)
        old.close()
        self._suspect = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()
