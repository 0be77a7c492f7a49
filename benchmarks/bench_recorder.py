"""What recording costs: a training loop with a recorder, as a ratio to none.

Loops without a recorder alternate with loops in every mode, whose order rotates from
round to round; a ratio is a mode over the mean of the two bases around it, and a target
is judged by the median. Set-up, warm-up and first imports are before the clock. The end
of what records (``close()`` with its durable commit) is inside, and also shown apart;
peers end as their users end them, without an fsync. Everything runs with one thread on
one core, but for the case with a spare core: there the training thread is clocked.

    python benchmarks/bench_recorder.py [--models mlp] [--cases idle all] [--quick]
    python benchmarks/bench_recorder.py --isolate      # microseconds a call
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import logging
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch look

import h5py
import numpy as np
import torch
from torch import Tensor, nn

import repscope as rs
from repscope.studies.models import mlp

CLOCKS = ("cpu", "thread", "wall")
CORES = sorted(os.sched_getaffinity(0))
NEVER = 10**9
MARKS = {None: "", True: "met", False: "NOT met"}
Array = np.ndarray[Any, Any]
Row = dict[str, Any]


# -- what is trained -----------------------------------------------------------
@dataclass
class Training:
    """A model, one batch, and the names of the layers to record."""

    model: nn.Module
    x: Tensor
    y: Tensor
    taps: list[str]


def train_mlp() -> Training:
    """MLP 784-512-512-10, batch 128."""
    x, y = torch.randn(128, 784), torch.randint(0, 10, (128,))
    taps = ["hidden1", "hidden2", "head"]
    return Training(mlp([784, 512, 512, 10], seed=0), x, y, taps)


def train_transformer() -> Training:
    """Transformer encoder, 2 layers, d 128, ff 512, 32x32 tokens."""
    block = nn.TransformerEncoderLayer(128, 8, 512, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    x, y = torch.randn(32, 32, 128), torch.randint(0, 10, (32 * 32,))
    taps = [f"0.layers.{i}.{name}" for i in (0, 1) for name in ("linear1", "norm2")]
    return Training(nn.Sequential(encoder, nn.Linear(128, 10)), x, y, taps)


def train_conv() -> Training:
    """Conv net, 2 conv + 2 dense, batch 64 of 3x32x32."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    return Training(model, x, y, ["1", "4", "8"])


# How to make it, and its share of the steps of the MLP.
MODELS: dict[str, tuple[Callable[[], Training], float]] = {
    "mlp": (train_mlp, 1.0), "transformer": (train_transformer, 0.1),
    "conv": (train_conv, 0.1),
}  # fmt: skip


def run(training: Training, active: Any, steps: int) -> None:
    """Train, and call the ``step`` of what records if it has one."""
    model, x, y = training.model, training.x, training.y
    step = getattr(active, "step", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step is not None:
            step(loss=loss)


# -- ways to record: each returns a context manager, maybe with step(loss=) ----
Attach = Callable[[Training, Path], AbstractContextManager[Any]]


def nothing(training: Training, folder: Path) -> AbstractContextManager[None]:
    return nullcontext()


def recorder(training: Training, folder: Path, **options: Any) -> rs.Recorder:
    return rs.Recorder(training.model, folder / "run", layers=training.taps, **options)


@contextmanager
def without_losses(training: Training, folder: Path) -> Iterator[SimpleNamespace]:
    """Yield a recorder that is never due and is told nothing at its steps."""
    with recorder(training, folder, every=NEVER) as active:
        yield SimpleNamespace(step=lambda loss: active.step(), commit=active.commit)


def hooked(training: Training, take: Callable[[str, Array], None]) -> None:
    for name in training.taps:
        training.model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: take(name, out.detach().cpu().numpy().copy())
        )


@contextmanager
def into_a_list(training: Training, folder: Path) -> Iterator[None]:
    kept: dict[str, Any] = {name: [] for name in training.taps}
    hooked(training, lambda name, rows: kept[name].append(rows))
    yield
    np.savez(folder / "run.npz", **kept)


