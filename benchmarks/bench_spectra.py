"""Covariances, eigenvalues and spectra: RepScope against the ways people write them.

Each case alternates its routes within one run and prints ratios of CPU time, by the
median, to the first one; every value is compared with float64 LAPACK. One thread.

    python benchmarks/bench_spectra.py [--repeats 7] [--cases NAME ...] [--json FILE]

The largest case, eight matrices of 4096 x 4096, takes numpy about a minute each time
and is left out unless it is named: ``--cases eigenvalues-4096``. On a machine with a
CUDA device ``--cases cuda`` measures the routes of the device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# numpy's BLAS reads this when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

import repscope as rs
from repscope import store
from repscope.errors import UsageError
from repscope.linalg.choice import ROUTES
from repscope.snapshot import Snapshot

Route = Callable[[], object]
Report = dict[str, dict[str, float]]

REPORT: dict[str, Report] = {}


# -- measuring ---------------------------------------------------------------
def alternate(
    routes: dict[str, Route], repeats: int, *, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, object]]:
    """Return the median seconds of each route, and what it returned at last."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    results: dict[str, object] = {}
    for name, route in routes.items():  # libraries load, caches fill
        results[name] = route()
    for _ in range(repeats):
        for name, route in routes.items():
            start = clock()
            results[name] = route()
            times[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}, results


def show(
    title: str,
    seconds: dict[str, float],
    errors: dict[str, float] | None = None,
    *,
    limit: float | None = None,
    target: tuple[str, float] | None = None,
) -> None:
    base = next(iter(seconds.values()))
    print(f"\n{title}")
    for name, taken in seconds.items():
        line = f"  {name:44} {taken * 1e3:10.2f} ms {base / taken:8.2f}x"
        if errors and name in errors:
            line += f"   error {errors[name]:.1e}"
            if limit:
                line += (
                    f" ({'within' if errors[name] <= limit else 'BEYOND'} {limit:.1e})"
                )
        if target and name == target[0]:
            met = "met" if base / taken >= target[1] else "NOT MET"
            line += f"   target {target[1]:g}x: {met}"
        print(line)
    REPORT[title] = {
        name: {"seconds": taken, "times": base / taken}
        | ({"error": errors[name]} if errors and name in errors else {})
        for name, taken in seconds.items()
    }


def features(count: int, n: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1).pow(-0.35)
    return torch.relu(torch.randn(count, n, d, generator=generator) * scale)


def effective_rank(values: np.ndarray) -> float:
    shares = np.clip(values, 0, None) / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def numpy_ranks(X: Tensor) -> list[float]:
    return [
        effective_rank(np.linalg.eigvalsh(np.cov(x, rowvar=False))) for x in X.numpy()
    ]


def relative(found: object, exact: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) / exact - 1).max())


