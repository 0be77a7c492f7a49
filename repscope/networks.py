"""How alike the networks of several runs are, beside the seeds of one optimizer."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repscope._checks import check_choice
from repscope.analysis import as_runs, optimizer_of
from repscope.errors import ProbeMismatch, UnknownLayer, UsageError, suggest
from repscope.metrics.similarity import SIMILARITY_METRICS, between_within
from repscope.results import BetweenWithin
from repscope.store import Run

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("layer", "metric", "group_a", "group_b", "mean", "n_pairs"),
    *("between", "within", "ratio"),
)


def compare_networks(
    runs: str | Path | Run | Iterable[str | Path | Run],
    *,
    metric: str = "procrustes_distance",
    layers: str = "*",
    step: int = -1,
) -> pd.DataFrame:
    """Return how alike networks are between optimizers and between seeds of each.

    The outputs of a layer for one probe are compared for all pairs of runs, and pooled
    as `between_within` does: optimizers leave something of their own behind where
    ``ratio`` is above 1 (of a similarity, such as ``linear_cka``: below 1).

    Args:
        runs: Stores or their paths: at least two optimizers with at least two seeds
            each, recorded with the same probe.
        metric: ``"procrustes_distance"``, ``"linear_cka"`` or
            ``"linear_cka_debiased"``.
        layers: Glob over the layers that all runs have.
        step: A recorded step, or -1 for the last one of each run.

    Returns:
        A row for each layer and pair of optimizers, also of one with itself (between
        its seeds), with the layer's ``between``, ``within`` and ``ratio`` beside it.

    Raises:
        ProbeMismatch: If runs were not recorded on the same probe: features of
            different inputs cannot be compared.
        UsageError: If two runs of an optimizer have the same seed.
        UnknownLayer: If the runs have no such layer in common.

    References:
        Fort, Hu and Lakshminarayanan (2019), arXiv 1912.02757.
    """  # noqa: DOC502 - raised by what it calls
    import pandas as pd

    check_choice(metric, SIMILARITY_METRICS, name="metric")
    opened = as_runs(runs)
    _check_probe(opened)
    groups = _by_optimizer(opened)
    rows: list[dict[str, Any]] = []
    for layer in _common_layers(opened, layers):
        features: dict[Hashable, Any] = {
            name: _read(members, layer, step) for name, members in groups.items()
        }
        found = between_within(features, SIMILARITY_METRICS[metric])
        rows += _rows(found, layer=layer, metric=metric)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(found: BetweenWithin, **known: str) -> list[dict[str, Any]]:
    summary = {name: getattr(found, name) for name in ("between", "within", "ratio")}
    pairs = found.to_frame().to_dict("records")
    return [known | {str(k): v for k, v in pair.items()} | summary for pair in pairs]


def _read(
    members: Mapping[Hashable, Run] | list[Run], layer: str, step: int
) -> Mapping[Hashable, Tensor] | list[Tensor]:
    if isinstance(members, list):
        return [run.read(layer, step=step) for run in members]
    return {seed: run.read(layer, step=step) for seed, run in members.items()}


def _by_optimizer(
    runs: list[Run],
) -> dict[str, Mapping[Hashable, Run] | list[Run]]:
    """Return runs by optimizer: by seed if all of them name one, or else in lists.

    Raises:
        UsageError: If two runs of an optimizer have the same seed.
    """
    lists: dict[str, list[Run]] = {}
    for run in runs:
        lists.setdefault(optimizer_of(run), []).append(run)
    if any(run.meta.get("seed") is None for run in runs):
        return dict(lists)
    groups: dict[str, Mapping[Hashable, Run] | list[Run]] = {}
    for name, members in lists.items():
        by_seed: dict[Hashable, Run] = {}
        for run in members:
            other = by_seed.setdefault(run.meta["seed"], run)
            if other is not run:
                raise UsageError(
                    f"{other.path} and {run.path} are both {name} with seed "
                    f"{run.meta['seed']}; give one run a seed"
                )
        groups[name] = by_seed
    return groups


def _common_layers(runs: list[Run], pattern: str) -> list[str]:
    known = [set(run.layers) for run in runs]
    common = [layer for layer in runs[0].layers if all(layer in one for one in known)]
    found = [layer for layer in common if fnmatch.fnmatchcase(layer, pattern)]
    if not found:
        raise UnknownLayer(
            f"no layer that all {len(runs)} runs have matches {pattern!r}"
            f"{suggest(pattern, common)} (common: {', '.join(common) or 'none'})"
        )
    return found


def _check_probe(runs: list[Run]) -> None:
    first: tuple[Run, str] | None = None
    for run in runs:
        probe = run.meta.get("recorder", {}).get("probe")
        if not probe:
            raise ProbeMismatch(
                f"{run.path} was recorded on its training batches; networks can only "
                f"be compared on the same inputs: record all runs with one probe"
            )
        sha256 = str(probe["sha256"])
        if first is None:
            first = run, sha256
        elif sha256 != first[1]:
            raise ProbeMismatch(
                f"{first[0].path} and {run.path} were recorded with different probes "
                f"(sha256 {first[1][:12]} and {sha256[:12]}), whose features cannot be "
                f"compared; record all runs with one probe"
            )
