"""The rows of several forwards as one record, and which example each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repscope.capture.choice import Choice
from repscope.capture.forward import Rows


class Piece(NamedTuple):
    """Rows of one call of a layer, and what is known of the forward around it."""

    rows: Rows | None  # None: a gradient that never arrived
    first_example: int
    mask: Tensor | None


class Joined(NamedTuple):
    """Rows of a stream.

    Attributes:
        values: ``(n_rows, n_features)`` on the CPU.
        examples: Example of each row; None when examples have equally many rows each,
            in order.
        masked: Whether a mask fitted.
    """

    values: Tensor
    examples: Tensor | None
    masked: bool


def join(
    pieces: Sequence[Piece], *, choice: Choice | None, settle: Callable[[], None]
) -> Joined | None:
    """Return the rows of some calls as one tensor, without padding and rows too many.

    Args:
        pieces: In order; equal but for the number of rows.
        choice: Which rows to keep; None keeps all.
        settle: Called before the values of rows are read: they may be on their way.

    Returns:
        None if there are no rows at all.
    """
    if len(pieces) == 1 and (whole := _untouched(pieces[0], choice)) is not None:
        return Joined(whole, None, False)
    settle()
    there = [(p.rows, p.first_example, p.mask) for p in pieces if p.rows is not None]
    if not there:
        return None
    parts = [rows.values for rows, *_ in there]
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    total = sum(rows.total for rows, *_ in there)
    masks = [mask is not None and _fits(mask, rows) for rows, _, mask in there]
    regular = len(there) == len(pieces) and all(r.examples is None for r, *_ in there)
    if regular and not any(masks) and (choice is None or total <= choice.most):
        return Joined(values, None, False)

    numbers, examples, kept = [], [], []
    first_row = 0
    for (rows, first_example, mask), masked in zip(there, masks, strict=True):
        number = torch.arange(rows.total) if rows.chosen is None else rows.chosen
        example = _examples(rows, number)
        kept.append(torch.ones(len(number), dtype=torch.bool))
        if masked and mask is not None:
            kept[-1] = mask.cpu().bool()[example, number % rows.n_tokens]
        numbers.append(number + first_row)
        examples.append(example + first_example)
        first_row += rows.total
    index = torch.cat(kept).nonzero().flatten()
    chosen = None if choice is None else choice.of(torch.cat(numbers)[index])
    index = index if chosen is None else index[chosen]
    return Joined(values[index], torch.cat(examples)[index], any(masks))


def _untouched(piece: Piece, choice: Choice | None) -> Tensor | None:
    """Return the rows of the usual piece, of which all are kept."""
    rows = piece.rows
    if rows is None or piece.mask is not None or rows.examples is not None:
        return None
    few = choice is None or rows.total <= choice.most
    return rows.values if few else None


def _fits(mask: Tensor, rows: Rows) -> bool:
    return rows.ordered and mask.shape == (rows.n_examples, rows.n_tokens)


def _examples(rows: Rows, number: Tensor) -> Tensor:
    if rows.examples is not None:
        return rows.examples[number]
    return number // max(rows.total // max(rows.n_examples, 1), 1)