@contextmanager
def into_hdf5(training: Training, folder: Path, **filters: Any) -> Iterator[None]:
    with h5py.File(folder / "run.h5", "w") as file:

        def take(name: str, rows: Array) -> None:
            if name not in file:  # a chunk a step: the default would rewrite each often
                shape = {"maxshape": (None, *rows.shape), "chunks": (1, *rows.shape)}
                file.create_dataset(name, (0, *rows.shape), "f4", **shape, **filters)
            target = file[name]
            target.resize(len(target) + 1, axis=0)
            target[-1] = rows

        hooked(training, take)
        yield


@contextmanager
def with_delve(training: Training, folder: Path) -> Iterator[None]:
    """Sum float64 covariances of the dense and conv layers: delve chooses them."""
    delve = importlib.import_module("delve")
    logging.getLogger("delve.logger").setLevel(logging.WARNING)
    tracker = delve.SaturationTracker(
        str(folder / "delve"), "csv", training.model, stats=["lsat", "idim"],
        device="cpu",
    )  # fmt: skip
    yield
    tracker.add_saturations()  # once an epoch


@contextmanager
def with_torchlens(training: Training, folder: Path) -> Iterator[SimpleNamespace]:
    """Trace one more forward at each step: a trace takes no part in training."""
    look = partial(importlib.import_module("torchlens").trace, training.model)
    wrappers = importlib.import_module("torchlens.backends.torch.wrappers")
    look(training.x)
    yield SimpleNamespace(step=lambda loss: look(training.x))
    wrappers.unwrap_torch()  # or the loops that follow would go through it, too


@dataclass(frozen=True)
class Mode:
    """One row of a table."""

    name: str
    attach: Attach
    target: float | None = None
    share: float = 1.0  # of the steps, for slow peers
    idle: bool = False  # the clock starts after step 0, which is always captured
    ending: bool = True  # the end of the context is inside the clock
    needs: str = "repscope"  # the package that it is about


@dataclass(frozen=True)
class Case:
    """A table: rows, the clocks that targets are about, cores, and longer loops."""

    name: str
    title: str
    modes: list[Mode]
    judged: tuple[str, ...] = ("cpu",)
    cores: int = 1
    longer: int = 1


def cases(model: str) -> list[Case]:
    again = Mode("no recorder, again (the noise)", nothing)
    most = {"mlp": 1.20, "conv": 1.35}.get(model)
    # Whole maps, as the peers keep them; by default the recorder averages over space.
    whole = partial(recorder, every=1, reduce="flatten" if model == "conv" else "auto")
    averaged = Mode("rs.Recorder, maps averaged", partial(recorder, every=1))
    never, tenth = partial(recorder, every=NEVER), partial(recorder, every=10)
    sums = partial(recorder, every=1, capture="moments")
    zipped = partial(into_hdf5, compression="gzip")
    return [
        Case("idle", "attached, not sampling", [
            again,
            Mode("rs.Recorder", without_losses, 1.005, idle=True, ending=False),
            Mode("rs.Recorder, losses recorded", never, 1.005, idle=True),
        ], longer=2),
        Case("sampled", "every 10th step, 32 rows", [
            Mode("rs.Recorder", partial(tenth, max_rows=32), 1.02),
        ], longer=4),
        Case("all", "everything, float32, one core", [
            again,
            Mode("rs.Recorder", whole, most),
            *([averaged] if model == "conv" else []),
            Mode("hook: numpy copies in a list, savez", into_a_list),
            Mode("hook: h5py, no filter", into_hdf5),
            Mode("hook: h5py, gzip 4", zipped, share=0.2),
            Mode("torchlens", with_torchlens, share=0.1, ending=False,
                 needs="torchlens"),
        ]),
        Case("all", "everything, float32, a spare core", [
            again,
            Mode("rs.Recorder", whole, 1.02),
        ], judged=("thread", "wall"), cores=2),
        Case("moments", "streaming covariance", [
            Mode("rs.Recorder, every step", sums, 1.20),
            Mode("rs.Recorder, every 10th step", partial(sums, every=10), 1.02),
            Mode("delve, every step", with_delve, share=0.5, ending=False,
                 needs="delve"),
        ], longer=2),
    ]  # fmt: skip


