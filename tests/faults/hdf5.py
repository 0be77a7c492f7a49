"""Where an HDF5 file has structure, and how to change it with a fitting checksum."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

_MARKS = re.compile(rb"OHDR|OCHK|FAHD|FADB|EAHD|EAIB|EADB|BTHD|BTIN|BTLF|FRHP|FHDB")
_SUM = struct.Struct("<I")
_MIX, _FINAL = (4, 6, 8, 16, 19, 4), (14, 11, 25, 16, 4, 14, 24)


def marks(data: bytes) -> list[int]:
    """Return where headers, chunk indices and the like begin."""
    return [found.start() for found in _MARKS.finditer(data)]


def sealed(data: bytes) -> list[tuple[int, int]]:
    """Return where structures begin, and where the checksums are that end them."""
    guesses = [(0, 44), *((at, end) for at in marks(data) for end in _ends(data, at))]
    return [
        (start, end)
        for start, end in guesses
        if data[end : end + _SUM.size] == _SUM.pack(lookup3(data[start:end]))
    ]


def seal(data: bytearray, start: int, end: int) -> None:
    """Let the checksum of a structure fit again."""
    _SUM.pack_into(data, end, lookup3(bytes(data[start:end])))


def _ends(data: bytes, at: int) -> Iterator[int]:
    """Yield where the checksum of the structure at ``at`` is, if it is a sound one."""
    kind = data[at : at + 4]
    if kind == b"OHDR":
        flags = data[at + 5]
        sizes = at + 6 + 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1)
        width = 1 << (flags & 3)
        yield sizes + width + int.from_bytes(data[sizes : sizes + width], "little")
    elif kind == b"FAHD":
        yield at + 24
    elif kind == b"FADB":
        (header,) = struct.unpack_from("<Q", data, at + 6)
        if header + 24 < len(data):
            (count,) = struct.unpack_from("<Q", data, header + 8)
            yield at + 14 + count * data[header + 6]
    elif kind == b"BTHD":
        yield at + 34


def lookup3(data: bytes) -> int:
    """Return Jenkins' checksum, with which HDF5 ends its structures."""
    blocks = max(1, -(-len(data) // 12))
    words = struct.unpack(f"<{3 * blocks}I", data.ljust(12 * blocks, b"\0"))
    a = b = c = 0xDEADBEEF + len(data)
    for i in range(0, len(words), 3):
        a, b, c = (
            x + y & 0xFFFFFFFF for x, y in zip((a, b, c), words[i:], strict=False)
        )
        if i + 3 < len(words):
            for by in _MIX:
                a, b, c = b, c + b & 0xFFFFFFFF, (a - c ^ _turned(c, by)) & 0xFFFFFFFF
    for by in _FINAL:
        a, b, c = b, ((c ^ b) - _turned(b, by)) & 0xFFFFFFFF, a
    return b


def _turned(value: int, by: int) -> int:
    return (value << by | value >> (32 - by)) & 0xFFFFFFFF
