"""Effective ranks of many activation matrices: RepScope against loops over numpy.

All routes are checked against float64 LAPACK in the same run; ratios are to the first.

    python benchmarks/bench_spectra.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import repscope as rs

CASES = {"200 x (512 x 100)": (200, 512, 100), "20 x (128 x 1024)": (20, 128, 1024)}


def data(count: int, n: int, d: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1).pow(-0.35)
    return [
        torch.relu(torch.randn(n, d, generator=generator) * scale) for _ in range(count)
    ]


def of_values(values: np.ndarray) -> float:
    shares = np.clip(values, 0, None) / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def numpy_loop(X: list[Tensor]) -> list[float]:
    return [of_values(np.linalg.eigvalsh(np.cov(x.numpy(), rowvar=False))) for x in X]


def torch_loop(X: list[Tensor]) -> list[float]:
    return [of_values(torch.linalg.eigvalsh(torch.cov(x.T)).numpy()) for x in X]


def svd_loop(X: list[Tensor]) -> list[float]:
    return [of_values(torch.linalg.svdvals(x - x.mean(0)).square().numpy()) for x in X]


def ours(X: list[Tensor]) -> list[float]:
    return [float(s.effective_rank) for s in rs.spectra(X)]


ROUTES: dict[str, Callable[[list[Tensor]], list[float]]] = {
    "np.cov + np.linalg.eigvalsh loop": numpy_loop,
    "torch.cov + torch.linalg.eigvalsh loop": torch_loop,
    "torch.linalg.svdvals loop": svd_loop,
    "rs.spectra": ours,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for title, shape in CASES.items():
        X = data(*shape)
        exact = np.array(numpy_loop([x.double() for x in X]))
        times: dict[str, list[float]] = {name: [] for name in ROUTES}
        errors = {}
        for _ in range(arguments.repeats):
            for name, route in ROUTES.items():
                start = time.process_time()
                found = np.array(route(X))
                times[name].append(time.process_time() - start)
                errors[name] = float(np.abs(found / exact - 1).max())
        base = statistics.median(times["np.cov + np.linalg.eigvalsh loop"])
        print(f"{title}, float32, one thread, torch {torch.__version__}: CPU time")
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(
                f"  {name:40} {median * 1e3:9.1f} ms   {base / median:6.2f}x as fast   "
                f"error {errors[name]:.1e}"
            )


if __name__ == "__main__":
    main()
