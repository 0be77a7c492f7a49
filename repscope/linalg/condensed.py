"""From features to the symmetric matrices that are decomposed, of order one.

With fewer samples than features that is the row Gram matrix, with the non-zero
eigenvalues of the covariance. Inputs of one shape are stacked, so that what a call
costs is shared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_matrices, check_finite
from repscope.linalg.covariance import (
    degrees_of_freedom,
    gram,
    in_scale,
    largest,
    rescaled,
    scale_exponent,
    scatter,
)
from repscope.linalg.moments import Moments

_EPS = torch.finfo(torch.float64).eps
# Bytes of features in a stack: what a cache holds on a CPU, what is worth a launch on
# CUDA.
_STACK_BYTES = {"cpu": 2**23, "cuda": 2**28}


@dataclass(frozen=True)
class How:
    """What is asked for; ``quick`` multiplies float32 and less in float32."""

    center: bool
    ddof: int
    quick: bool

    def dtype(self, raw: Tensor) -> torch.dtype:
        """Return the dtype in which these features are multiplied."""
        single = raw.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return torch.float32 if self.quick and single else torch.float64


@dataclass(frozen=True, eq=False)
class Input:
    """One of the matrices, or batches of them, that a caller named."""

    name: str
    rows: Tensor  # (batch, n, d) in the caller's dtype; empty for moments
    lead: torch.Size
    shape: tuple[int, int]
    moments: Moments | None = None


def as_inputs(Xs: Sequence[Any], names: Sequence[str], how: How) -> list[Input]:
    """Return what a caller named, refusing shapes without a covariance.

    Args:
        Xs: Features, each ``(..., n_samples, n_features)``, or `Moments` of them.
        names: What to call each in a message.
        how: What is asked for.

    Returns:
        As many.
    """
    inputs = []
    for value, name in zip(Xs, names, strict=True):
        if isinstance(value, Moments):
            n = value.count
            degrees_of_freedom(n, ddof=how.ddof)
            shape, lead = (n, len(value.mean)), torch.Size()
            inputs.append(Input(name, torch.empty(0), lead, shape, value))
            continue
        raw = as_matrices(value, name=name)
        n, d = raw.shape[-2:]
        degrees_of_freedom(n, ddof=how.ddof)
        rows = raw.reshape(-1, n, d)
        inputs.append(Input(name, rows, raw.shape[:-2], (n, d)))
    return inputs


@dataclass(frozen=True, eq=False)
class Condensed:
    """The smaller of covariance and row Gram matrix: same non-zero eigenvalues."""

    owners: tuple[int, ...]  # the input that each matrix belongs to
    names: tuple[str, ...]
    sources: tuple[Tensor, ...]
    matrices: Tensor
    exponent: Tensor | None  # true eigenvalues are those times 4**exponent
    constant: Tensor  # in float32 only a suspicion
    shape: tuple[int, int]
    rank: int


def condensed(inputs: Sequence[Input], how: How) -> Iterator[Condensed]:
    """Yield the matrices to be decomposed, of many inputs at a time.

    Args:
        inputs: Which; their rows stay as they are.
        how: What is asked for.

    Yields:
        Stacks, of one shape and device each.
    """
    same_shape: dict[Any, list[int]] = defaultdict(list)
    for i, own in enumerate(inputs):
        if own.moments is not None:
            yield _of_moments(own.moments, i, own.name, how)
        else:
            key = own.shape, own.rows.dtype, own.rows.device
            same_shape[key].append(i)
    for members in same_shape.values():
        matrices = [inputs[i].rows for i in members]
        length = _stack_length(matrices)
        memory = None  # fresh pages for every stack would cost as much as its product
        for owners, sources in _stacks(members, matrices, length):
            names = tuple(inputs[i].name for i in owners)
            if memory is None and len(sources) > 1:
                memory = sources[0].new_empty(length, *sources[0].shape[1:])
            yield _condensed(sources, owners, names, how, memory)


def _stack_length(matrices: Sequence[Tensor]) -> int:
    """Return how many matrices the longest stack has."""
    one = matrices[0][0].nbytes
    fitting = max(1, int(limit(_STACK_BYTES, matrices[0])) // one)
    return min(fitting, sum(map(len, matrices)))


def _stacks(
    members: Sequence[int], matrices: Sequence[Tensor], length: int
) -> Iterator[tuple[tuple[int, ...], tuple[Tensor, ...]]]:
    """Cut and gather batches of one shape; one owner for each matrix."""
    owners: list[int] = []
    sources: list[Tensor] = []
    for i, batch in zip(members, matrices, strict=True):
        whole = len(batch) <= length
        for piece in (batch,) if whole else torch.split(batch, length):
            if len(owners) + len(piece) > length:
                yield tuple(owners), tuple(sources)
                owners, sources = [], []
            owners += [i] * len(piece)
            sources.append(piece)
    yield tuple(owners), tuple(sources)


def limit(limits: Mapping[str, float], tensor: Tensor) -> float:
    """Return the limit for the device of a tensor.

    Args:
        limits: By ``"cpu"`` and ``"cuda"``.
        tensor: Where the work is done.

    Returns:
        One of them.
    """
    return limits["cpu" if tensor.is_cpu else "cuda"]


def _condensed(
    sources: tuple[Tensor, ...],
    owners: tuple[int, ...],
    names: tuple[str, ...],
    how: How,
    memory: Tensor | None = None,
) -> Condensed:
    stacked = len(sources) > 1
    out = None if memory is None else memory[: len(owners)]
    raw = torch.cat(sources, out=out) if stacked else sources[0]
    n, d = raw.shape[-2:]
    dtype = how.dtype(raw)
    single = dtype == torch.float32 or raw.dtype == torch.float32
    rows = raw.to(torch.float32 if single else torch.float64)
    top = largest(rows)
    exponent = scale_exponent(top, dtype)
    if exponent is not None:
        for name, matrix in zip(names, rows, strict=True):
            check_finite(matrix, name=name)
        rows, top = in_scale(rows, exponent), top * torch.exp2(-exponent)
    own = stacked or rows is not raw
    product = gram if n < d else scatter
    matrices = product(rows, center=how.center, dtype=dtype, overwrite=own)
    resolution = resolution_of(raw)
    total = matrices.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64) / n
    constant = total <= d * (resolution * top).square() if how.center else top == 0
    if how.center and dtype == torch.float64 and bool(constant.any()):
        suspects = constant.nonzero()[:, 0]
        again = torch.cat(sources)[suspects].to(torch.float64)
        if exponent is not None:
            again = in_scale(again, exponent[suspects])
        constant[suspects] = _is_constant(again, resolution)
    return Condensed(
        owners=owners,
        names=names,
        sources=sources,
        matrices=matrices.div_(n - how.ddof),
        exponent=exponent,
        constant=constant,
        shape=(n, d),
        rank=min(n - how.center, d),
    )


def _of_moments(moments: Moments, i: int, name: str, how: How) -> Condensed:
    n = moments.count
    C, mean = moments.covariance(ddof=0), moments.mean
    spread = C.diagonal().sqrt()
    if how.center:
        constant = (spread <= _EPS * mean.abs()).all()
        _, exponent = rescaled(spread[None])
    else:
        constant = (spread + mean.abs()).eq(0).all()
        _, exponent = rescaled(torch.stack([spread, mean]))
    factor = torch.exp2(-exponent)
    # Twice the factor, because its square may overflow before the product does.
    C = C * factor * factor
    if not how.center:
        C += torch.outer(mean * factor, mean * factor)
    d = len(mean)
    return Condensed(
        owners=(i,),
        names=(name,),
        sources=(),
        matrices=(C * (n / (n - how.ddof)))[None],
        exponent=exponent[None],
        constant=constant[None],
        shape=(n, d),
        rank=min(n - how.center, d),
    )


def exactly(part: Condensed, doubtful: Tensor, how: How) -> Condensed:
    """Return some matrices of a part, computed in float64.

    Args:
        part: Computed in float32.
        doubtful: Which of its matrices.
        how: As for the part.

    Returns:
        As many as are doubtful, in order.
    """
    chosen = doubtful.nonzero()[:, 0]
    rows = torch.cat(part.sources)[chosen]
    owners = tuple(part.owners[i] for i in chosen.tolist())
    names = tuple(part.names[i] for i in chosen.tolist())
    return _condensed((rows,), owners, names, How(how.center, how.ddof, quick=False))


def _is_constant(X: Tensor, resolution: float) -> Tensor:
    # Feature by feature: a wide one must not hide a narrow one beside it.
    spread = (X - X.mean(-2, keepdim=True)).square().mean(-2).sqrt()
    return (spread <= resolution * X.abs().amax(-2)).all(-1)


def resolution_of(raw: Tensor) -> float:
    """Return the relative rounding of the dtype in which features were given.

    Args:
        raw: Features before any cast.

    Returns:
        Its machine epsilon; that of float64 for integers.
    """
    return torch.finfo(raw.dtype).eps if raw.is_floating_point() else _EPS
