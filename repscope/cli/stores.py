"""``repscope info``, ``check``, ``pack``, ``metrics``, ``compare`` and ``plot``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repscope import store
from repscope.report.table import text_table

if TYPE_CHECKING:
    import pandas as pd


def info(arguments: argparse.Namespace) -> None:
    """Print what a store holds."""
    run = store.open(arguments.store)
    scalars = run.scalars()
    last = {
        name: (int(column.dropna().index[-1]), float(column.dropna().iloc[-1]))
        for name, column in scalars.items()
    }
    if arguments.format == "json":
        print(json.dumps(_summary(run, last), indent=2, default=str))
        return
    state = "finished" if run.closed else "being written, or killed"
    if "interrupted" in run.meta:
        state = f"interrupted by {run.meta['interrupted']}"
    print(f"{run.path}  ({state}, {run.nbytes / 2**20:.1f} MB)")
    print(f"steps {len(run.steps)}: {_range(run.steps)}   tags: {_tags(run)}\n")
    rows = [
        [target, layer, " x ".join(map(str, run.shapes[target, layer])) or "scalar"]
        for target, layer in run.streams
    ]
    print(
        text_table(["target", "layer", "shape of the last record"], rows, align="lll")
    )
    if last:
        rows = [[str(name), f"{v:.6g}", str(step)] for name, (step, v) in last.items()]
        print("\n" + text_table(["scalar", "last value", "at step"], rows))
    print("\nconfiguration\n" + json.dumps(run.meta, indent=2))


def _summary(run: store.Run, last: dict[Any, tuple[int, float]]) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "closed": run.closed,
        "bytes": run.nbytes,
        "steps": run.steps,
        "tags": run.tags,
        "streams": [
            {"target": target, "layer": layer, "shape": run.shapes[target, layer]}
            for target, layer in run.streams
        ],
        "scalars": {name: {"step": s, "value": v} for name, (s, v) in last.items()},
        "meta": run.meta,
    }


def _range(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-2:]]
    return ", ".join(shown)


def _tags(run: store.Run) -> str:
    return ", ".join(f"{tag} at {step}" for tag, step in run.tags.items()) or "none"


def check(arguments: argparse.Namespace) -> int:
    """Print what is wrong with stores.

    Args:
        arguments: Of the command.

    Returns:
        The exit code: 1 if something is damaged.
    """
    done: dict[Path, dict[str, Any]] = {}
    checks = []
    for path in arguments.stores:
        if arguments.repair:
            done[path] = store.repair(path)
        trust: Literal["default", "untrusted"] = (
            "untrusted" if arguments.untrusted else "default"
        )
        checks.append(store.check(path, full=arguments.full, trust=trust))
    if arguments.format == "json":
        print(json.dumps([_as_json(each, done) for each in checks], indent=2))
    else:
        for number, each in enumerate(checks):
            print("\n" * (number > 0), end="")
            _print_check(each, done.get(each.path))
    return int(any(each.damaged for each in checks))


def _as_json(found: store.Check, done: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "damaged": found.damaged,
        "full": found.full,
        "repaired": done.get(found.path),
        "findings": found.to_frame().to_dict("records"),
    }


def _print_check(found: store.Check, done: dict[str, Any] | None) -> None:
    print(f"{found.path}  {'DAMAGED' if found.damaged else 'sound'}")
    if done is not None:
        words = (f"{name.replace('_', ' ')} {value}" for name, value in done.items())
        print(f"repaired: {'; '.join(words) or 'there was nothing to repair'}")
    rows = [[each.item, each.state, each.detail] for each in found.findings]
    print(text_table(["item", "state", "detail"], rows, align="lll"))


def pack(arguments: argparse.Namespace) -> None:
    """Make one file of a store."""
    before = store.open(arguments.store).nbytes
    store.pack(
        arguments.store,
        arguments.out,
        compression=arguments.compression,
        layout=arguments.layout,
    )
    after = arguments.out.stat().st_size
    rest = "as it was" if arguments.store.is_dir() else "this file now"
    print(arguments.out)
    print(
        f"{after / 2**20:.1f} MB, from {before / 2**20:.1f} MB; {arguments.store} is "
        f"{rest}",
        file=sys.stderr,
    )


def metrics(arguments: argparse.Namespace) -> None:
    """Print a table of metrics."""
    from repscope.analysis import measure

    frame = measure(arguments.stores, metrics=arguments.metric, layers=arguments.layers)
    if not arguments.all_steps:
        keys = ["run", "layer", "target", "metric"]
        frame = frame.groupby(keys, sort=False, dropna=False).tail(1)
    if frame.empty:
        print("repscope: the stores hold nothing these metrics read", file=sys.stderr)
    _print_frame(frame, arguments.format)


def compare(arguments: argparse.Namespace) -> None:
    """Print how alike networks are."""
    from repscope.networks import compare_networks

    frame = compare_networks(
        arguments.stores,
        metric=arguments.metric,
        layers=arguments.layers,
        step=arguments.step,
    )
    _print_frame(frame, arguments.format)


def _print_frame(frame: pd.DataFrame, form: str) -> None:
    from pandas.api.types import is_numeric_dtype

    if form == "csv":
        print(frame.to_csv(index=False), end="")
    elif form == "json":
        print(frame.to_json(orient="records", indent=2))
    else:
        numbers = frame.dtypes.map(is_numeric_dtype)
        sides = "".join("r" if number else "l" for number in numbers)
        print(text_table(list(frame.columns), _cells(frame), align=sides))


def _cells(frame: pd.DataFrame) -> list[list[str]]:
    def show(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    return [[show(value) for value in row] for row in frame.itertuples(index=False)]


def plot(arguments: argparse.Namespace) -> None:
    """Draw one figure into a file."""
    from repscope import plots
    from repscope.analysis import as_runs
    from repscope.report.figures import draw

    drawn = draw(arguments.kind, as_runs(arguments.stores), layer=arguments.layer)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    plots.save(drawn.figure, arguments.out)
    print(arguments.out)
    print(drawn.caption, file=sys.stderr)
