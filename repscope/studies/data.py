"""Data sets: scikit-learn's digits, or MNIST and its look-alikes from IDX files."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repscope.errors import DataError, UnknownName, suggest

_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
_UBYTE = 8


@dataclass(frozen=True, eq=False)
class Data:
    """A labelled image set with its split.

    Attributes:
        name: ``"digits"``, ``"mnist"``, ...
        x_train: Pixels in [0, 1], shape ``(n_samples, n_features)``, float32.
        y_train: Labels, shape ``(n_samples,)``, int64.
        x_test: The same for the held-out images.
        y_test: Their labels.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @cached_property
    def sha256(self) -> str:
        """The hash of all values: other files under the same name are told apart."""
        digest = hashlib.sha256()
        for part in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def digits(data_dir: Path | None = None) -> Data:
    """Return scikit-learn's embedded digits: 1297 training and 500 test images.

    Args:
        data_dir: Not used; the data is part of scikit-learn.

    Returns:
        8 x 8 images as 64 features; the split is fixed and stratified.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32), y, test_size=500, random_state=0, stratify=y
    )
    return Data("digits", *map(torch.as_tensor, (x_train, y_train, x_test, y_test)))


def read_idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes, gzipped or not.

    The format: two zero bytes, a type code (8 = unsigned byte), the number of
    dimensions, the dimensions as big-endian 32-bit integers, then the values.

    Args:
        path: The file.

    Returns:
        A uint8 tensor.

    Raises:
        DataError: If the file cannot be read or is not such a file.

    References:
        LeCun, Cortes and Burges (1998), The MNIST database of handwritten digits.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    n_dims = raw[3] if len(raw) > 3 else 0
    header = 4 + 4 * n_dims
    if raw[:3] != bytes([0, 0, _UBYTE]) or len(raw) < header:
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{n_dims}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise DataError(
            f"{path} should hold {shape} = {math.prod(shape)} bytes after its header, "
            f"but has {len(raw) - header}: the download is incomplete or damaged"
        )
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(shape)


def _folder(name: str, data_dir: Path | None) -> Path:
    given = data_dir or os.environ.get("REPSCOPE_DATA")
    if not given:
        raise DataError(
            f"{name!r} is read from IDX files: name their folder with --data-dir or "
            f"the environment variable REPSCOPE_DATA (only 'digits' is embedded)"
        )
    folder = Path(given)
    if not folder.is_dir():
        raise DataError(f"there is no data folder {folder}")
    return folder / name if (folder / name).is_dir() else folder


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {stem} (.gz or not)")


def _idx(name: str) -> Callable[[Path | None], Data]:
    def load_files(data_dir: Path | None = None) -> Data:
        folder = _folder(name, data_dir)
        part = {key: read_idx(_find(folder, s)) for key, s in _IDX_FILES.items()}
        for side in ("train", "test"):
            n_images, n_labels = len(part[f"x_{side}"]), len(part[f"y_{side}"])
            if n_images != n_labels:
                raise DataError(
                    f"{folder}: {n_images} {side} images but {n_labels} labels"
                )
        images = {k: part[k].flatten(1).float() / 255 for k in ("x_train", "x_test")}
        labels = {k: part[k].long() for k in ("y_train", "y_test")}
        return Data(name, **images, **labels)

    return load_files


def load(name: str, *, data_dir: str | Path | None = None) -> Data:
    """Return a data set by name; never another one in its place.

    Args:
        name: A row of ``DATASETS``.
        data_dir: Folder of the IDX files (or its parent); ``$REPSCOPE_DATA`` if not
            given. Not needed for ``"digits"``.

    Returns:
        The data.

    Raises:
        UnknownName: If there is no such row.
        DataError: If files are missing, unreadable or do not fit together.

    Example:
        >>> load("digits").x_train.shape
        torch.Size([1297, 64])
    """  # noqa: DOC502 - DataError comes from the reader
    if name not in DATASETS:
        raise UnknownName(
            f"unknown data set {name!r}{suggest(name, DATASETS)} "
            f"(known: {', '.join(DATASETS)})"
        )
    return DATASETS[name](None if data_dir is None else Path(data_dir))


DATASETS: Mapping[str, Callable[[Path | None], Data]] = {
    "digits": digits,
    "mnist": _idx("mnist"),
    "fashion-mnist": _idx("fashion-mnist"),
    "kmnist": _idx("kmnist"),
}