# -- cases -------------------------------------------------------------------
def eigenvalues(count: int, n: int, target: float) -> Callable[[int], None]:
    def case(repeats: int) -> None:
        distinct = min(count, 4)
        rows = features(distinct, 2 * n, n).double()
        C64 = torch.stack([rs.covariance(x) for x in rows])
        C64 = C64.repeat(count // distinct, 1, 1)
        C32 = C64.float()
        exact = np.linalg.eigvalsh(C32[:distinct].double().numpy())[:, ::-1]

        def error(values: object) -> float:
            w = np.sort(np.asarray(values, np.float64)[:distinct])[:, ::-1]
            return float((np.abs(w - exact) / exact[:, :1]).max())

        routes: dict[str, Route] = {
            "np.linalg.eigvalsh, float64": lambda: np.linalg.eigvalsh(C64.numpy()),
            "np.linalg.eigvalsh, given float32": lambda: np.linalg.eigvalsh(
                C32.numpy()
            ),
            "torch.linalg.eigvalsh, float64": lambda: torch.linalg.eigvalsh(C64),
            "torch.linalg.eigvalsh, float32": lambda: torch.linalg.eigvalsh(C32),
            "rs.eigvalsh, float64": lambda: rs.eigvalsh(C64),
            "rs.eigvalsh, float32": lambda: rs.eigvalsh(C32),
        }
        if n < 4096:
            for name in ("torch", "scipy"):
                routes[f"rs.eigvalsh(backend={name!r}), float32"] = lambda name=name: (
                    rs.eigvalsh(C32, backend=name)
                )
        else:  # minutes each
            kept = ("np.linalg.eigvalsh, float64", "torch.linalg.eigvalsh, float32")
            kept = (*kept, "rs.eigvalsh, float32")
            routes = {name: routes[name] for name in kept}
        seconds, results = alternate(routes, repeats, clock=time.process_time)
        limit = 4 * n**0.5 * torch.finfo(torch.float32).eps
        errors = {name: error(result) for name, result in results.items()}
        show(
            f"eigenvalues, {count} of {n} x {n}",
            seconds,
            errors,
            limit=limit,
            target=("rs.eigvalsh, float32", target),
        )

    return case


def few_rows(count: int, n: int, d: int, target: float) -> Callable[[int], None]:
    def case(repeats: int) -> None:
        X = features(count, n, d)
        matrices = list(X)
        exact = np.array(numpy_ranks(X[:4].double()))
        routes: dict[str, Route] = {
            "np.cov + np.linalg.eigvalsh": lambda: numpy_ranks(X),
            "torch.linalg.svdvals of the centred rows": lambda: [
                effective_rank(torch.linalg.svdvals(x - x.mean(0)).square().numpy())
                for x in X
            ],
            "rs.spectra": lambda: [
                float(s.effective_rank) for s in rs.spectra(matrices)
            ],
            'rs.spectra(accuracy="ranks")': lambda: [
                float(s.effective_rank) for s in rs.spectra(matrices, accuracy="ranks")
            ],
            "rs.participation_ratio_from_features": lambda: (
                rs.participation_ratio_from_features(X)
            ),
        }
        seconds, results = alternate(routes, repeats, clock=time.process_time)
        errors = {
            name: relative(results[name][:4], exact)  # type: ignore[index]
            for name in list(routes)[:-1]
        }
        show(
            f"spectra, {count} of {n} rows x {d} features",
            seconds,
            errors,
            target=('rs.spectra(accuracy="ranks")', target),
        )

    return case


def covariances(repeats: int) -> None:
    size = 2048
    square = torch.randn(size, size).numpy()
    out = np.empty_like(square)
    for n, d in ((8192, 512), (8192, 1024), (4096, 2048)):
        X = features(1, n, d)[0]
        exact = np.cov(X.double().numpy(), rowvar=False)
        routes: dict[str, Route] = {
            "np.cov": lambda X=X: np.cov(X.numpy(), rowvar=False),
            "torch.cov": lambda X=X: torch.cov(X.T),
            "rs.covariance": lambda X=X: rs.covariance(X),
            "rs.covariance(dtype=torch.float32)": lambda X=X: rs.covariance(
                X, dtype=torch.float32
            ),
            f"sgemm, {size} x {size}": lambda: np.matmul(square, square, out=out),
        }
        seconds, results = alternate(routes, repeats, clock=time.process_time)
        peak = 2 * size**3 / seconds.pop(f"sgemm, {size} x {size}")
        errors = {
            name: float(np.abs(np.asarray(results[name]) - exact).max() / exact.max())
            for name in seconds
        }
        title = f"covariance, {n} x {d}; sgemm reaches {peak / 1e9:.0f} GFlop/s"
        show(title, seconds, errors)
        for name, taken in seconds.items():
            share = n * d * d / taken / peak
            REPORT[title][name]["share of sgemm"] = share
            print(f"    {name:42} {share:6.1%} of sgemm, in useful flops")


def large_means(repeats: int) -> None:
    del repeats
    X = torch.randn(20_000, 64) + 1e6
    exact = np.cov(X.double().numpy() - 1e6, rowvar=False)
    uncentred = (X.T @ X / len(X) - torch.outer(X.mean(0), X.mean(0))).numpy()
    found = {
        "E[xx] - E[x]E[x] in float32": uncentred,
        "torch.cov": torch.cov(X.T).numpy(),
        "rs.covariance(dtype=torch.float32)": rs.covariance(X, dtype=torch.float32),
        "rs.covariance": rs.covariance(X).numpy(),
    }
    print("\ncovariance of features with mean / standard deviation = 1e6")
    for name, C in found.items():
        error = float(np.abs(np.asarray(C) - exact).max() / exact.max())
        REPORT.setdefault("large means", {})[name] = {"error": error}
        print(f"  {name:44} error {error:.1e}")


def stores(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for steps in (50, 100, 200, 400):
            runs[steps] = Path(folder) / str(steps)
            writer = store.create(runs[steps], meta={})
            X = features(4 * steps, 512, 100).reshape(steps, 4, 512, 100)
            for step, layers in enumerate(X):
                named = {("outputs", f"l{i}"): x for i, x in enumerate(layers)}
                writer.append(Snapshot(step, named))
            writer.close()
        opened = {steps: rs.open(path) for steps, path in runs.items()}
        run = opened[200]

        def loop(metric: Callable[[np.ndarray], float]) -> list[float]:
            return [
                metric(np.cov(run.read(f"l{i}", step=step).numpy(), rowvar=False))
                for step in run.steps
                for i in range(4)
            ]

        def ranks() -> list[float]:
            return loop(lambda C: effective_rank(np.linalg.eigvalsh(C)))

        def measured(*metrics: str) -> list[float]:
            return rs.measure(run, metrics=metrics)["value"].tolist()

        routes: dict[str, Route] = {
            "np.cov + np.linalg.eigvalsh, loop": ranks,
            'rs.measure(metrics=["effective_rank"])': lambda: measured(
                "effective_rank"
            ),
            "rs.measure, effective_rank and of sigma": lambda: measured(
                "effective_rank", "effective_rank_sigma"
            ),
        }
        seconds, results = alternate(routes, repeats, clock=time.process_time)
        first, second, _ = results.values()
        errors = {list(routes)[1]: relative(second, np.array(first))}
        title = "a store of 200 checkpoints x 4 layers x 512 rows x 100 units"
        show(title, seconds, errors, target=(list(routes)[1], 1.5))
        routes = {
            "np.cov, trace and norm, loop": lambda: loop(
                lambda C: float(np.trace(C) ** 2 / (C * C).sum())
            ),
            'rs.measure(metrics=["participation_ratio"])': lambda: measured(
                "participation_ratio"
            ),
        }
        seconds, results = alternate(routes, repeats, clock=time.process_time)
        first, second = results.values()
        show(
            title + ", no decomposition",
            seconds,
            {list(routes)[1]: relative(second, np.array(first))},
        )

        growth = {
            str(steps): lambda steps=steps: rs.measure(
                opened[steps], metrics=["effective_rank"]
            )
            for steps in runs
        }
        seconds, _ = alternate(growth, repeats, clock=time.process_time)
        per_step = {int(s): 1e3 * taken / int(s) for s, taken in seconds.items()}
        print("\nrs.measure: ms per checkpoint, and peak of memory")
        for steps, cost in per_step.items():
            print(
                f"  {steps:4} checkpoints {cost:8.3f} ms "
                f"({cost / per_step[50]:.2f} of 50) {peak_memory(runs[steps]):8.1f} MB"
            )
        REPORT["growth"] = {str(s): {"ms": cost} for s, cost in per_step.items()}


def peak_memory(path: Path) -> float:
    """Return by how many MB `rs.measure` of a store raises resident memory (Linux)."""
    code = """
import sys, torch
torch.set_num_threads(1)
import repscope as rs
small, run = rs.open(sys.argv[1]), rs.open(sys.argv[2])
rs.measure(small, metrics=["effective_rank"])
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
rs.measure(run, metrics=["effective_rank"])
print((status("VmHWM") - before) / 1024)
"""
    small = path.parent / "50"
    command = [sys.executable, "-c", code, str(small), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def cuda(repeats: int) -> None:
    if not torch.cuda.is_available():
        print("\nno CUDA device: the routes on CUDA are not measured")
        return
    print(f"\n{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    for count, n in ((500, 100), (60, 512), (64, 1024)):
        distinct = min(count, 4)
        C = torch.stack([rs.covariance(x) for x in features(distinct, 2 * n, n)])
        exact = np.linalg.eigvalsh(C.numpy())[:, ::-1]
        on_device = C.float().repeat(count // distinct, 1, 1).cuda()
        routes: dict[str, Route] = {
            "torch.linalg.eigvalsh": lambda C=on_device: torch.linalg.eigvalsh(C),
            "rs.eigvalsh": lambda C=on_device: rs.eigvalsh(C),
        }
        for name in ROUTES:
            route = partial(rs.eigvalsh, on_device, backend=name)
            try:
                route()
            except UsageError as error:
                print(f"  backend={name!r} is left out: {error}")
            else:
                routes[f"rs.eigvalsh(backend={name!r})"] = route
        seconds, results = alternate(routes, repeats, clock=clock)
        errors = {}
        for name, values in results.items():
            w = values[:distinct].double().cpu().sort(descending=True).values.numpy()
            errors[name] = float((np.abs(w - exact) / exact[:, :1]).max())
        limit = 4 * n**0.5 * torch.finfo(torch.float32).eps
        show(f"CUDA eigenvalues, {count} of {n} x {n}", seconds, errors, limit=limit)


CASES: dict[str, Callable[[int], None]] = {
    "eigenvalues-100": eigenvalues(500, 100, 1.3),
    "eigenvalues-512": eigenvalues(60, 512, 1.3),
    "eigenvalues-4096": eigenvalues(8, 4096, 2.5),
    "rows-512": few_rows(20, 128, 512, 20),
    "rows-2048": few_rows(3, 128, 2048, 300),
    "covariance": covariances,
    "large-means": large_means,
    "store": stores,
    "cuda": cuda,
}
USUAL = [name for name in CASES if name not in ("eigenvalues-4096", "cuda")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=USUAL)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, numpy {np.__version__}; CPU time, one thread")
    for name in arguments.cases:
        CASES[name](arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(REPORT, indent=2))


if __name__ == "__main__":
    main()
