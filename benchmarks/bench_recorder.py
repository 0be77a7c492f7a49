"""What recording costs: CPU time of a training loop, as a ratio to no recorder.

Alternatives: a hook that appends numpy copies to a list, and a hook that writes each
step into an HDF5 file with gzip. Modes alternate within one run; medians are printed.

    python benchmarks/bench_recorder.py [--steps 200] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

import repscope as rs

LAYERS = ("hidden1", "hidden2")


def model() -> nn.Sequential:
    from repscope.studies.models import mlp

    return mlp([784, 512, 512, 10], seed=0)


def hooked(net: nn.Module, take: Callable[[str, np.ndarray[Any, Any]], None]) -> None:
    for name in LAYERS:
        net.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: take(name, out.detach().cpu().numpy().copy())
        )


def nothing(net: nn.Module, folder: Path) -> Any:
    return nullcontext()


def recorder(**options: Any) -> Callable[[nn.Module, Path], Any]:
    def attach(net: nn.Module, folder: Path) -> Any:
        return rs.Recorder(net, folder / "run", layers="hidden*", **options)

    return attach


def into_a_list(net: nn.Module, folder: Path) -> Any:
    kept: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in LAYERS}
    hooked(net, lambda name, rows: kept[name].append(rows))
    return nullcontext()


def into_gzip(net: nn.Module, folder: Path) -> Any:
    file = h5py.File(folder / "run.h5", "w")
    sets = {
        name: file.create_dataset(
            name,
            (0, 128, 512),
            "f4",
            maxshape=(None, 128, 512),
            chunks=(1, 128, 512),  # the default would compress every chunk many times
            compression="gzip",
        )
        for name in LAYERS
    }

    def take(name: str, rows: np.ndarray[Any, Any]) -> None:
        target = sets[name]
        target.resize(len(target) + 1, axis=0)
        target[-1] = rows

    hooked(net, take)
    return file


def loop(attach: Callable[[nn.Module, Path], Any], steps: int) -> float:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y = torch.randn(128, 784), torch.randint(0, 10, (128,))
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        with attach(net, Path(folder)) as active:
            for _ in range(steps):
                loss = nn.functional.cross_entropy(net(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if isinstance(active, rs.Recorder):
                    active.step(loss=loss.detach())
        return time.process_time() - start


MODES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "no recorder": nothing,
    "no recorder, again (the noise)": nothing,
    "rs.Recorder, attached, never due": recorder(every=10**9),
    "rs.Recorder, every 10th step": recorder(every=10),
    "rs.Recorder, every step": recorder(every=1),
    "list of numpy copies, every step": into_a_list,
    "h5py per step with gzip": into_gzip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[float]] = {name: [] for name in MODES}
    for attach in MODES.values():
        loop(attach, 3)  # first-use imports and allocations are not the claim
    for _ in range(arguments.repeats):
        base = loop(nothing, arguments.steps)
        for name, attach in MODES.items():
            rows[name].append(loop(attach, arguments.steps) / base)
    print(
        f"MLP 784-512-512-10, batch 128, {arguments.steps} steps, one thread, torch "
        f"{torch.__version__}: CPU time over no recorder"
    )
    for name, ratios in rows.items():
        print(
            f"  {name:34} {statistics.median(ratios):6.3f}x   "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
