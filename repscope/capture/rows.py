"""From what a layer returned to rows: one row a sample, one column a feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from repscope.errors import UnsupportedOutput

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


def leaves(
    value: object, *, layer: str, path: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(path, tensor)`` for every floating tensor in a layer's output.

    A plain tensor has the path ``""``; a dict entry ``h`` has ``h``; the first entry
    of a tuple in it ``h[0]``. ``None`` and tensors without floating values (masks,
    token ids) are passed over.

    Args:
        value: What the module returned.
        layer: Name for the message.
        path: Where ``value`` sits in the whole output.

    Yields:
        Paths and tensors, in order.

    Raises:
        UnsupportedOutput: If a value of another type is met.
    """
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, layer=layer, path=f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, layer=layer, path=f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from leaves(fields, layer=layer, path=path)
    else:
        raise UnsupportedOutput(
            f"layer {layer!r} returned a {type(value).__name__} "
            f"{'at ' + path + ' ' if path else ''}that cannot be read as tensors; "
            f"record a layer inside or after it"
        )


def to_rows(value: Tensor, module: nn.Module) -> Tensor:
    """Return ``value`` as rows ``(n_samples, n_features)``.

    ``(N, D)`` stays as it is; ``(N, C, *S)`` maps of convolutions, norms and pools
    (and anything with more than three dimensions) are averaged over space ``S``;
    other ``(N, T, D)`` values are tokens, one row each; ``(N,)`` becomes one column.

    Args:
        value: One output tensor of a layer.
        module: The layer, which decides how three dimensions are read.

    Returns:
        A two-dimensional tensor.

    Example:
        >>> to_rows(torch.ones(2, 3, 4, 4), nn.Conv2d(1, 3, 1)).shape
        torch.Size([2, 3])
        >>> to_rows(torch.ones(2, 5, 8), nn.LayerNorm(8)).shape
        torch.Size([10, 8])
    """
    if value.ndim == 2:
        return value
    if value.ndim < 2:
        return value.reshape(-1, 1)
    if value.ndim > 3 or isinstance(module, _CHANNELS_FIRST):
        # Sums of half-precision maps would lose bits; the mean is taken in float32.
        wide = value.float() if value.element_size() < 4 else value
        return wide.flatten(2).mean(-1).to(value.dtype)
    return value.flatten(0, 1)


def concatenate(parts: list[Tensor]) -> Tensor:
    """Return the rows of several micro-batches or probe chunks as one tensor.

    Args:
        parts: At least one tensor, equal but for the first dimension.

    Returns:
        Their concatenation on the CPU.
    """
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.cpu().contiguous()
