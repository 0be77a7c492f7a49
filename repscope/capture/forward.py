"""What one forward of a model leaves: rows of every hooked layer, in memory of ours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from repscope.capture.choice import Choice
from repscope.capture.pool import Pool
from repscope.capture.rows import has_channels_first, leaves, to_rows
from repscope.capture.targets import is_sharded
from repscope.errors import InsideTransform, UnsupportedLayout, UnsupportedOutput
from repscope.snapshot import StreamKey

_USUAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Fill = Callable[[Tensor], None]


class Rows(NamedTuple):
    """Rows ``(n_rows, n_features)`` and where they come from.

    Attributes:
        values: The rows.
        n_examples: Examples they are of.
        ordered: Whether they follow the order of the examples.
        examples: Example of each row, when examples have unequal numbers of rows.
        chosen: Positions of these rows among all rows; None when all are here.
        total: Rows before the choice.
        n_tokens: Tokens of an example that have a row each; 0 of what are no tokens.
    """

    values: Tensor
    n_examples: int
    ordered: bool = True
    examples: Tensor | None = None
    chosen: Tensor | None = None
    total: int = 0
    n_tokens: int = 0


class _Reading(NamedTuple):
    """How a tensor is read.

    Attributes:
        second: Examples are its second dimension.
        ordered: Whether one of its dimensions is that of the examples.
        channels_first: Whether it is a map.
    """

    second: bool
    ordered: bool
    channels_first: bool


_USUAL_READING = _Reading(second=False, ordered=True, channels_first=False)


@dataclass(frozen=True)
class Settings:
    """How values become rows.

    Attributes:
        targets: What to copy, of the targets that forwards deliver.
        reduce: One of `REDUCTIONS`.
        dtype: What rows are recorded in; None keeps what the layer returned.
        choice: Which rows to keep; None keeps all.
        pool: Where memory for them comes from.
    """

    targets: frozenset[str] = frozenset({"outputs"})
    reduce: str = "auto"
    dtype: torch.dtype | None = None
    choice: Choice | None = None
    pool: Pool = field(default_factory=Pool)


@dataclass
class Forward:
    """One forward of the whole model (or calls of its parts, when ``n`` is unknown).

    Attributes:
        n: Examples that went in.
        settings: How values become rows.
        fail: Called with what goes wrong in a backward pass.
        by_root: Whether the whole model runs, rather than some part of it.
        mask: Which tokens ``(n, T)`` count; None when all do.
        totals: Rows of each stream so far, with earlier forwards of this record.
        pieces: What was copied; None where a gradient has not arrived.
        awaited: Of each layer the calls whose gradients only a second forward, which
            activation checkpointing makes in the backward pass, can deliver.
    """

    n: int | None
    settings: Settings
    fail: Callable[[Exception], None]
    by_root: bool = False
    mask: Tensor | None = None
    totals: dict[StreamKey, int] = field(default_factory=dict)
    pieces: dict[StreamKey, list[Rows | None]] = field(
        default_factory=lambda: defaultdict(list)
    )
    awaited: dict[str, list[list[Fill]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _calls: dict[StreamKey, int] = field(default_factory=lambda: defaultdict(int))
    _seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _maps: set[torch.Size] = field(default_factory=set)

    @property
    def n_examples(self) -> int:
        """Examples that went in, or that came out of the first layer that ran."""
        return next(iter(self._seen.values()), 0) if self.n is None else self.n

    def take(
        self,
        target: str,
        layer: str,
        module: nn.Module,
        value: object,
        *,
        time_first: bool = False,
    ) -> int:
        """Look at what a layer was given or returned.

        Args:
            target: ``"inputs"`` or ``"outputs"``.
            layer: Name of the layer.
            module: The layer.
            value: What it was given or returned.
            time_first: Whether it works in a part that has time before examples.

        Returns:
            How many tensors there were.
        """
        call = self._calls[target, layer]
        self._calls[target, layer] += 1
        stream = f"{layer}@{call}" if call else layer
        wanted, found, late = self.settings.targets, 0, list[Fill]()
        verb = "was given" if target == "inputs" else "returned"
        for path, leaf in readable(value, layer=layer, verb=verb):
            found += 1
            name = f"{stream}:{path}" if path else stream
            # A recurrent layer has the states of its layers first, whatever it is told.
            states = path.startswith("[1]") and isinstance(module, nn.RNNBase)
            reading = self._reading(leaf, module, time_first=time_first, states=states)
            rows = self._rows(leaf.detach(), reading)
            if target in wanted:
                self._keep((target, name), rows)
            if target == "inputs":
                continue
            self._seen[name] += rows.n_examples
            if "moments" in wanted:
                self._keep(("moments", name), rows)
            if "output_gradients" in wanted:
                late += self._ask(name, leaf, reading, rows.total)
        if late:
            self.awaited[layer].append(late)
        return found

    def _reading(
        self, leaf: Tensor, module: nn.Module, *, time_first: bool, states: bool
    ) -> _Reading:
        """Return how a tensor is to be read, and its gradient likewise.

        Sequence modules put time first unless told otherwise (``batch_first``), and so
        do those inside of them.
        """
        if leaf.is_nested or (leaf.ndim == 2 and len(leaf) == self.n):
            return _USUAL_READING
        ordered = self.n is None or leaf.ndim == 0 or leaf.shape[0] == self.n
        if self.n is not None and leaf.ndim == 3 and leaf.shape[1] == self.n:
            own = getattr(module, "batch_first", None)
            second = own is False or (own is None and time_first) or states
            if second or not ordered:
                return _Reading(second=True, ordered=True, channels_first=False)
        first = has_channels_first(leaf, module, maps=self._maps)
        return _Reading(False, ordered, first)

    def _rows(self, leaf: Tensor, reading: _Reading) -> Rows:
        if leaf.is_nested:
            return _of_nested(leaf)
        if reading is _USUAL_READING:
            return Rows(leaf, len(leaf), total=len(leaf))
        second, ordered, first = reading
        value = leaf.transpose(0, 1) if second else leaf
        mask = None if first else self.mask
        rows = to_rows(value, channels_first=first, how=self.settings.reduce, mask=mask)
        n, total = len(value) if value.ndim else 1, len(rows)
        tokens = value.ndim == 3 and not first and total == n * value.shape[1]
        n_tokens = value.shape[1] if tokens else 0
        return Rows(rows, n, ordered, total=total, n_tokens=n_tokens)

    def _keep(self, key: StreamKey, rows: Rows) -> None:
        first = self._advance(key, rows.total)
        self.pieces[key].append(self._own(key[0], rows, first))

    def _advance(self, key: StreamKey, n: int) -> int:
        """Return how many rows a stream had so far, and count ``n`` more."""
        first = self.totals.get(key, 0)
        self.totals[key] = first + n
        return first

    def _own(self, target: str, rows: Rows, first: int) -> Rows:
        """Return chosen rows in memory of their own: an in-place layer may follow."""
        settings, values, chosen = self.settings, rows.values, None
        # A float8 number is a float32 one, and few programs read the former.
        dtype = values.dtype if values.element_size() > 1 else torch.float32
        if target != "moments":  # which keep no rows, and lose no digit
            dtype = settings.dtype or dtype
            if settings.choice is not None:
                chosen = settings.choice.among(first, rows.total)
        if chosen is not None:
            values = values[chosen.to(values.device)]
        values = settings.pool.copy(values, dtype=dtype)
        return rows._replace(values=values, chosen=chosen)

    def _ask(
        self, name: str, leaf: Tensor, reading: _Reading, total: int
    ) -> list[Fill]:
        """Let the backward pass fill a place that is in the order of the forwards.

        A hook on the tensor, before anything works on it in place, gives the gradient
        of the value that was returned. Several backward passes add up, as they do in
        the gradients of the parameters; those of `torch.autograd.grad` count too.

        Returns:
            What fills the place, when this tensor will have no gradient.
        """
        if not leaf.requires_grad and torch.is_grad_enabled():
            return []
        key = "output_gradients", name
        places, first = self.pieces[key], self._advance(key, total)
        index = len(places)
        places.append(None)

        def fill(gradient: Tensor) -> None:
            try:
                rows = self._rows(gradient.detach(), reading)
                own, before = self._own(key[0], rows, first), places[index]
                if before is not None:
                    self.settings.pool.settle()
                    own.values.add_(before.values)
                places[index] = own
            except Exception as error:  # noqa: BLE001 - must never break a backward
                self.fail(error)

        if not leaf.requires_grad:
            return [fill]
        leaf.register_hook(fill)
        return []


def _of_nested(value: Tensor) -> Rows:
    """Return the rows of a nested tensor: an example has as many as it has tokens."""
    parts = [
        part.flatten(0, -2) if part.ndim > 1 else part.reshape(-1, 1)
        for part in value.unbind()
    ]
    lengths = torch.tensor([len(part) for part in parts], device="cpu")
    examples = torch.arange(len(parts), device="cpu").repeat_interleave(lengths)
    rows = torch.cat(parts)
    return Rows(rows, len(parts), examples=examples, total=len(rows))


def readable(
    value: object, *, layer: str, verb: str = "returned"
) -> Iterable[tuple[str, Tensor]]:
    """Return the tensors with data in what a layer was given or returned, and paths.

    Args:
        value: What a layer was given or returned.
        layer: Name for the message.
        verb: Which of the two, for the message.

    Returns:
        As `leaves` yields them.
    """
    if is_usual(value):
        return (("", value),)
    return _readable(value, layer, verb)


def is_usual(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a dense floating tensor with data of its own.

    Nearly all are, and a few looks at it spare all others.
    """
    return (
        type(value) is Tensor
        and value.dtype in _USUAL
        and value.layout is torch.strided
        and not value.is_nested
        and not value.is_meta
        and not torch._C._get_tracing_state()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _readable(value: object, layer: str, verb: str) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves(value, layer=layer, verb=verb):
        check_leaf(leaf, layer=layer)
        if has_data(leaf):
            yield path, leaf


def check_leaf(leaf: Tensor, *, layer: str) -> None:
    """Refuse a tensor whose values are not simply there.

    Args:
        leaf: One tensor that a layer was given or returned.
        layer: Name for the message.

    Raises:
        InsideTransform: If a function transform runs the model.
        UnsupportedLayout: If it is sparse.
        UnsupportedOutput: If each rank has a part of it.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(leaf):
        raise InsideTransform(
            f"layer {layer!r} ran inside torch.func (vmap, grad, jvp, ...), where its "
            "output has no values of its own; record a plain forward: close() the "
            "recorder before the transform, or give it probe="
        )
    if leaf.layout not in (torch.strided, torch.jagged):
        raise UnsupportedLayout(
            f"layer {layer!r} has a tensor of layout {leaf.layout}; record a layer "
            "that returns dense tensors, or call to_dense() in the model"
        )
    if is_sharded(leaf):
        raise UnsupportedOutput(
            f"layer {layer!r} has a DTensor, of which each rank has a part; record a "
            "layer whose output is whole on every rank"
        )


def has_data(leaf: Tensor) -> bool:
    """Return whether a tensor has values, unlike those of tracers and meta devices."""
    return not (leaf.is_meta or torch._C._get_tracing_state() or is_fake(leaf))
