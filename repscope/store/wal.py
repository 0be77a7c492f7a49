"""The log of ``durability="append"``: every record is durable before it is folded.

``wal/NNNNNNNN.log`` holds the records since the manifest had N frames; the frame N that
folds them into a segment makes the log void. An entry is ``magic, seq, length`` (16
bytes, little-endian), ``length`` bytes of JSON that read like a frame of the manifest,
the crc32 of all of these, and the bytes of the tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repscope.errors import CorruptSegment
from repscope.snapshot import StreamKey
from repscope.store import files, manifest, schema
from repscope.store.index import SCALARS, Part, is_rows
from repscope.store.pending import Record

_MAGIC = b"RSW1"
_HEAD = struct.Struct("<4sQI")
_CRC = struct.Struct("<I")


# -- writing -----------------------------------------------------------------
class Log:
    """The writer's end of the log.

    Args:
        store: The store.
        number: How many frames its manifest has.
    """

    def __init__(self, store: Path, number: int) -> None:
        self._store = store
        self._fd = -1
        self._path = manifest.locate(store, number, log=True)
        self.restart(number)
        (store / "wal").mkdir(exist_ok=True)
        files.sync_directory(store)

    def restart(self, number: int) -> None:
        """Drop the log, whose records are in a segment; the next one is ``number``."""
        if self._fd >= 0:
            self.close()
            files.discard(self._path)
        self._path = manifest.locate(self._store, number, log=True)
        self._seq = 0
        self.size = 0
        self.sound = True

    def append(self, records: Sequence[Record], progress: int | None) -> None:
        """Write records and make them durable, or take back what was written.

        Args:
            records: Scalars are floats by now.
            progress: As in a frame of the manifest.
        """
        if self._fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o666)
            files.sync_directory(self._path.parent)
        data = b"".join(
            piece
            for i, record in enumerate(records)
            for piece in _encode(self._seq + i, record, progress)
        )
        self.sound = False
        try:
            os.lseek(self._fd, self.size, os.SEEK_SET)
            files.write_all(self._fd, data)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
                self.sound = True
            raise
        manifest.sync_data(
            self._fd
        )  # after a failure here this file is never used again
        self.sound = True
        self.size += len(data)
        self._seq += len(records)

    def close(self) -> None:
        """Close the file; it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(seq: int, record: Record, progress: int | None) -> list[bytes]:
    tensors: dict[StreamKey, Tensor] = {
        (SCALARS, name): torch.tensor(float(value), dtype=torch.float64)
        for name, value in record.scalars.items()
    } | record.tensors
    parts, pieces, offset = [], [], 0
    for key, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        parts.append(_part(key, tensor, offset, data).to_json())
        pieces.append(data)
        offset += len(data)
    body: dict[str, Any] = {
        "steps": [[record.step, 1, 0]],
        "tags": [[0, tag] for tag in record.tags],
        "segments": [{"number": 0, "bytes": offset, "parts": parts}],
    }
    if progress is not None:
        body["progress"] = progress
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    head = _HEAD.pack(_MAGIC, seq, len(text)) + text
    return [head, _CRC.pack(zlib.crc32(head)), *pieces]


def _part(key: StreamKey, tensor: Tensor, offset: int, data: bytes) -> Part:
    whole = not is_rows(key[0])
    shape = [1, *tensor.shape] if whole else list(tensor.shape)
    return Part(
        target=key[0],
        layer=key[1],
        name="",
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=shape,
        row_shape=shape[1:],
        whole=whole,
        chunk_rows=shape[0] if data else 0,
        chunks=[[offset, zlib.crc32(data)]] if data else [],
        records=[[0, 1, 0]],
        starts=[[0, 1, 0]],
        rows=[[shape[0], 1, 0]],
    )


# -- reading -----------------------------------------------------------------
def read(store: Path, number: int) -> tuple[list[dict[str, Any]], int]:
    """Return what the log holds beyond ``number`` frames.

    Args:
        store: The store.
        number: How many frames its manifest has.

    Returns:
        Whole entries as frames, whose chunks lie in the log; and the bytes after them.
    """
    path = manifest.locate(store, number, log=True)
    if not path.is_file():
        return [], 0
    data, frames, end = path.read_bytes(), [], 0
    for frame, stop in _scan(data, path):
        for entry in frame["segments"]:
            entry |= {"number": number, "log": True, "bytes": stop}
        frames.append(frame)
        end = stop
    return frames, len(data) - end


def check_numbers(store: Path, number: int) -> None:
    """Refuse a store whose log follows a frame that its manifest does not have.

    Args:
        store: The store.
        number: How many frames its manifest has.

    Raises:
        CorruptSegment: If the manifest has lost its end: no crash leaves that.
    """
    for log in (store / "wal").glob("[0-9]*.log"):
        later = log.stem.isdigit() and int(log.stem) > number
        if later and read(store, int(log.stem))[0]:
            raise CorruptSegment(
                f"{store}/MANIFEST has lost its end: it has {number} frames, and "
                f"{log.name} holds what came after {int(log.stem)}; `repscope check "
                f"--repair {store}` restores them"
            )


def _scan(data: bytes, path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield whole entries, and where each ends."""
    at = seq = 0
    while at + _HEAD.size + _CRC.size <= len(data):
        magic, found, length = _HEAD.unpack_from(data, at)
        base = at + _HEAD.size + length + _CRC.size
        head = data[at : base - _CRC.size]
        if (magic, found) != (_MAGIC, seq) or base > len(data):
            return
        if data[base - _CRC.size : base] != _CRC.pack(zlib.crc32(head)):
            return
        try:
            frame = json.loads(head[_HEAD.size :])
        except (ValueError, RecursionError):
            return
        try:  # before anything is made of it: a good checksum does not make it sense
            schema.check(path, frame)
        except CorruptSegment:
            return
        at, seq = base + sum(e["bytes"] for e in frame.get("segments", ())), seq + 1
        if at > len(data) or not _settle(frame, data, base):
            return
        yield frame, at


def _settle(frame: dict[str, Any], data: bytes, base: int) -> bool:
    """Turn offsets into those of the file.

    Returns:
        Whether every tensor is whole.
    """
    for part in (part for entry in frame["segments"] for part in entry["parts"]):
        size = _nbytes(part)
        for chunk in part["chunks"]:
            chunk[0] += base
            if zlib.crc32(data[chunk[0] : chunk[0] + size]) != chunk[1]:
                return False
    return True


def _nbytes(part: dict[str, Any]) -> int:
    described = Part.from_json(part)
    return described.chunk_rows * described.row_bytes