# -- time ----------------------------------------------------------------------
@contextmanager
def pinned(n: int) -> Iterator[None]:
    """Leave every thread of the process ``n`` of its cores."""

    def pin(cores: list[int]) -> None:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)

    pin(CORES[-n:])
    yield
    pin(CORES)


def loop(model: str, mode: Mode, steps: int) -> tuple[Array, float]:
    """Return seconds a step by every clock, and the CPU seconds of the end."""

    def clocks() -> Array:
        return np.array([time.process_time(), time.thread_time(), time.perf_counter()])

    training = MODELS[model][0]()
    run(training, None, 3)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what a mode keeps is touched for the first time
    os.sync()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        with mode.attach(training, Path(folder)) as active:
            if mode.idle:
                run(training, active, 2)
                active.commit()
            start = clocks()
            run(training, active, steps)
            end = clocks()
        ended = clocks()
    return ((ended if mode.ending else end) - start) / steps, (ended - end)[0]


def measure(model: str, case: Case, steps: int, repeats: int) -> list[Row]:
    here = [mode for mode in case.modes if importlib.util.find_spec(mode.needs)]
    base = Mode("no recorder", nothing)
    rows = {mode: Row(ratios={}, end_ms=[]) for mode in case.modes}
    with pinned(case.cores):
        for mode in here:
            loop(model, mode, 2)  # first-use imports and allocations are not the claim
        gc.collect()
        gc.freeze()  # what was imported is not walked in the middle of a loop
        before, _ = loop(model, base, steps)
        for turn in range(repeats):
            first = turn % len(here)
            for mode in here[first:] + here[:first]:
                seconds, end = loop(model, mode, max(2, round(steps * mode.share)))
                after, _ = loop(model, base, steps)
                ratios = dict(zip(CLOCKS, 2 * seconds / (before + after), strict=True))
                for clock, ratio in ratios.items():
                    rows[mode]["ratios"].setdefault(clock, []).append(float(ratio))
                rows[mode]["end_ms"].append(1e3 * end)
                before = after
    for mode, row in rows.items():
        row |= {"model": model, "case": case.title, "steps": steps, "mode": mode.name,
                "judged": case.judged, "target": mode.target, "met": None}  # fmt: skip
        if mode.target and row["ratios"]:
            medians = (statistics.median(row["ratios"][c]) for c in case.judged)
            row["met"] = max(medians) <= mode.target
    return list(rows.values())


# -- memory --------------------------------------------------------------------
KEEPERS: dict[str, Attach] = {
    "rs.Recorder, everything": partial(recorder, every=1),
    "hook: numpy copies in a list, savez": into_a_list,
}


