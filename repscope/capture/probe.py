"""A fixed batch, run through the model without leaving a trace in it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from repscope._checks import as_labels
from repscope.capture.rows import mask_among
from repscope.capture.targets import is_sharded
from repscope.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


class Probe:
    """A fixed batch, or several, on which a model is looked at again and again.

    Args:
        inputs: A tensor ``(n_samples, ...)``, a tuple of positional arguments or a
            mapping of keyword arguments, whose tensors share the first dimension; or a
            list of such batches, which may differ in their other dimensions.
        labels: Integer labels ``(n_samples,)`` of all batches.
        batch_size: Rows per forward; ``None`` runs each batch at once.
        forward: ``(model, inputs) -> anything``, when ``model(inputs)`` is not the
            call; receives a chunk of a batch, of the same kind.
        mask: Which tokens ``(n_samples, T)`` count: true or 1; of several batches a
            list. ``None`` takes the ``attention_mask`` of a mapping, if there is one.

    Raises:
        UsageError: If there is no tensor in a batch, its lengths differ, ``mask`` has
            another, or ``batch_size`` is not positive.

    Example:
        >>> probe = Probe(torch.ones(6, 4), labels=[0, 0, 1, 1, 2, 2], batch_size=4)
        >>> probe.n_samples
        6
        >>> Probe([{"x": torch.ones(4, 7)}, {"x": torch.ones(4, 9)}]).n_samples
        8
    """

    def __init__(
        self,
        inputs: Inputs | list[Inputs],
        labels: Any = None,
        batch_size: int | None = None,
        forward: Callable[[nn.Module, Any], object] | None = None,
        mask: Any = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be positive, got {batch_size}")
        several = isinstance(inputs, list)
        batches: list[Inputs] = inputs if several else [inputs]  # type: ignore[list-item, assignment]
        masks = mask if several and mask is not None else [mask] * len(batches)
        if len(masks) != len(batches):
            raise UsageError(f"{len(masks)} masks for {len(batches)} batches")
        self._batches = [_Batch(*pair) for pair in zip(batches, masks, strict=True)]
        self.n_samples = sum(batch.n for batch in self._batches)
        self.labels = (
            None
            if labels is None
            else as_labels(
                labels, n_samples=self.n_samples, device=torch.device("cpu")
            ).clone()
        )
        self.batch_size = batch_size or max(self.n_samples, 1)
        self.forward = forward or _call

    def run(
        self,
        model: nn.Module,
        *,
        before: Callable[[int, Tensor | None], None] = lambda n, mask: None,
    ) -> None:
        """Run the batch in eval mode without gradients, and restore everything.

        Training flags, buffers and the global random state of Python, numpy and every
        device are afterwards what they were, also when the forward raises. What a
        model keeps elsewhere (a ``torch.Generator`` of its own, plain attributes) is
        not known here and stays as its forward left it.

        Args:
            model: The model; its hooks see the forward.
            before: Called before each forward with its number of examples and their
                mask.
        """
        with untouched(model), torch.no_grad(), _no_cached_casts():
            for module in model.modules():
                # The attribute, not eval(): a user's eval() may do other work.
                module.training = False
            for batch in self._batches:
                for start in range(0, batch.n, self.batch_size):
                    inputs, mask, n = batch.chunk(start, self.batch_size)
                    before(n, mask)
                    self.forward(model, inputs)

    @property
    def n_forwards(self) -> int:
        """How often the model is called."""
        return -(-self.n_samples // self.batch_size)

    @property
    def sha256(self) -> str:
        """The hash of inputs and labels: stores with equal hashes are comparable."""
        digest = hashlib.sha256()
        extra = [] if self.labels is None else [self.labels]
        inputs = [t for batch in self._batches for t in _tensors(batch.inputs)]
        masks = [b.mask for b in self._batches if b.mask is not None]
        for tensor in [*inputs, *extra, *masks]:
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class _Batch:
    """Inputs of one batch, and which of their tokens count."""

    def __init__(self, inputs: Inputs, mask: Any) -> None:
        if not isinstance(inputs, Tensor | tuple | Mapping):
            raise UsageError(
                "a batch of a probe is a tensor, a tuple or a mapping, got "
                f"{type(inputs).__name__}"
            )
        lengths = {len(tensor) for tensor in _tensors(inputs) if tensor.ndim}
        if len(lengths) != 1:
            raise UsageError(
                "a probe needs inputs whose tensors share their first dimension, got "
                f"lengths {sorted(lengths)}"
            )
        self.n = lengths.pop()
        # A copy: the batch stays fixed whatever the caller does with his tensors.
        self.inputs = _cut(inputs, 0, self.n, self.n)
        self.mask = None if mask is None else torch.as_tensor(mask).detach().clone()
        if self.mask is None and isinstance(self.inputs, Mapping):
            self.mask = mask_among(self.inputs)
        if self.mask is not None and len(self.mask) != self.n:
            raise UsageError(f"mask= has {len(self.mask)} rows for {self.n} samples")

    def chunk(self, start: int, most: int) -> tuple[Inputs, Tensor | None, int]:
        """Return some examples, their mask and their number."""
        stop = min(start + most, self.n)
        mask = None if self.mask is None else self.mask[start:stop]
        return _cut(self.inputs, start, stop, self.n), mask, stop - start


def as_probe(
    value: Probe | tuple[Any, Any] | Tensor | list[Inputs] | None,
) -> Probe | None:
    """Return ``value`` as a probe: ``(x, y)`` and a bare tensor are understood.

    Args:
        value: What the user gave as ``probe=``.

    Returns:
        A probe, or ``None``.

    Raises:
        UsageError: If ``value`` is of another kind.
    """
    if value is None or isinstance(value, Probe):
        return value
    if isinstance(value, Tensor | list):
        return Probe(value)
    if isinstance(value, tuple) and len(value) == 2:
        return Probe(value[0], labels=value[1])
    raise UsageError(
        "probe= takes (inputs, labels), a tensor, a list of batches or rs.Probe(...), "
        f"got {type(value).__name__}"
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore training flags, buffers and random state of ``model`` afterwards.

    Parameters that each rank has a part of are in parts again: without a backward pass
    a forward leaves some of them whole.

    Args:
        model: The model that is run inside the block.

    Yields:
        Nothing.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    bounded = [
        (module.weight, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.max_norm is not None  # its forward changes its weight
    ]
    in_parts = [m for m in model.modules() if _is_in_parts(m)]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    # Some models draw from Python's or numpy's global generator in their forward.
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002 - the global one is the point
            for part in in_parts:
                part.reshard()
            for module, training in flags:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer
                    if buffer is not None and saved is not None:
                        _restore(buffer, saved)
                for weight, saved in bounded:
                    _restore(weight, saved)


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Neither read nor fill the weights that a region of autocast has cast before."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _restore(value: Tensor, saved: Tensor) -> None:
    # Writing equal bytes would still bump the version counter.
    if not _same_bits(value, saved):
        value.copy_(saved)


def _is_in_parts(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Return whether this is a module of FSDP2 whose parameters are sharded now."""
    return hasattr(module, "reshard") and any(map(is_sharded, module.parameters()))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or a.shape != b.shape or a.is_quantized:
        return False
    pairs = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*pairs)


def _call(model: nn.Module, inputs: Any) -> object:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def _tensors(inputs: object) -> Iterator[Tensor]:
    """Yield every tensor in inputs, however deep."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping | tuple | list):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _tensors(value)


def _cut(value: Any, start: int, stop: int, n: int) -> Any:
    """Return some of ``n`` examples, in tensors of their own: a model may change them.

    Lists and arrays of ``n`` entries are cut like tensors; anything else is passed on.
    """
    if isinstance(value, Tensor):
        return (value[start:stop] if value.ndim else value).detach().clone()
    if isinstance(value, Mapping):
        return {key: _cut(item, start, stop, n) for key, item in value.items()}
    if isinstance(value, tuple | list) and any(True for _ in _tensors(value)):
        items = [_cut(item, start, stop, n) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, tuple | list | np.ndarray) and len(value) == n:
        return value[start:stop]
    return value
