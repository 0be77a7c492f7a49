"""Layer names as HDF5 link names: safe to print, to type and to sort."""

from __future__ import annotations

import hashlib
import string

_SAFE = frozenset((string.ascii_letters + string.digits + "_-.").encode())
_LONGEST = 200


def encode(name: str) -> str:
    """Return an HDF5 link name for ``name``.

    Every byte outside ``[A-Za-z0-9_.-]`` becomes ``%XX``. A result over 200 bytes is
    cut and ends in the sha256 of the true name, which only the manifest keeps.

    Args:
        name: Any string, the empty one included.

    Returns:
        A non-empty ASCII string of at most 200 bytes, different for different names.

    Example:
        >>> encode("encoder.0/out proj")
        'encoder.0%2Fout%20proj'
        >>> encode("..")
        '%2E%2E'
    """
    data = name.encode("utf-8", "surrogatepass")
    # HDF5 drops "." from paths and readers stumble over "..".
    safe = _SAFE if data.strip(b".") else frozenset[int]()
    text = "".join(chr(byte) if byte in safe else f"%{byte:02X}" for byte in data)
    if len(text) > _LONGEST:
        digest = hashlib.sha256(data).hexdigest()
        return f"{text[: _LONGEST - 1 - len(digest)]}-{digest}"
    return text or "%"


def path_of(key: tuple[str, str]) -> str:
    """Return the path of a stream's dataset.

    Example:
        >>> path_of(("outputs", "encoder.0"))
        'outputs/encoder.0'
    """
    return "/".join(map(encode, key))
