"""Which rows go into which segment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repscope.snapshot import StreamKey
from repscope.store.index import LABELS, SCALARS, STORED_AS, Ints, is_rows
from repscope.store.names import path_of
from repscope.store.pending import Record

Bytes = npt.NDArray[np.uint8]

_BIG = 2**15  # bytes of a block that are worth a call of their own


class Column:
    """The rows of one stream in one segment: blocks that concatenate along axis 0.

    Args:
        key: The stream.
        tensor: A record of it.
        block: Rows as they are stored; all blocks share dtype and ``shape[1:]``.
    """

    def __init__(self, key: StreamKey, tensor: Tensor, block: Tensor) -> None:
        self.key = key
        self.name = path_of(key)
        self.whole = not is_rows(key[0])
        self.row_shape = list(tensor.shape if self.whole else tensor.shape[1:])
        self.stored_row_shape = list(block.shape[1:])
        self.dtype = tensor.dtype
        self.records: list[int] = []
        self.starts: list[int] = []
        self.rows: list[int] = []
        self.n_rows = 0
        self._blocks: list[Tensor] = []
        self._last: Tensor | None = None

    @property
    def h5_dtype(self) -> np.dtype[np.generic]:
        """The element type inside the segment."""
        return np.dtype(STORED_AS[self.dtype])

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return math.prod(self.stored_row_shape) * self.dtype.itemsize

    def add(self, record: int, block: Tensor, *, source: Tensor) -> None:
        """Append rows of a record, cut from its tensor ``source``."""
        rows = block.shape[0]
        self._index(record, self.n_rows, rows)
        self._blocks.append(block)
        self._last = source
        self.n_rows += rows

    def repeat(self, record: int, source: Tensor) -> bool:
        """Index the latest rows once more if they are the whole of ``source``.

        Returns:
            Whether they were.
        """
        if source is not self._last or self._blocks[-1].nbytes != source.nbytes:
            return False
        self._index(record, self.starts[-1], self.rows[-1])
        return True

    def extend(self, block: Tensor, records: Ints, starts: Ints, rows: Ints) -> None:
        """Append rows of several records at once, or index equal labels once more.

        Args:
            block: Rows as they are stored.
            records: The records that have rows here.
            starts: First row, within ``block``, of each of them.
            rows: Number of rows of each of them.
        """
        last = self._last if self.key == LABELS else None
        if last is None or not last.equal(block):
            self._blocks.append(block)
            self._last = block
            self.n_rows += len(block)
        self.records += records.tolist()
        self.starts += (starts + (self.n_rows - len(block))).tolist()
        self.rows += rows.tolist()

    def _index(self, record: int, start: int, rows: int) -> None:
        self.records.append(record)
        self.starts.append(start)
        self.rows.append(rows)

    def chunks(self, rows: int) -> Iterator[list[memoryview]]:
        """Yield all bytes by ``rows`` rows, the last of them padded with zeros.

        Args:
            rows: Rows of a chunk.

        Yields:
            The pieces of a chunk, only valid until the next chunk is asked for.
        """
        buffer = torch.empty([rows, *self.stored_row_shape], dtype=self.dtype)
        waiting: list[Tensor] = []
        room = rows
        for block in self._blocks:
            while (n := block.shape[0]) >= room:
                waiting.append(block[:room] if n > room else block)
                yield _joined(waiting, buffer)
                block, waiting, room = block[room:], [], rows
            if n:
                waiting.append(block)
                room -= n
        if waiting:
            yield _joined([*waiting, torch.zeros_like(buffer[:room])], buffer)


def plan(records: Sequence[Record], *, limit: int) -> Iterator[list[Column]]:
    """Distribute records over segments, in order.

    A record is cut only when it is larger than a whole segment.

    Args:
        records: Scalars are floats by now.
        limit: Bytes of data in a segment.

    Yields:
        The columns of one segment.
    """
    columns = {column.key: column for column in _scalar_columns(records)}
    used = sum(column.n_rows * column.row_bytes for column in columns.values())
    for number, record in enumerate(records):
        for key, tensor in record.tensors.items():
            if key in columns and columns[key].repeat(number, tensor):
                continue
            for block in _cut(tensor, whole=not is_rows(key[0]), limit=limit):
                if columns and used + block.nbytes > limit:
                    yield list(columns.values())
                    columns, used = {}, 0
                if key not in columns:
                    columns[key] = Column(key, tensor, block)
                columns[key].add(number, block, source=tensor)
                used += block.nbytes
    if columns:
        yield list(columns.values())


def _joined(blocks: Sequence[Tensor], buffer: Tensor) -> list[memoryview]:
    """Return the bytes of all blocks, which fill the buffer."""
    # Big ones need no copy; of small ones each would cost a few calls.
    if len(blocks) > 1 and buffer.nbytes < len(blocks) * _BIG:
        torch.cat(list(blocks), out=buffer)
        blocks = [buffer]
    return [_bytes(block) for block in blocks]


def _bytes(block: Tensor) -> memoryview:
    data: Bytes = block.reshape(-1).view(torch.uint8).numpy()
    return data.data


def _cut(tensor: Tensor, *, whole: bool, limit: int) -> Sequence[Tensor]:
    """Return the rows of a tensor in blocks of at most ``limit`` bytes."""
    rows = tensor.unsqueeze(0) if whole else tensor
    if 0 < rows.nbytes <= limit:
        return (rows,)
    row_bytes = math.prod(rows.shape[1:]) * rows.itemsize
    if row_bytes > limit:  # not even one row fits: store the elements, flat
        rows, row_bytes = rows.reshape(-1), rows.itemsize
    size = limit // max(row_bytes, 1)
    return [rows[i : i + size] for i in range(0, max(len(rows), 1), size)]


def _scalar_columns(records: Sequence[Record]) -> Iterator[Column]:
    """Yield one float64 column per name, one value for each record that has it."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for number, record in enumerate(records):
        for name, value in record.scalars.items():
            numbers, values = found.setdefault(name, ([], []))
            numbers.append(number)
            values.append(float(value))
    for name, (numbers, values) in found.items():
        block = torch.tensor(values, dtype=torch.float64)
        column = Column((SCALARS, name), block[0], block)
        each = np.arange(len(block))
        column.extend(block, np.array(numbers), each, np.ones_like(each))
        yield column
