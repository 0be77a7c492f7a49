"""Read a run."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np
from torch import Tensor

from repscope._checks import check_choice
from repscope.errors import UnknownName, UsageError, suggest
from repscope.linalg.moments import Moments
from repscope.snapshot import EXAMPLES, Snapshot, StreamKey, stream_name
from repscope.store import shards
from repscope.store.chunks import describe
from repscope.store.contents import Trust
from repscope.store.display import as_html, as_text
from repscope.store.index import LABELS, RESERVED, SCALARS, Index, as_slice, is_rows

if TYPE_CHECKING:
    import pandas as pd


def open(path: str | os.PathLike[str], *, trust: Trust = "default") -> Run:
    """Open the store of a run for reading.

    Nothing on disk is changed and no lock is needed, so a run can be read while it is
    being recorded: what was acknowledged is seen, whole batches at a time.

    Args:
        path: The directory that a Recorder made, or the one file that it or
            ``repscope pack`` made. A file ``a.h5`` that is still being recorded is
            found in ``a.h5.rscope``. A folder of the stores ``rank-0``, ``rank-1``, ...
            of the ranks of one job is one run: rows and labels are those of all
            ranks, in order; moments are merged and scalars averaged; all else is that
            of rank 0. A step counts if all ranks have it.
        trust: ``"default"`` refuses, in a packed file, whatever RepScope never writes:
            links, data in other files, foreign filters, sizes that cannot be. In a
            directory no byte of a segment goes through HDF5. ``"untrusted"`` is for
            stores of strangers: every file is looked at first, in a child process with
            limits of memory and time; symbolic links are refused too, and a record may
            have at most 1 GiB.

    Returns:
        The run; its tensors are read when asked for.

    Raises:
        NotAStore: If there is no store.
        CorruptSegment: If its manifest is damaged.
        UntrustedStore: If it holds what a store never has.
        ShardMismatch: If the store of a rank is missing, or is of another job.

    Example:
        >>> import tempfile, torch
        >>> from repscope.snapshot import Snapshot
        >>> from repscope.store import create, open
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = create(f"{folder}/run", meta={"seed": 0})
        ...     writer.append(Snapshot(3, {("outputs", "fc"): torch.ones(2, 4)}))
        ...     writer.close()
        ...     run = open(f"{folder}/run")
        ...     run.steps, run.read("fc").shape
        ([3], torch.Size([2, 4]))
    """  # noqa: DOC502 - raised by those who look
    check_choice(trust, ("default", "untrusted"), name="trust")
    return Run(Path(path), trust=trust)


class Run:
    """What was recorded in one run.

    Args:
        path: The store.
        trust: As for `open`.
    """

    def __init__(self, path: Path, *, trust: Trust = "default") -> None:
        self.path = path
        self._where = path.absolute()  # a script may change its folder meanwhile
        self._trust: Trust = trust
        self.refresh()

    def refresh(self) -> Run:
        """Pick up what was acknowledged since.

        Returns:
            The run itself.
        """
        self._catalog = shards.catalog(self._where, trust=self._trust)
        return self

    def __reduce__(self) -> tuple[Callable[..., Run], tuple[Path]]:
        return functools.partial(open, trust=self._trust), (self._where,)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    # -- what there is -------------------------------------------------------
    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    @property
    def meta(self) -> dict[str, Any]:
        """What was noted about the run; later notes win."""
        return dict(self._catalog.meta)

    @property
    def closed(self) -> bool:
        """Whether the writer closed the run, rather than still write or die."""
        return self._catalog.closed

    @property
    def progress(self) -> int:
        """Optimizer updates done when the run was last made durable."""
        return self._catalog.done

    @property
    def nbytes(self) -> int:
        """Bytes of the segments on disk."""
        return self._catalog.nbytes

    @property
    def streams(self) -> list[StreamKey]:
        """Every ``(target, layer)``, in order of first appearance."""
        return [key for key in self._catalog.streams() if key[0] != EXAMPLES]

    @property
    def layers(self) -> list[str]:
        """Layers whose outputs were recorded, in order of first appearance."""
        return [layer for target, layer in self.streams if target == "outputs"]

    @property
    def targets(self) -> list[str]:
        """Recorded targets, in order of first appearance."""
        return list(dict.fromkeys(target for target, _ in self.streams))

    @property
    def steps(self) -> list[int]:
        """Ascending steps at which at least one stream was recorded."""
        return list(self._catalog.steps)

    @property
    def tags(self) -> dict[str, int]:
        """Step of every tag; the latest use of a tag counts."""
        return {
            tag: self._catalog.step(record)
            for tag, record in self._catalog.tags.items()
        }

    @property
    def shapes(self) -> dict[StreamKey, tuple[int, ...]]:
        """Shape of the latest record of every stream; of moments, of the covariance."""
        catalog = self._catalog
        found = {key: catalog.shape(key, catalog.last[key]) for key in self.streams}
        return {
            key: (shape[-1], shape[-1]) if key[0] == "moments" else shape
            for key, shape in found.items()
        }

    # -- what it holds -------------------------------------------------------
    def read(
        self,
        layer: str,
        step: int = -1,
        *,
        target: str = "outputs",
        tag: str | None = None,
    ) -> Tensor:
        """Return a copy of one record of one stream.

        Args:
            layer: Layer or parameter name.
            step: A recorded step, or -1 for the last one that has this stream. Of a
                step recorded twice, the latest record counts.
            target: What was recorded of the layer.
            tag: Choose the record by its tag instead.

        Returns:
            Activations ``(n_samples, n_features)``, or a tensor of the parameter's
            shape, in the recorded dtype.
        """
        key = self._key(target, layer)
        return self._catalog.load(key, self._record(key, step, tag))

    def moments(self, layer: str, step: int = -1, *, tag: str | None = None) -> Moments:
        """Return mean and covariance of a layer, streamed while it was recorded.

        Args:
            layer: Layer name.
            step: A recorded step, or -1 for the last one that has them.
            tag: Choose the record by its tag instead.

        Returns:
            Moments of the rows of the sampled steps since the record before.

        Raises:
            UnknownName: If the layer or the step has none.
            MetricError: If what was recorded is not finite.

        Example:
            >>> import tempfile, torch
            >>> from repscope.store import create, open
            >>> seen = Moments().update(torch.eye(2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     writer = create(f"{folder}/run", meta={})
            ...     streams = {("moments", "fc"): seen.to_tensor()}
            ...     writer.append(Snapshot(5, streams))
            ...     writer.close()
            ...     open(f"{folder}/run").moments("fc")
            Moments(count=2, n_features=2)
        """  # noqa: DOC502 - raised where it is found and unpacked
        return Moments.from_tensor(self.read(layer, step, target="moments", tag=tag))

    def series(
        self,
        layer: str,
        *,
        steps: slice | Iterable[int] | None = None,
        units: int | slice | Sequence[int] | None = None,
        target: str = "outputs",
    ) -> Tensor:
        """Return a copy of one stream at many steps, or of some of its units.

        Only the bytes asked for are copied: one unit over a whole run costs little.

        Args:
            layer: Layer or parameter name.
            steps: Recorded steps, or a slice of step numbers such as
                ``slice(100, 200)``, of which those that were recorded count; ``None``
                takes all. Of a step recorded twice, the latest record counts.
            units: Chooses along the last axis (features of activations); ``None``
                takes all, an int drops the axis.
            target: What was recorded of the layer.

        Returns:
            ``(n_steps, n_samples, n_units)`` for activations, ``(n_steps, *shape)`` for
            tensors such as weights, in the recorded dtype.

        Raises:
            UnknownName: If a step was not recorded, or no step is in the slice.
            UsageError: If the steps differ in their number of rows, or ``units`` does
                not fit.

        Example:
            >>> import tempfile, torch
            >>> from repscope.store import create, open
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     writer = create(f"{folder}/run", meta={})
            ...     for step in range(3):
            ...         rows = torch.full((2, 4), float(step))
            ...         writer.append(Snapshot(step, {("outputs", "fc"): rows}))
            ...     writer.close()
            ...     open(f"{folder}/run").series("fc", units=1)
            tensor([[0., 0.],
                    [1., 1.],
                    [2., 2.]])
        """  # noqa: DOC502 - partly raised by the catalog
        key = self._key(target, layer)
        records = self._records(key, steps)
        if not records:
            raise UsageError("a series has at least one step; steps= chooses none")
        shape = self._catalog.shape(key, records[0])
        if units is None:
            return self._catalog.series(key, records, slice(None))
        if len(shape) < 1 + is_rows(target):
            raise UsageError(
                f"{target} of layer {layer!r} have no axis of units: each step is a "
                f"tensor of shape {shape}; leave units= out"
            )
        try:
            chosen = _indices(shape[-1], units)
        except (IndexError, TypeError) as error:
            raise UsageError(
                f"units={units!r} does not fit {target} of layer {layer!r}, which have "
                f"{shape[-1]} ({error})"
            ) from None
        found = self._catalog.series(key, records, chosen)
        return found[..., 0] if _is_single(units) else found

    def _records(
        self, key: StreamKey, steps: slice | Iterable[int] | None
    ) -> list[int]:
        known, records = self._catalog.recorded(key)
        if steps is None:
            return list(map(int, records))
        if isinstance(steps, slice):
            first, stop, stride = steps.indices(int(known[-1]) + 1)
            inside = (known >= first) & (known < stop) & ((known - first) % stride == 0)
            if not inside.any():
                raise UnknownName(
                    f"{self.path} has no {key[0]} of layer {key[1]!r} at any step of "
                    f"{steps}; it was recorded at {describe(known)}"
                )
            return list(map(int, records[inside]))
        wanted = np.array([operator.index(step) for step in steps], np.int64)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        if not np.array_equal(known[at], wanted):  # -1, or a step that is not there
            return [self._record(key, step, None) for step in wanted.tolist()]
        return list(map(int, records[at]))

    def labels(
        self,
        step: int = -1,
        *,
        tag: str | None = None,
        layer: str | None = None,
        target: str = "outputs",
    ) -> Tensor | None:
        """Return the labels of one record.

        Args:
            step: A recorded step, or -1 for the last one that has labels.
            tag: Choose the record by its tag instead.
            layer: Return one label for each row of this layer: tokens take that of
                their example.
            target: What was recorded of the layer.

        Returns:
            Labels ``(n_samples,)``, with ``layer`` ``(n_rows,)``; or None if that
            record has none, or none that belong to these rows.
        """
        key = LABELS if layer is None else self._key(target, layer)
        record = self._chosen(key, step, tag)
        if record is None or not self._catalog.has(LABELS, record):
            return None
        if layer is None:
            return self._catalog.load(LABELS, record)
        unlabelled = self.meta.get("unlabelled", ())
        if not self._catalog.has(key, record) or stream_name(*key) in unlabelled:
            return None
        snapshot = self._catalog.snapshot(record, self._with_examples([key]))
        return snapshot.labels_of(layer, target=target)

    def _with_examples(self, keys: Iterable[StreamKey]) -> list[StreamKey]:
        """Return streams, and those that say which example their rows belong to."""
        found = []
        for target, layer in keys:
            beside = EXAMPLES, f"{target}:{layer}"
            known = [beside] if beside in self._catalog.last else []
            found += [(target, layer), *known]
        return found

    def scalars(self) -> pd.DataFrame:
        """Return the scalars: one row per step, one float64 column per name.

        Returns:
            Index ``step``, ascending; NaN where a step has no value. Of several values
            for one step the latest counts.
        """
        import pandas as pd

        found: dict[str, dict[int, float]] = {}
        for name, steps, values in self._catalog.columns(SCALARS):
            column = found.setdefault(name, {})
            column.update(zip(steps, values.tolist(), strict=True))
        columns = {name: pd.Series(column) for name, column in found.items()}
        table = pd.DataFrame(columns, dtype="float64").sort_index()
        table.index = table.index.astype("int64").rename("step")
        return table

    def snapshots(
        self, *, target: str | None = None, layers: Iterable[str] | None = None
    ) -> Iterator[Snapshot]:
        """Yield what was recorded, in the order of recording, one at a time.

        Args:
            target: Only this target; None for all.
            layers: Only these layers; None for all.

        Yields:
            Snapshots that have at least one of the chosen streams.
        """
        keys = self._chosen_streams(target, layers)
        for record in self._catalog.records:
            if any(self._catalog.has(key, record) for key in keys):
                yield self._catalog.snapshot(record, self._with_examples(keys))

    # -- finding -------------------------------------------------------------
    def _key(self, target: str, layer: str) -> StreamKey:
        if (target, layer) in self._catalog.last and target not in RESERVED:
            return target, layer
        if not self.streams:
            raise UnknownName(f"{self.path} has no layer {layer!r}: it holds no stream")
        if target not in self.targets:
            raise UnknownName(
                f"{self.path} has no target {target!r}{suggest(target, self.targets)}"
            )
        layers = [name for kind, name in self.streams if kind == target]
        raise UnknownName(
            f"{self.path} has no {target} of a layer {layer!r}{suggest(layer, layers)}"
        )

    def _chosen_streams(
        self, target: str | None, layers: Iterable[str] | None
    ) -> list[StreamKey]:
        keys = [key for key in self.streams if target in (None, key[0])]
        if target is not None and not keys:
            raise UnknownName(
                f"{self.path} has no target {target!r}{suggest(target, self.targets)}"
            )
        if layers is None:
            return keys
        wanted = [layers] if isinstance(layers, str) else list(layers)
        for layer in wanted:
            if layer not in (known := {name for _, name in keys}):
                raise UnknownName(
                    f"{self.path} has no layer {layer!r}{suggest(layer, known)}"
                )
        return [key for key in keys if key[1] in wanted]

    def _record(self, key: StreamKey, step: int, tag: str | None) -> int:
        record = self._chosen(key, step, tag)
        if record is None or (tag is not None and not self._catalog.has(key, record)):
            steps = self._catalog.recorded(key)[0].tolist()
            what = f"tag {tag!r}" if tag is not None else f"step {step}"
            raise UnknownName(
                f"{what} of {self.path} holds no {key[0]} of layer {key[1]!r}; it was "
                f"recorded at {_nearest(step, steps)}"
            )
        return record

    def _chosen(self, key: StreamKey, step: int, tag: str | None) -> int | None:
        """Return the record asked for; one without the stream only by its tag.

        Raises:
            UnknownName: If the step was not recorded.
        """
        catalog, step = self._catalog, operator.index(step)
        if tag is not None:
            return self._tagged(tag, step)
        if step == -1:
            latest = catalog.recorded(key)[1]
            return int(latest[-1]) if len(latest) else None
        if step not in catalog.by_step:
            raise UnknownName(
                f"{self.path} has no step {step}; recorded nearest: "
                f"{_nearest(step, catalog.steps)}"
            )
        return catalog.latest(key, step)

    def _tagged(self, tag: str, step: int) -> int:
        if step != -1:
            raise UsageError("choose a record by its step or by its tag, not by both")
        if tag not in self._catalog.tags:
            raise UnknownName(
                f"{self.path} has no tag {tag!r}{suggest(tag, self._catalog.tags)}"
            )
        return self._catalog.tags[tag]


def _indices(n: int, units: int | slice | Sequence[int]) -> Index:
    """Return which of ``n`` units are chosen; nothing as long as ``n`` is made."""
    if isinstance(units, slice):
        span = range(n)[units]
        if span.step == 1:
            return slice(span.start, span.stop)
        return np.arange(span.start, span.stop, span.step)
    many = [units] if _is_single(units) else cast("Sequence[int]", units)
    return as_slice(np.array([range(n)[operator.index(u)] for u in many], np.int64))


def _is_single(units: object) -> TypeGuard[int]:
    return hasattr(units, "__index__") and not getattr(units, "ndim", 0)


def _nearest(step: int, steps: list[int], *, n: int = 3) -> str:
    """Return the few steps nearest to ``step``, ascending, as words."""
    near = sorted(sorted(steps, key=lambda known: abs(known - step))[:n])
    more = f" (of {len(steps)})" if len(steps) > len(near) else ""
    return f"step{'s' * (len(near) != 1)} {', '.join(map(str, near)) or 'none'}{more}"
