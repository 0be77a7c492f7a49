"""``repscope demo``, ``study`` and ``report``: run what is missing, then draw."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from repscope.errors import UsageError
from repscope.report.study import Outcome, build
from repscope.report.table import text_table
from repscope.studies import STUDIES, load, plan, sweep


def demo(arguments: argparse.Namespace) -> None:
    """Run all studies and report on them."""
    _run(arguments, list(STUDIES), arguments.out)


def study(arguments: argparse.Namespace) -> None:
    """Run one study and report on it."""
    out = arguments.out or Path("runs") / f"{arguments.name}-{arguments.data}"
    _run(arguments, [arguments.name], out)


def report(arguments: argparse.Namespace) -> None:
    """Report on the finished runs of a folder."""
    _show(build(arguments.folder, progress=_say))


def _run(arguments: argparse.Namespace, studies: Sequence[str], out: Path) -> None:
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise UsageError("--seeds and --jobs must be at least 1")
    configs = plan(
        studies,
        data=arguments.data,
        seeds=range(arguments.seeds),
        optimizers=arguments.optimizers,
    )
    data = load(arguments.data, data_dir=arguments.data_dir)  # fail before any work
    _say(
        f"data {data.name} ({len(data.x_train)} training, {len(data.x_test)} test "
        f"images)   runs {len(configs)}   workers {arguments.jobs} x 1 thread   "
        f"into {out}"
    )
    started = time.monotonic()
    finished = sweep(
        configs, out / "stores", jobs=arguments.jobs, data_dir=arguments.data_dir
    )
    bar = tqdm(finished, total=len(configs), desc="train", unit="run", disable=None)
    done = []
    for item in bar:
        done.append(item)
        if bar.disable and not item.reused:
            _say(f"[{len(done)}/{len(configs)}] {item.path.name}")
    reused = sum(item.reused for item in done)
    _say(
        f"trained {len(done) - reused}, reused {reused} "
        f"({time.monotonic() - started:.0f} s); measuring and drawing"
    )
    stores = [item.path for item in done]
    _show(build(out, stores=stores, jobs=arguments.jobs, progress=_say))


def _show(outcome: Outcome) -> None:
    for title, (header, rows), note in outcome.tables:
        if rows:
            sides = "lrrl" if header[-1] == "claim" else None
            print(f"\n{title}\n{text_table(header, rows, align=sides)}")
            if note:
                print(note)
    print(f"\nreport  {outcome.report}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
