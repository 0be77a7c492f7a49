"""What was handed to the writer and is not yet on disk."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from repscope.errors import DtypeChanged, ShapeChanged, UnsupportedOutput, UsageError
from repscope.snapshot import Snapshot, StreamKey
from repscope.store.index import LABELS, RESERVED, STORED_AS, is_rows


@dataclass(slots=True)
class Record:
    """A snapshot whose tensors can be written as they are."""

    step: int
    tags: tuple[str, ...]
    tensors: dict[StreamKey, Tensor]
    scalars: dict[str, Tensor | float]

    @property
    def nbytes(self) -> int:
        """Bytes this record adds to a segment."""
        return 8 * len(self.scalars) + sum(t.nbytes for t in self.tensors.values())


class Layout(NamedTuple):
    """What every record of a stream has in common."""

    dtype: torch.dtype
    row_shape: tuple[int, ...]


class Pending:
    """The records of the next commit, and the layout of every stream so far.

    Args:
        layouts: Of the streams that the store has already.
    """

    def __init__(self, layouts: Mapping[StreamKey, Layout] = MappingProxyType({})):
        self._layouts = dict(layouts)
        self._labels: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the records, not the layouts."""
        self.records: list[Record] = []
        self.nbytes = 0
        self._counted: Tensor | None = None

    def add(self, snapshot: Snapshot) -> int:
        """Take a snapshot, or raise and take nothing of it.

        Args:
            snapshot: Its tensors now belong to the store.

        Returns:
            The bytes it will add to a segment.
        """
        record = _record(snapshot)
        size = record.nbytes
        if record.tensors:
            layouts = {
                key: self._layout(key, tensor, record.step)
                for key, tensor in record.tensors.items()
            }
            self._layouts.update(layouts)
            size -= self._share_labels(record)
        self.records.append(record)
        self.nbytes += size
        return size

    def rows(self, *, first: int = 0) -> Counter[StreamKey]:
        """Return how many rows of each stream wait here, from record ``first`` on."""
        count: Counter[StreamKey] = Counter()
        for record in self.records[first:]:
            for key, tensor in record.tensors.items():
                count[key] += tensor.shape[0] if is_rows(key[0]) else 1
        return count

    def _layout(self, key: StreamKey, tensor: Tensor, step: int) -> Layout:
        rows = is_rows(key[0])
        now = Layout(tensor.dtype, tensor.shape[1:] if rows else tensor.shape)
        was = self._layouts.get(key)
        if was is None or was == now:
            return now
        if was.row_shape != now.row_shape:
            raise ShapeChanged(
                f"{_where(key)}: {'rows' if rows else 'tensors'} had shape "
                f"{tuple(was.row_shape)}, at step {step} they have "
                f"{tuple(now.row_shape)}; reduce "
                "them to one width, or record into a new store"
            )
        raise DtypeChanged(
            f"{_where(key)}: values had dtype {was.dtype}, at step {step} they have "
            f"{now.dtype}; nothing is cast silently: choose one dtype"
        )

    def _share_labels(self, record: Record) -> int:
        """Let labels that repeat, as those of a probe do, be one tensor.

        Returns:
            The bytes that this saves.
        """
        labels = record.tensors.get(LABELS)
        if labels is None:
            return 0
        if self._labels is None or not labels.equal(self._labels):
            self._labels = labels
        record.tensors[LABELS] = self._labels
        saved = labels.nbytes if self._counted is self._labels else 0
        self._counted = self._labels
        return saved


def _record(snapshot: Snapshot) -> Record:
    step = operator.index(snapshot.step)
    if not 0 <= step < 2**63:
        raise UsageError(f"a step counts optimizer updates and is >= 0, got {step}")
    layers = [name for key in snapshot.streams for name in key]
    for name in (*layers, *snapshot.scalars, *snapshot.tags):
        if not isinstance(name, str):
            raise UsageError(f"layers, scalars and tags have text names, got {name!r}")
    tensors = {}
    for key, tensor in snapshot.streams.items():
        if key[0] in RESERVED:
            raise UsageError(
                f"target {key[0]!r} is reserved; pass a Snapshot's {key[0]}= instead"
            )
        tensors[key] = _plain(key, tensor)
    if snapshot.labels is not None:
        tensors[LABELS] = _plain(LABELS, snapshot.labels)
    scalars = {name: _scalar(name, value) for name, value in snapshot.scalars.items()}
    return Record(step, tuple(snapshot.tags), tensors, scalars)


def _plain(key: StreamKey, tensor: Tensor) -> Tensor:
    """Return the tensor as contiguous memory that can be written byte by byte.

    Raises:
        UnsupportedOutput: If that cannot be done without losing something.
    """
    if tensor.dtype not in STORED_AS or tensor.layout != torch.strided:
        raise UnsupportedOutput(
            f"{_where(key)}: cannot store dtype {tensor.dtype} with layout "
            f"{tensor.layout}; convert it to a dense real tensor"
        )
    if tensor.is_nested or not tensor.is_cpu:
        raise UnsupportedOutput(
            f"{_where(key)}: the store takes plain CPU tensors, got one on "
            f"{tensor.device} with dtype {tensor.dtype}; pad or copy it first"
        )
    if is_rows(key[0]) and not tensor.ndim:
        raise UnsupportedOutput(
            f"{_where(key)}: a 0-dim tensor of dtype {tensor.dtype} has no rows; "
            "record it as a scalar"
        )
    if tensor.requires_grad or tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.ndim and tensor.stride(-1) != 1:
        # One value is contiguous whatever its strides are, but not for a view of bytes.
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _scalar(name: str, value: Tensor | float) -> Tensor | float:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise UsageError(
                f"scalar {name!r} must be one real number, got a tensor of shape "
                f"{tuple(value.shape)} and dtype {value.dtype}"
            )
        return value.detach().reshape(()) if value.ndim else value.detach()
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"scalar {name!r} must be one real number, got {value!r:.80}"
        ) from error


def _where(key: StreamKey) -> str:
    return "labels" if key == LABELS else f"{key[0]} of layer {key[1]!r}"


def settle_scalars(records: Iterable[Record]) -> None:
    """Replace tensors among the scalars by floats, one transfer a device and dtype.

    Args:
        records: Their scalars are changed in place.
    """
    groups: dict[object, list[tuple[Record, str, Tensor]]] = defaultdict(list)
    for record in records:
        for name, value in record.scalars.items():
            if isinstance(value, Tensor):
                groups[value.device, value.dtype].append((record, name, value))
    for group in groups.values():
        values = torch.stack([value for _, _, value in group]).cpu().double().tolist()
        for (record, name, _), value in zip(group, values, strict=True):
            record.scalars[name] = value
