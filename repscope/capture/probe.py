"""A fixed batch, run through the model without leaving a trace in it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repscope._checks import as_labels
from repscope.capture.rows import mask_among
from repscope.errors import UsageError

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
            else as_labels(labels, n_samples=self.n_samples, device=torch.device("cpu"))
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
        with untouched(model), torch.no_grad():
            model.eval()
            for batch in self._batches:
                for start in range(0, batch.n, self.batch_size):
                    inputs, mask, n = batch.chunk(start, self.batch_size)
                    before(n, mask)
                    self.forward(model, inputs)

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
        lengths = {len(tensor) for tensor in _tensors(inputs)}
        if len(lengths) != 1:
            raise UsageError(
                "a probe needs inputs whose tensors share their first dimension, got "
                f"lengths {sorted(lengths)}"
            )
        self.n = lengths.pop()
        # A copy: the batch stays fixed whatever the caller does with his tensors.
        self.inputs = _slice(inputs, 0, None)
        self.mask = None if mask is None else torch.as_tensor(mask).detach().clone()
        if self.mask is None and isinstance(self.inputs, Mapping):
            self.mask = mask_among(self.inputs)
        if self.mask is not None and len(self.mask) != self.n:
            raise UsageError(f"mask= has {len(self.mask)} rows for {self.n} samples")

    def chunk(self, start: int, most: int) -> tuple[Inputs, Tensor | None, int]:
        """Return some examples, their mask and their number."""
        stop = min(start + most, self.n)
        mask = None if self.mask is None else self.mask[start:stop]
        return _slice(self.inputs, start, stop), mask, stop - start


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
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    # Some models draw from Python's or numpy's global generator in their forward.
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002 - the global one is the point
            for module, training in flags:
                # The attribute, not train(): a user's train() may do other work.
                module.training = training
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer
                    # Writing equal bytes would still bump the version counter.
                    if buffer is None or saved is None:
                        continue
                    if not _same_bits(buffer, saved):
                        buffer.copy_(saved)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(
            a.isnan(), b.isnan()
        )
    return torch.equal(a, b)


def _call(model: nn.Module, inputs: Any) -> object:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def _tensors(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [value for value in values if isinstance(value, Tensor)]


def _slice(inputs: Inputs, start: int, stop: int | None) -> Inputs:
    """Return some rows as tensors of their own: a model may work in place."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop].detach().clone()
        return value

    if isinstance(inputs, Tensor):
        return inputs[start:stop].detach().clone()
    if isinstance(inputs, Mapping):
        return {key: cut(value) for key, value in inputs.items()}
    return tuple(cut(value) for value in inputs)
