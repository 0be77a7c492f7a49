"""Where the magnitudes of weights lie, and how unequal they are.

A weight is a tensor of any shape; a list or a dict of tensors is pooled. Weights that
never received an update (`never_updated`) say nothing about an optimizer: ``exclude``
leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from repscope._checks import as_float, as_tensor, check_choice, check_finite
from repscope.errors import MetricError, UsageError
from repscope.results import Histogram

Unit = Literal["absolute", "rms"]

_LOG10_RANGE = (-10.0, 2.0)


def weight_histogram(
    w: Any,
    *,
    bins: int = 64,
    log: bool = True,
    edges: Any = None,
    unit: Unit = "absolute",
    exclude: Any = None,
) -> Histogram:
    """Count weight magnitudes between edges.

    On the log scale the range is fixed, ``1e-10`` to ``1e2``, so that the histograms
    of different runs overlay. A bin holds its low edge but not its high one, except
    the last, which holds both. Every weight is counted exactly once: in a bin, as
    zero, underflow or overflow, or as excluded.

    Args:
        w: One weight, or a list or dict of weights to pool.
        bins: Number of bins.
        log: Equal widths in log10 of the magnitude; otherwise equal widths from 0 to
            the largest magnitude, which is then the last edge (1 if all are zero).
        edges: Magnitudes, strictly ascending from 0 or above, in place of ``bins`` and
            ``log``: those of another histogram, to compare with it on a linear scale.
        unit: ``"rms"`` divides each tensor by its own root mean square before pooling,
            so that one layer scaled against the next counts the same.
        exclude: True where a weight is left out; one mask, or a list or dict of masks
            like ``w``. A dict may leave names out.

    Returns:
        Counts, edges and what fell outside.

    Raises:
        UsageError: If ``bins`` is less than 1, or ``edges`` do not ascend.

    Example:
        >>> h = weight_histogram([0.0, 1e-12, 0.05, -0.5, 300.0], bins=12)
        >>> h.counts.tolist(), h.n_zero, h.underflow, h.overflow
        ([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0], 1, 1, 1)
    """
    check_choice(unit, ("absolute", "rms"), name="unit")
    if bins < 1:
        raise UsageError(f"bins must be at least 1, got {bins}")
    parts, n_excluded = _kept(w, exclude=exclude)
    if unit == "rms":
        parts = [_over_rms(part) for part in parts]
    magnitudes = torch.cat(parts).abs()
    if edges is None:
        limits = _edges(magnitudes, bins=bins, log=log)
    else:
        limits = _checked_edges(edges).to(magnitudes)
    n_bins = len(limits) - 1
    non_zero = magnitudes[magnitudes > 0]
    # Place 0 is below the first edge, place n_bins + 1 at or above the last.
    places = torch.bucketize(non_zero, limits, right=True)
    places[non_zero == limits[-1]] = n_bins
    counts = places.bincount(minlength=n_bins + 2)
    return Histogram(
        counts=counts[1:-1],
        edges=limits,
        n_zero=len(magnitudes) - len(non_zero),
        underflow=int(counts[0]),
        overflow=int(counts[-1]),
        n_excluded=n_excluded,
        unit=unit,
    )


def hoyer_sparsity(w: Any, *, exclude: Any = None) -> Tensor:
    r"""Return Hoyer's measure of how unequal the magnitudes are.

    :math:`(\sqrt{n} - \|w\|_1 / \|w\|_2) / (\sqrt{n} - 1)`: 0 when all magnitudes are
    equal, 1 when a single weight is non-zero. Invariant to scale.

    Args:
        w: One weight, or a list or dict of weights to pool.
        exclude: As in ``weight_histogram``.

    Returns:
        0-dim, in [0, 1]; NaN when all are zero or there is only one.

    References:
        Hoyer (2004), Non-negative matrix factorization with sparseness constraints,
        JMLR 5.

    Example:
        >>> hoyer_sparsity([0.0, 0.0, 0.0, 2.0]).item()
        1.0
    """
    parts, _ = _kept(w, exclude=exclude)
    magnitudes = torch.cat(parts).abs()
    magnitudes = magnitudes / magnitudes.amax()
    root = math.sqrt(len(magnitudes))
    ratio = magnitudes.sum() / magnitudes.square().sum().sqrt()
    # 0/0 in either division is NaN, which is the answer there.
    return ((root - ratio) / (root - 1)).clamp(0, 1)


def weight_rms(w: Any, *, exclude: Any = None) -> Tensor:
    r"""Return the root mean square :math:`\sqrt{\sum_i w_i^2 / n}`.

    Args:
        w: One weight, or a list or dict of weights to pool.
        exclude: As in ``weight_histogram``.

    Returns:
        0-dim, in the units of the weight.

    Example:
        >>> weight_rms([3.0, -4.0, 0.0, 0.0]).item()
        2.5
    """
    parts, _ = _kept(w, exclude=exclude)
    return _rms(torch.cat(parts))


# -- helpers -----------------------------------------------------------------
def _kept(w: Any, *, exclude: Any) -> tuple[list[Tensor], int]:
    # Every tensor, flat and without what is excluded, and how many that is.
    tensors = _items(w)
    masks = {} if exclude is None else _items(exclude)
    if isinstance(w, Mapping):
        same = masks.keys() <= tensors.keys()
    else:
        same = not masks or masks.keys() == tensors.keys()
    if not same:
        raise MetricError(
            f"exclude must have one mask for each weight of w ({_keys(tensors)}), got "
            f"{_keys(masks)}"
        )
    kept, n_excluded = [], 0
    for key, value in tensors.items():
        flat = as_float(value, name=_label("w", key))
        check_finite(flat, name=_label("w", key))
        if key in masks:
            mask = _mask(masks[key], like=flat, name=_label("exclude", key))
            n_excluded += int(mask.sum())
            flat = flat[~mask]
        kept.append(flat.flatten().to(torch.float64))
    if sum(map(len, kept)) == 0:
        raise MetricError(
            f"all {n_excluded} weights of w are excluded"
            if n_excluded
            else "w holds no weights; pass a tensor, or a list or dict of them"
        )
    return kept, n_excluded


def _items(value: Any) -> dict[Hashable, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    # A list of plain numbers is one weight, not many of one entry.
    if isinstance(value, list | tuple) and not all(isinstance(v, Real) for v in value):
        return dict(enumerate(value))
    return {None: value}


def _label(name: str, key: Hashable) -> str:
    return name if key is None else f"{name}[{key!r}]"


def _keys(items: Mapping[Hashable, Any]) -> str:
    return "a single one" if None in items else f"{list(items)}"


def _mask(value: Any, *, like: Tensor, name: str) -> Tensor:
    mask = as_tensor(value, plain=None)
    if mask.dtype != torch.bool or mask.shape != like.shape:
        raise MetricError(
            f"{name} must be a boolean mask of shape {tuple(like.shape)}, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.to(like.device)


def _rms(values: Tensor) -> Tensor:
    top = values.abs().amax()
    scaled = torch.where(top > 0, values / top, 0.0)
    return top * scaled.square().mean().sqrt()


def _over_rms(values: Tensor) -> Tensor:
    rms = _rms(values) if len(values) else values.new_zeros(())
    return values / rms if rms > 0 else values


def _checked_edges(edges: Any) -> Tensor:
    limits = as_float(edges, name="edges").to(torch.float64)
    rising = limits.ndim == 1 and bool((limits.diff() > 0).all())
    if not (rising and len(limits) > 1 and limits[0] >= 0):
        raise UsageError(
            f"edges must be at least 2 strictly ascending magnitudes from 0 or above, "
            f"got {limits.tolist()}"
        )
    return limits


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
