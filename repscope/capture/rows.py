"""From what a layer returned to rows: one row a sample, one column a feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from repscope.errors import UnsupportedOutput

REDUCTIONS = ("auto", "pool", "positions", "tokens", "flatten")
"""How values of more than two dimensions become rows: see `to_rows`."""

_MASKS = ("attention_mask", "src_key_padding_mask")

# Outputs of these have channels second also when they are three-dimensional.
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
# ... and outputs of these have features last, whatever their dimensions.
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RMSNorm)


def leaves(
    value: object, *, layer: str, path: str = "", verb: str = "returned"
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(path, tensor)`` for every floating tensor in a layer's output.

    A plain tensor has the path ``""``; a dict entry ``h`` has ``h``; the first entry
    of a tuple in it ``h[0]``; a complex tensor has two parts, ``real`` and ``imag``.
    ``None`` and tensors without floating values (masks, token ids), plain numbers and
    text are passed over; quantized ones are given by the values they stand for.

    Args:
        value: What the module returned.
        layer: Name for the message.
        path: Where ``value`` sits in the whole output.
        verb: What the layer did with it, for the message.

    Yields:
        Paths and tensors, in order.

    Raises:
        UnsupportedOutput: If a value of another type is met.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return
    if isinstance(value, Tensor):
        yield from _parts(value, path)
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        named = [(f"{path}.{key}".lstrip("."), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        named = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    else:
        raise UnsupportedOutput(
            f"layer {layer!r} {verb} a {type(value).__name__} "
            f"{'at ' + path + ' ' if path else ''}that cannot be read as tensors; "
            f"record a layer inside or after it"
        )
    for name, item in named:
        yield from leaves(item, layer=layer, path=name, verb=verb)


def _parts(value: Tensor, path: str) -> Iterator[tuple[str, Tensor]]:
    if value.is_complex():
        for part in ("real", "imag"):
            yield f"{path}.{part}".lstrip("."), getattr(value, part)
    elif value.is_quantized:
        yield path, value.dequantize()
    elif value.is_floating_point():
        yield path, value


def has_channels_first(
    value: Tensor, module: nn.Module, *, maps: set[torch.Size]
) -> bool:
    """Return whether ``value`` is a map ``(N, C, *S)`` rather than tokens.

    Args:
        value: One output tensor of a layer.
        module: The layer.
        maps: Shapes of the maps met so far in this forward; gets this one.

    Returns:
        True for outputs of convolutions, their norms and pools; for what has the shape
        of such an output earlier in the forward (a ReLU after a ``Conv1d``); and for
        anything of more than three dimensions; never after a layer with features last.
    """
    if value.ndim < 3 or isinstance(module, _FEATURES_LAST):
        return False
    known = isinstance(module, _CHANNELS_FIRST) or value.shape in maps
    if known:
        maps.add(value.shape)
    return known or value.ndim > 3


def to_rows(
    value: Tensor,
    *,
    channels_first: bool,
    how: str = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``value`` as rows ``(n_rows, n_features)``.

    ``(N, D)`` stays as it is and ``(N,)`` becomes one column. What has more dimensions
    is a map ``(N, C, *S)`` or tokens ``(N, *T, D)``:

    ============= ==================================== ==============================
    ``how``       maps                                 tokens
    ============= ==================================== ==============================
    ``auto``      ``(N, C)``, the mean over space      ``(N * T, D)``, one row each
    ``pool``      ``(N, C)``, the mean over space      ``(N, D)``, the mean over time
    ``positions`` ``(N * S, C)``, one row a position   ``(N * T, D)``
    ``tokens``    ``(N * C * ..., S)``, the last       ``(N * T, D)``
                  dimension as features
    ``flatten``   ``(N, C * S)``                       ``(N, T * D)``
    ============= ==================================== ==============================

    Args:
        value: One output tensor of a layer.
        channels_first: Whether three and more dimensions are a map.
        how: One of `REDUCTIONS`.
        mask: Which tokens ``(N, T)`` a mean over time is of; None: all.

    Returns:
        A two-dimensional tensor; the rows of an example follow each other.

    Example:
        >>> to_rows(torch.ones(2, 3, 4, 4), channels_first=True).shape
        torch.Size([2, 3])
        >>> to_rows(torch.ones(2, 3, 4, 4), channels_first=True, how="positions").shape
        torch.Size([32, 3])
        >>> to_rows(torch.ones(2, 5, 8), channels_first=False).shape
        torch.Size([10, 8])
    """
    if value.ndim == 2:
        return value
    if value.ndim < 2:
        return value.reshape(-1, 1)
    if how == "flatten":
        return value.flatten(1)
    if how == "pool" or (how == "auto" and channels_first):
        # Sums of half-precision maps would lose bits; the mean is taken in float32.
        wide = value.float() if value.element_size() < 4 else value
        if mask is not None and mask.shape == value.shape[:-1]:
            weight = mask.to(wide)[..., None]
            mean = torch.where(weight > 0, wide, 0.0).sum(1) / weight.sum(1)
            return mean.to(value.dtype)
        flat = wide.flatten(2) if channels_first else wide.flatten(1, -2).mT
        return flat.mean(-1).to(value.dtype)
    if how == "positions" and channels_first:
        value = value.movedim(1, -1)
    return value.flatten(0, -2)


def mask_among(inputs: Mapping[str, object]) -> Tensor | None:
    """Return which tokens ``(N, T)`` count, if a model is told under a known name.

    Args:
        inputs: Keyword arguments of a model: ``attention_mask`` has ones where a token
            counts, ``src_key_padding_mask`` where it is padding.

    Returns:
        A boolean tensor, or None.
    """
    for name in _MASKS:
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
            # A copy: the caller may use his tensor again.
            counts = mask.detach().to(torch.bool, copy=True)
            return counts if name == "attention_mask" else ~counts
    return None
