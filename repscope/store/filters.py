"""Compression of packed files: HDF5's shuffle, then deflate or Zstandard."""

from __future__ import annotations

import importlib
import io
import zlib
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from repscope.errors import MissingExtra

Bytes = npt.NDArray[np.uint8]

PIPELINES = MappingProxyType({"": (), "gzip": (2, 1), "zstd": (2, 32015)})
"""HDF5's filter numbers of each kind of compression, in order."""

_ZSTD_MAGIC = 0xFD2FB528


def options(name: str) -> dict[str, Any]:
    """Return what h5py needs to make a dataset with this compression.

    Args:
        name: A key of `PIPELINES`.
    """
    if name == "zstd":
        return {"shuffle": True, **_plugin().Zstd()}
    return {"shuffle": True, "compression": 4} if name else {}


def _plugin() -> Any:
    try:
        return importlib.import_module("hdf5plugin")
    except ImportError:
        raise MissingExtra(
            "Zstandard needs the package hdf5plugin: "
            "pip install 'repscope[compression]'"
        ) from None


def unpack(name: str, data: Bytes, *, nbytes: int, itemsize: int) -> Bytes:
    """Return the bytes of a chunk, and never more than it may have.

    Args:
        name: A key of `PIPELINES`.
        data: As it is in the file.
        nbytes: Bytes of the chunk.
        itemsize: Bytes of an element.

    Raises:
        ValueError: If that is not what the data unpacks to.
    """
    if name == "zstd":
        return _unpack_zstd(data, nbytes, itemsize)
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data.data, nbytes + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(plain) != nbytes:
        raise ValueError(f"it does not hold {nbytes} bytes")
    by_byte = np.frombuffer(plain, np.uint8).reshape(itemsize, -1)
    return np.ascontiguousarray(by_byte.T).reshape(-1)


def _unpack_zstd(data: Bytes, nbytes: int, itemsize: int) -> Bytes:
    """Return what HDF5 unpacks from a file in memory that holds nothing else.

    Raises:
        ValueError: If the data is no Zstandard frame of ``nbytes`` bytes.
    """
    import h5py

    if _zstd_size(data.tobytes()[:18]) != nbytes:
        raise ValueError(f"it does not hold {nbytes} bytes")
    made = options("zstd")
    kind, n = np.dtype(f"<u{itemsize}"), nbytes // itemsize
    with h5py.File(io.BytesIO(), "w") as file:
        dataset = file.create_dataset("x", (n,), kind, chunks=(n,), **made)
        dataset.id.write_direct_chunk((0,), data)
        try:
            plain: Bytes = dataset[:].view(np.uint8)
        except OSError as error:
            raise ValueError(str(error)) from None
    return plain


def _zstd_size(head: bytes) -> int:
    """Return the size that a Zstandard frame declares, -1 if it does not.

    The library would allocate it before it looks at the data.
    """
    if len(head) < 6 or int.from_bytes(head[:4], "little") != _ZSTD_MAGIC:
        return -1
    descriptor = head[4]
    single, code = descriptor >> 5 & 1, descriptor >> 6
    width = (1 if single else 0, 2, 4, 8)[code]
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    if not width or len(head) < start + width:
        return -1
    size = int.from_bytes(head[start : start + width], "little")
    return size + 256 if width == 2 else size
