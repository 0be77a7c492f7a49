"""The rows of several forwards as one record, and which example each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

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
    if len(pieces) == 1 and _is_usual(pieces[0], n, choice):
        return Joined(cast("Rows", pieces[0].rows).values, None, True, False)
    there = [piece for piece in pieces if piece.rows is not None]
    if not there:
        return None
    known = all(_is_known(piece) for piece in there)
    masks = [
        piece.mask is not None and _fits(piece.mask, piece.rows) for piece in there
    ]
    total = sum(piece.rows.total for piece in there if piece.rows is not None)
    few = choice is None or total <= choice.most
    if few and not any(masks) and (not known or _is_regular(pieces, n)):
        values = [piece.rows.values for piece in there if piece.rows is not None]
        if len(values) == 1:
            return Joined(values[0], None, known, False)
        settle()
        return Joined(torch.cat(values), None, known, False)
    settle()
    values, numbers, examples, kept = [], [], [], []
    before = 0
    for (rows, first, _, mask), masked in zip(there, masks, strict=True):
        if rows is None:
            continue
        number = rows.chosen
        if number is None:
            number = torch.arange(rows.total, device="cpu")
        example = _examples(rows, number)
        keep = torch.ones(len(number), dtype=torch.bool, device="cpu")
        if masked and mask is not None:
            keep = mask.cpu().bool()[example, number % rows.n_tokens]
        values.append(rows.values)
        kept.append(keep)
        numbers.append(number + before)
        examples.append(example + first)
        before += rows.total
    index = torch.cat(kept).nonzero().flatten()
    chosen = None if choice is None else choice.of(torch.cat(numbers)[index])
    index = index if chosen is None else index[chosen]
    which = torch.cat(examples)[index] if known else None
    return Joined(torch.cat(values)[index], which, known, any(masks))


def _is_usual(piece: Piece, n: int, choice: Choice | None) -> bool:
    """Return whether these are all rows of all examples, as nearly always."""
    rows, _, size, mask = piece
    return (
        rows is not None
        and mask is None
        and rows.ordered
        and rows.examples is None
        and rows.n_examples == size == n
        and rows.total % max(n, 1) == 0
        and (choice is None or rows.total <= choice.most)
    )


def _is_known(piece: Piece) -> bool:
    """Return whether it is known which example of the record a row belongs to."""
    rows = piece.rows
    if rows is None or not rows.ordered or rows.n_examples != piece.n:
        return False
    return rows.examples is not None or rows.total % max(piece.n, 1) == 0


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


def _fits(mask: Tensor, rows: Rows | None) -> bool:
    return rows is not None and (
        rows.ordered and mask.shape == (rows.n_examples, rows.n_tokens)
    )


def _examples(rows: Rows, number: Tensor) -> Tensor:
    if rows.examples is not None:
        return rows.examples[number]
    return number // max(rows.total // max(rows.n_examples, 1), 1)
