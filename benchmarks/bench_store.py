"""What a store costs: writing against a flat file, reading against np.load(mmap).

Writing: rows of 1 KiB (128 float32 in each of two layers) until they are durable. The
flat file gets the same bytes with ``os.write`` and an fsync every 64 MiB; the third
mode is h5py with a flush and an fsync for every 64 MiB, which is not crash safe.
Reading: chunks that were verified before, and apart from it the first touch, which
compares checksums. Everything alternates within one run, from a warm page cache.

    python benchmarks/bench_store.py [--megabytes 256] [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from repscope import store
from repscope.snapshot import Snapshot

LAYERS = (("outputs", "a"), ("outputs", "b"))
SYNC_EVERY = 2**26
Rows = tuple[Tensor, Tensor]
Times = dict[str, list[float]]


# -- writing -----------------------------------------------------------------
def into_a_store(folder: Path, steps: list[Rows]) -> None:
    writer = store.create(folder / "run", meta={})
    for step, rows in enumerate(steps):
        writer.append(Snapshot(step, dict(zip(LAYERS, rows, strict=True))))
    writer.close()


def into_a_flat_file(folder: Path, steps: list[Rows]) -> None:
    with (folder / "flat").open("wb", buffering=0) as file:
        waiting = 0
        for rows in steps:
            for tensor in rows:
                waiting += file.write(tensor.numpy()) or 0
            if waiting >= SYNC_EVERY:
                os.fsync(file)
                waiting = 0
        os.fsync(file)


def into_h5py(folder: Path, steps: list[Rows]) -> None:
    with h5py.File(folder / "h5", "w") as file, (folder / "h5").open("rb") as synced:
        sets = [
            file.create_dataset(name, (0, 128), "f4", maxshape=(None, 128),
                                chunks=(2048, 128))  # 1 MiB
            for _, name in LAYERS
        ]  # fmt: skip
        waiting = 0
        for rows in steps:
            for target, tensor in zip(sets, rows, strict=True):
                target.resize(len(target) + len(tensor), axis=0)
                target[-len(tensor) :] = tensor.numpy()
                waiting += tensor.nbytes
            if waiting >= SYNC_EVERY:
                file.flush()
                os.fsync(synced)
                waiting = 0
        file.flush()
        os.fsync(synced)


def writing(megabytes: int, rows: int, repeats: int) -> None:
    steps = [
        (torch.randn(rows, 128), torch.randn(rows, 128))
        for _ in range(megabytes * 2**10 // rows)
    ]
    modes = (into_a_flat_file, into_a_store, into_h5py)
    wall: Times = {mode.__name__: [] for mode in modes}
    cpu: Times = {mode.__name__: [] for mode in modes}
    for _ in range(repeats):
        for mode in modes:
            with tempfile.TemporaryDirectory(dir=".") as folder:
                os.sync()
                start, busy = time.perf_counter(), time.process_time()
                mode(Path(folder), steps)
                cpu[mode.__name__].append(time.process_time() - busy)
                wall[mode.__name__].append(time.perf_counter() - start)
    print(f"write {megabytes} MiB, {rows} rows of 1 KiB a step, until durable")
    for name in wall:
        rate = len(steps) * rows / statistics.median(wall[name])
        print(f"  {name.replace('_', ' '):18} {rate / 1000:7.0f} k rows/s   "
              f"CPU {against(cpu[name], cpu['into_a_flat_file'])}")  # fmt: skip


def against(times: list[float], base: list[float]) -> str:
    """Return the ratios of times measured side by side, as words."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, high = min(ratios), max(ratios)
    return f"{statistics.median(ratios):6.2f}x  ({low:.2f} to {high:.2f})"


# -- reading -----------------------------------------------------------------
def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def reading(megabytes: int, repeats: int) -> None:
    n_steps, shape = 2 * megabytes, (512, 256)  # 512 KiB a step
    values = torch.randn(n_steps, *shape)
    times: Times = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=".") as name:
            folder = Path(name)
            np.save(folder / "flat.npy", values.numpy())
            with_writer(folder / "run", values)
            with_writer(folder / "untouched", values)
            with h5py.File(folder / "run.h5", "w") as file:
                file.create_dataset("a", data=values.numpy(), chunks=(1, *shape))
            for what, seconds in reads(folder, n_steps):
                times.setdefault(what, []).append(seconds)
    print(f"read {n_steps} steps of {shape[0]} samples x {shape[1]} units, float32")
    for what, all_times in times.items():
        base = times[what.split(",")[0] + ", np.load(mmap)"]
        print(f"  {what:46} {statistics.median(all_times) * 1e3:9.3f} ms   "
              f"{against(all_times, base)}")  # fmt: skip


def with_writer(path: Path, values: Tensor) -> None:
    writer = store.create(path, meta={})
    for step, rows in enumerate(values):
        writer.append(Snapshot(step, {("outputs", "a"): rows}))
    writer.close()


def reads(folder: Path, n_steps: int) -> list[tuple[str, float]]:
    """Return every kind of read and its seconds (the mean of many, for one step)."""
    run, flat = store.open(folder / "run"), np.load(folder / "flat.npy", mmap_mode="r")
    some = range(0, n_steps, max(1, n_steps // 64))
    rs_first = timed(lambda: [run.read("a", step) for step in some])
    np_first = timed(lambda: [flat[step].copy() for step in some])
    rs_step = timed(lambda: [run.read("a", step) for step in some])
    np_step = timed(lambda: [flat[step].copy() for step in some])
    whole = store.open(folder / "untouched")
    series_first = timed(lambda: unit(whole, n_steps))
    series = timed(lambda: unit(whole, n_steps))
    flat[:, :, 7].copy()
    np_series = timed(lambda: flat[:, :, 7].copy())
    with h5py.File(folder / "run.h5") as file:
        data = file["a"]
        h5_step = timed(lambda: [data[step] for step in some])
        h5_series = timed(lambda: data[:, :, 7])
    return [
        ("one step, np.load(mmap)", np_step / len(some)),
        ("one step, np.load(mmap) first touch", np_first / len(some)),
        ("one step, rs.open", rs_step / len(some)),
        ("one step, rs.open first touch", rs_first / len(some)),
        ("one step, h5py", h5_step / len(some)),
        ("one unit's series, np.load(mmap)", np_series),
        ("one unit's series, rs.open", series),
        ("one unit's series, rs.open first touch", series_first),
        ("one unit's series, h5py", h5_series),
    ]


def unit(run: store.Run, n_steps: int) -> Tensor:
    return run.series("a", steps=range(n_steps), units=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for rows in (128, 8):
        writing(arguments.megabytes, rows, arguments.repeats)
    reading(arguments.megabytes // 2, arguments.repeats)


if __name__ == "__main__":
    main()