def peaks(keeper: str, steps: int) -> tuple[float, float, float]:
    """Return MiB of this fresh process: after a tenth, and the peaks of two halves."""

    def resident(field: str) -> float:
        text = Path("/proc/self/status").read_text()
        return int(text.partition(f"{field}:")[2].split()[0]) / 1024

    torch.set_num_threads(1)
    training, found = train_mlp(), list[float]()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        with KEEPERS[keeper](training, Path(folder)) as active:
            run(training, active, steps // 10)
            start = resident("VmRSS")
            for _ in range(2):
                found.append(resident("VmHWM"))
                Path("/proc/self/clear_refs").write_text("5")  # a new peak from here
                run(training, active, steps * 9 // 20)
        found.append(resident("VmHWM"))
    return start, found[1], found[2]


def growing(steps: int) -> list[Row]:
    """Show how peaks grew; constant is under 10% of what the last half records."""
    half = 4 * 128 * (512 + 512 + 10) * (steps * 9 // 20) / 2**20
    print(f"Memory: growth of the peak from step {steps // 10} to the end of {steps} "
          f"(the MLP; {2 * half:.0f} MiB recorded there)")  # fmt: skip
    rows: list[Row] = []
    for name in KEEPERS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            start, first, last = child.submit(peaks, name, steps).result()
        growth, later = max(first, last) - start, last - first
        met = later < half / 10
        print(f"    {name:44} {growth:7.1f} MiB, of it {later:6.1f} in the last half   "
              f"constant  {MARKS[met]}")  # fmt: skip
        rows.append({"case": "memory", "mode": name, "growth_mib": growth,
                     "last_half_mib": later, "recorded_mib": 2 * half,
                     "met": met})  # fmt: skip
    return rows


# -- single calls --------------------------------------------------------------
def isolate(folder: Path, n: int = 1000) -> None:
    """Print microseconds of calls that follow a 512x512 product, as in training."""
    a, product, x = torch.randn(512, 512), torch.empty(512, 512), torch.randn(1)
    plain, empty, tapped = (nn.Sequential(nn.Identity()) for _ in range(3))
    empty[0].register_forward_hook(lambda *_: None)
    with rs.Recorder(tapped, folder / "run", layers="0", every=NEVER) as active:
        loss = tapped(x).sum()
        active.step()
        calls: dict[str, Callable[[], object]] = {
            "nothing (the clock)": lambda: None,
            "a layer without hooks": lambda: plain[0](x),
            "a layer with an empty hook": lambda: empty[0](x),
            "a layer with the recorder's hook, not due": lambda: tapped[0](x),
            "a model of one layer without hooks": lambda: plain(x),
            "a model of one layer, recorded, not due": lambda: tapped(x),
            "Recorder.step(), not due": active.step,
            "Recorder.step(loss=loss), not due": lambda: active.step(loss=loss),
        }
        took: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(n):
            for name, call in random.sample([*calls.items()], len(calls)):
                torch.mm(a, a, out=product)
                start = time.perf_counter_ns()
                call()
                took[name].append((time.perf_counter_ns() - start) / 1e3)
    print(f"microseconds after a 512x512 product, median of {n} (10% to 90%)")
    for name, us in took.items():
        low, *_, high = statistics.quantiles(us, n=10)
        print(f"  {name:43}{statistics.median(us):7.2f}   ({low:.2f} to {high:.2f})")


# -- the outcome ---------------------------------------------------------------
def show(case: Case, rows: list[Row]) -> None:
    def spread(ratios: list[float]) -> str:
        low, high = min(ratios), max(ratios)
        return f"{statistics.median(ratios):6.3f}x ({low:.3f} to {high:.3f})"

    clock = case.judged[0]
    told = {"cpu": "CPU", "thread": "training thread"}[clock]
    title = f"{case.title}, {rows[0]['steps']} steps"
    print(f"  {title:46} {told:26}{'wall':26}{'end, CPU':>9}  target")
    for row in rows:
        if not row["ratios"]:
            line = "not installed (pip install delve torchlens)"
        else:
            line = (f"{spread(row['ratios'][clock]):26}"
                    f"{spread(row['ratios']['wall']):26}"
                    f"{statistics.median(row['end_ms']):6.1f} ms  "
                    f"{row['target'] or '-':<6}  {MARKS[row['met']]}")  # fmt: skip
        print(f"    {row['mode']:44} {line}".rstrip())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What recording costs, as ratios.")
    names = ("idle", "sampled", "all", "moments", "memory")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=100, help="of the MLP, in a loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--isolate", action="store_true", help="only single calls")
    parser.add_argument("--json", type=Path, help="write the outcome there, too")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.repeats = 30, 1
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    info = Path("/proc/cpuinfo").read_text().partition("model name")[2]
    about = {"torch": torch.__version__, "cpu": info.partition("\n")[0].strip("\t :"),
             "cores": len(CORES), "date": time.strftime("%Y-%m-%d %H:%M")}  # fmt: skip
    print("torch {torch}, {cpu}, {cores} core(s) in the mask, {date}".format(**about))
    if given.isolate:
        with tempfile.TemporaryDirectory(dir=".") as folder, pinned(1):
            isolate(Path(folder))
        return
    rows: list[Row] = []
    for model in given.models if {*given.cases} - {"memory"} else ():
        make, share = MODELS[model]
        print(f"{make.__doc__} {given.repeats} round(s)")
        for case in cases(model):
            if case.name not in given.cases:
                continue
            if case.cores > len(CORES):
                print(f"  {case.title}: needs {case.cores} cores in the mask")
                continue
            steps = max(10, round(given.steps * share / 10) * 10)
            steps *= 1 if given.quick else case.longer
            found = measure(model, case, steps, given.repeats)
            show(case, found)
            rows += found
    if "memory" in given.cases:
        rows += growing(1000)
    if given.json:
        given.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
