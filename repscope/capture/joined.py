"""The rows of several forwards as one record, and which example each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repscope.capture.choice import Choice
from repscope.capture.forward import Rows


class Piece(NamedTuple):
    """Rows of one call of a layer, and what is known of the forward around it.

    Attributes:
        rows: None is a gradient that never arrived.
        first: Examples of the record before those of this forward.
        n: Examples of this forward.
        mask: Which of their tokens count.
    """

    rows: Rows | None
    first: int
    n: int
    mask: Tensor | None


class Joined(NamedTuple):
    """Rows of a stream.

    Attributes:
        values: ``(n_rows, n_features)`` on the CPU.
        examples: Example of each row; None when the examples of the record have equally
            many rows each, in order.
        known: Whether it is known which example a row belongs to.
        masked: Whether a mask fitted.
    """

    values: Tensor
    examples: Tensor | None
    known: bool
    masked: bool


def join(
    pieces: Sequence[Piece],
    *,
    n: int,
    choice: Choice | None,
    settle: Callable[[], None],
) -> Joined | None:
    """Return the rows of some calls as one tensor, without padding and rows too many.

    Args:
        pieces: In order; equal but for the number of rows.
        n: Examples of the record.
        choice: Which rows to keep; None keeps all.
        settle: Called before the values of rows are read: they may be on their way.

    Returns:
        None if there are no rows at all.
    """
    there = [
        (piece.rows, piece.first, piece.n, _fitting(piece.mask, piece.rows))
        for piece in pieces
        if piece.rows is not None
    ]
    if not there:
        return None
    values = [rows.values for rows, *_ in there]
    known = all(_is_known(rows, size) for rows, _, size, _ in there)
    masked = any(mask is not None for *_, mask in there)
    few = choice is None or sum(rows.total for rows, *_ in there) <= choice.most
    if few and not masked and (not known or _is_regular(pieces, n)):
        if len(values) > 1:
            settle()
            values = [torch.cat(values)]
        return Joined(values[0], None, known, False)
    settle()
    numbers, examples, kept = [], [], []
    before = 0
    for rows, first, _, mask in there:
        number = rows.chosen
        if number is None:
            number = torch.arange(rows.total, device="cpu")
        example = _examples(rows, number)
        keep = torch.ones(len(number), dtype=torch.bool, device="cpu")
        if mask is not None:
            keep = mask.cpu().bool()[example, number % rows.n_tokens]
        kept.append(keep)
        numbers.append(number + before)
        examples.append(example + first)
        before += rows.total
    index = torch.cat(kept).nonzero().flatten()
    chosen = None if choice is None else choice.of(torch.cat(numbers)[index])
    index = index if chosen is None else index[chosen]
    which = torch.cat(examples)[index] if known else None
    return Joined(torch.cat(values)[index], which, known, masked)


def _is_known(rows: Rows, n: int) -> bool:
    """Return whether it is known which of the ``n`` examples a row belongs to."""
    if not rows.ordered or rows.n_examples != n:
        return False
    return rows.examples is not None or rows.total % max(n, 1) == 0


def _is_regular(pieces: Sequence[Piece], n: int) -> bool:
    """Return whether all examples have equally many rows each, in order."""
    if sum(piece.n for piece in pieces) != n:
        return False
    each = set()
    for rows, _, size, _ in pieces:
        if rows is None or rows.examples is not None or rows.chosen is not None:
            return False
        if size:
            each.add(rows.total // size)
    return len(each) <= 1


def _fitting(mask: Tensor | None, rows: Rows) -> Tensor | None:
    """Return a mask if it is one of these rows."""
    shape = rows.n_examples, rows.n_tokens
    fits = mask is not None and rows.ordered and mask.shape == shape
    return mask if fits else None


def _examples(rows: Rows, number: Tensor) -> Tensor:
    if rows.examples is not None:
        return rows.examples[number]
    return number // max(rows.total // max(rows.n_examples, 1), 1)
