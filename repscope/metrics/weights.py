"""Where the magnitudes of weights lie, and how unequal they are.

A weight is a tensor of any shape; a list or a dict of tensors is pooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from repscope._checks import as_float, check_finite
from repscope.errors import MetricError, UsageError
from repscope.results import Histogram

_LOG10_RANGE = (-10.0, 2.0)


def weight_histogram(w: Any, *, bins: int = 64, log: bool = True) -> Histogram:
    """Count weight magnitudes between edges.

    On the log scale the range is fixed, ``1e-10`` to ``1e2``, so that the histograms
    of different runs overlay. A bin holds its low edge but not its high one, except
    the last, which holds both. Every weight is counted exactly once, in a bin or as
    zero, underflow or overflow.

    Args:
        w: One weight, or a list or dict of weights to pool.
        bins: Number of bins.
        log: Equal widths in log10 of the magnitude; otherwise equal widths from 0 to
            the largest magnitude, which is then the last edge (1 if all are zero).

    Returns:
        Counts, edges and what fell outside.

    Raises:
        UsageError: If ``bins`` is less than 1.

    Example:
        >>> h = weight_histogram([0.0, 1e-12, 0.05, -0.5, 300.0], bins=12)
        >>> h.counts.tolist(), h.n_zero, h.underflow, h.overflow
        ([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0], 1, 1, 1)
    """
    if bins < 1:
        raise UsageError(f"bins must be at least 1, got {bins}")
    magnitudes = _pooled(w).abs()
    edges = _edges(magnitudes, bins=bins, log=log)
    non_zero = magnitudes[magnitudes > 0]
    # Place 0 is below the first edge, place bins + 1 at or above the last.
    places = torch.bucketize(non_zero, edges, right=True)
    places[non_zero == edges[-1]] = bins
    counts = places.bincount(minlength=bins + 2)
    return Histogram(
        counts=counts[1:-1],
        edges=edges,
        n_zero=len(magnitudes) - len(non_zero),
        underflow=int(counts[0]),
        overflow=int(counts[-1]),
    )


def hoyer_sparsity(w: Any) -> Tensor:
    r"""Return Hoyer's measure of how unequal the magnitudes are.

    :math:`(\sqrt{n} - \|w\|_1 / \|w\|_2) / (\sqrt{n} - 1)`: 0 when all magnitudes are
    equal, 1 when a single weight is non-zero. Invariant to scale.

    Args:
        w: One weight, or a list or dict of weights to pool.

    Returns:
        0-dim, in [0, 1]; NaN when all are zero or there is only one.

    References:
        Hoyer (2004), Non-negative matrix factorization with sparseness constraints,
        JMLR 5.

    Example:
        >>> hoyer_sparsity([0.0, 0.0, 0.0, 2.0]).item()
        1.0
    """
    magnitudes = _pooled(w).abs()
    magnitudes = magnitudes / magnitudes.amax()
    root = math.sqrt(len(magnitudes))
    ratio = magnitudes.sum() / magnitudes.square().sum().sqrt()
    # 0/0 in either division is NaN, which is the answer there.
    return ((root - ratio) / (root - 1)).clamp(0, 1)


def weight_rms(w: Any) -> Tensor:
    r"""Return the root mean square :math:`\sqrt{\sum_i w_i^2 / n}`.

    Args:
        w: One weight, or a list or dict of weights to pool.

    Returns:
        0-dim, in the units of the weight.

    Example:
        >>> weight_rms([3.0, -4.0, 0.0, 0.0]).item()
        2.5
    """
    values = _pooled(w)
    top = values.abs().amax()
    scaled = torch.where(top > 0, values / top, 0.0)
    return top * scaled.square().mean().sqrt()


# -- helpers -----------------------------------------------------------------
def _pooled(w: Any) -> Tensor:
    if isinstance(w, Mapping):
        named = {f"w[{key!r}]": value for key, value in w.items()}
    elif isinstance(w, list | tuple):
        named = {f"w[{i}]": value for i, value in enumerate(w)}
    else:
        named = {"w": w}
    flat = []
    for name, value in named.items():
        tensor = as_float(value, name=name)
        check_finite(tensor, name=name)
        flat.append(tensor.flatten().to(torch.float64))
    if sum(map(len, flat)) == 0:
        raise MetricError(
            "w holds no weights; pass a tensor, or a list or dict of them"
        )
    return torch.cat(flat)


def _edges(magnitudes: Tensor, *, bins: int, log: bool) -> Tensor:
    fractions = [i / bins for i in range(bins + 1)]
    if log:
        low, high = _LOG10_RANGE
        values = [10.0 ** (low + (high - low) * f) for f in fractions]
    else:
        top = float(magnitudes.amax()) or 1.0
        values = [top * f for f in fractions]
    return magnitudes.new_tensor(values)


WEIGHT_METRICS: dict[str, Callable[[Any], Tensor]] = {
    "weight_rms": weight_rms,
    "hoyer_sparsity": hoyer_sparsity,
}
