"""``repscope doctor``: this machine as RepScope sees it, and what is fastest on it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_info

from repscope import __version__
from repscope.linalg import choice, thresholds, tune
from repscope.linalg.thresholds import ANY, Steps
from repscope.linalg.tune import Timing
from repscope.report.table import text_table

_PACKAGES = ("torch", "numpy", "scipy", "h5py", "hdf5plugin", "triton")
_TUNE = "`repscope doctor --tune`"


def doctor(arguments: argparse.Namespace) -> int | None:
    """Print what RepScope finds on this machine, or measure it.

    Args:
        arguments: Of the command.

    Returns:
        130 if the measuring was interrupted.
    """
    if arguments.tune:
        return _tune(as_json=arguments.format == "json")
    found = _facts()
    if arguments.format == "json":
        print(json.dumps(found, indent=2))
    else:
        _print_facts(found)
    return None


# -- what there is -------------------------------------------------------------
def _facts() -> dict[str, Any]:
    cuda = _cuda()
    devices = tune.devices()
    routes = [
        {"device": str(device), "route": name, "why_not": tune.why_not(name, device)}
        for device in devices
        for name in choice.ROUTES
    ]
    found = {
        "versions": _versions(),
        "system": platform.platform(),
        "processor": thresholds.processor(),
        "cores": _cores(),
        "load": _load(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "blas": _blas(),  # scipy's is there now that its route was tried
        "cuda": cuda,
        "routes": routes,
        "file": _file(),
        "thresholds": [_thresholds(device) for device in devices],
    }
    return {**found, "warnings": advice(found)}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "repscope": __version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _cores() -> float:
    """Return how many cores this process may use, by affinity and by the container."""
    cores = float(os.cpu_count() or 1)
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
            cores = min(cores, int(quota) / int(period))
    return cores


def _load() -> float | None:
    """Return how many processes wanted a core in the last minute, if it is known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _blas() -> list[dict[str, Any]]:
    """Return the libraries by whose they are: a path says little, and too much."""
    build = torch.__config__.show()
    kind = re.search(r"LAPACK_INFO=(\w+)", build)
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", build)
    found = [
        {
            "of": "torch",
            "library": kind.group(1) if kind else "unknown",
            "version": mkl.group(1) if mkl else None,
            "threads": torch.get_num_threads(),
        }
    ]
    for library in sorted(threadpool_info(), key=itemgetter("filepath")):
        if library["user_api"] == "blas":
            of = Path(library["filepath"]).parent.name.removesuffix(".libs")
            details = [library["version"], library.get("architecture")]
            found.append(
                {
                    "of": of,
                    "library": library["internal_api"],
                    "version": " ".join(filter(None, details)) or None,
                    "threads": library["num_threads"],
                }
            )
    return found


def _cuda() -> dict[str, Any]:
    devices = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if usable else 0):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        gib = round(device.total_memory / 2**30, 1)
        devices.append({"name": device.name, "capability": capability, "GiB": gib})
    return {
        "torch": torch.version.cuda,
        "driver": _driver(),
        "devices": devices,
        "why_not": " ".join(str(each.message) for each in said) or None,
    }


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        version = re.search(r"\d+\.\d+[.\d]*", text)
        return version.group() if version else None
    return None


def _file() -> str | None:
    """Return where measured thresholds are kept, if there is a place for them."""
    with contextlib.suppress(OSError):
        file = thresholds.path()
        # What is pasted into a bug report need not name the user.
        with contextlib.suppress(RuntimeError, ValueError):
            return str("~" / file.relative_to(Path.home()))
        return str(file)
    return None


def _thresholds(device: torch.device) -> dict[str, Any]:
    used, why = choice.tuned(device, torch.get_num_threads())
    names = [str(dtype).removeprefix("torch.") for dtype in tune.DTYPES]
    tables = {
        name: (used.up_to if used else {}).get(name)
        or choice.built_in_steps(device.type, dtype)
        for name, dtype in zip(names, tune.DTYPES, strict=True)
    }
    return {
        "device": str(device),
        "name": str(thresholds.place_of(device)),
        "measured": used and used.date,
        "why_not": why,
        "up_to": {name: _pairs(steps) for name, steps in tables.items()},
    }


def _pairs(steps: Steps) -> list[tuple[int | None, str]]:
    return [(None if n == ANY else n, route) for n, route in steps.items()]


def advice(found: dict[str, Any]) -> list[str]:
    """Return what the user can mend.

    Args:
        found: What `doctor` prints as JSON.

    Returns:
        Sentences that name the next step.
    """
    threads, cores, load = found["threads"], found["cores"], found["load"] or 0.0
    said = []
    if threads > cores:
        said.append(
            f"torch takes {threads} threads, but this process may use {cores:g} cores: "
            f"set OMP_NUM_THREADS={max(1, int(cores))}"
        )
    elif threads > 1 and found["OMP_NUM_THREADS"] is None and load > cores / 2:
        said.append(
            f"in the last minute {load:.1f} processes shared {cores:g} cores, and "
            f"torch takes {threads} threads in each: set OMP_NUM_THREADS=1 where "
            f"several run"
        )
    for blas in found["blas"][1:]:
        if blas["library"] != "openblas" and blas["threads"] > threads:
            said.append(
                f"the BLAS of {blas['of']} ({blas['library']}) takes {blas['threads']} "
                f"threads, torch {threads}, and RepScope limits only OpenBLAS: set "
                f"OMP_NUM_THREADS={threads}"
            )
    cuda = found["cuda"]
    if cuda["why_not"]:
        said.append(f"torch cannot use CUDA: {cuda['why_not']}")
    elif cuda["driver"] and not cuda["torch"]:
        said.append(
            f"there is an NVIDIA driver ({cuda['driver']}), but this torch is built "
            f"without CUDA: install one that has it"
        )
    for each in found["thresholds"]:
        if each["why_not"] not in (None, thresholds.OFF):
            said.append(
                f"the measured thresholds are not used for {each['device']}: "
                f"{each['why_not']}; {_TUNE} measures again"
            )
    return said


def _print_facts(found: dict[str, Any]) -> None:
    omp = found["OMP_NUM_THREADS"]
    cuda = found["cuda"]
    devices = [
        f"{each['name']} ({each['GiB']} GiB, capability {each['capability']})"
        for each in cuda["devices"]
    ]
    built = f"torch for CUDA {cuda['torch']}" if cuda["torch"] else "torch without CUDA"
    rows = [
        ("system", found["system"]),
        ("processor", f"{found['processor']}, {found['cores']:g} cores"),
        ("threads", f"{found['threads']} (OMP_NUM_THREADS {omp or 'is not set'})"),
        ("CUDA", f"{', '.join(devices) or 'no device'} ({built}, driver "
                 f"{cuda['driver'] or 'not found'})"),
        *((name, v or "not installed") for name, v in found["versions"].items()),
        *((f"BLAS of {blas['of']}", _blas_in_words(blas)) for blas in found["blas"]),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    print("\nroutes to eigenvalues")
    cells = [
        [r["device"], r["route"], r["why_not"] or "works"] for r in found["routes"]
    ]
    print(text_table(["device", "route", "here"], cells, align="lll"))
    print("\nfastest route by size of the matrix")
    cells = [
        [each["device"], dtype, _in_words(pairs), _origin(each["measured"])]
        for each in found["thresholds"]
        for dtype, pairs in each["up_to"].items()
    ]
    print(text_table(["device", "dtype", "route", "from"], cells, align="llll"))
    print("\n".join(_notes(found)))
    for text in found["warnings"]:
        print(f"\nwarning: {text}")


def _blas_in_words(blas: dict[str, Any]) -> str:
    name = " ".join(filter(None, [blas["library"], blas["version"]]))
    return f"{name}, {blas['threads']} thread{'s' if blas['threads'] > 1 else ''}"


def _origin(measured: str | None) -> str:
    return f"measured {measured}" if measured else "built in"


def _notes(found: dict[str, Any]) -> list[str]:
    """Return what the table of thresholds does not say."""
    each = found["thresholds"]
    if any(one["why_not"] == thresholds.OFF for one in each):
        notes = [f"measured ones are not used: {thresholds.OFF}"]
    elif any(one["measured"] for one in each):
        notes = [f"measured ones are kept in {found['file']}"]
    else:
        notes = [f"{_TUNE} measures them on this machine"]
    if found["threads"] > 1 and not each[0]["measured"]:
        notes.append(
            "on several threads, batches go to scipy (float32, above 32) or numpy "
            "(float64) where it says torch"
        )
    return notes


def _in_words(pairs: Sequence[tuple[int | None, str]]) -> str:
    """Return thresholds as a line.

    Example:
        >>> _in_words([(128, "torch"), (None, "scipy")])
        'torch up to 128, then scipy'
    """
    parts = [
        f"{route} up to {n}" if n is not None else f"then {route}" for n, route in pairs
    ]
    return ", ".join(parts).removeprefix("then ")


# -- measuring -----------------------------------------------------------------
def _tune(*, as_json: bool) -> int | None:
    thresholds.check_writable()
    plan = tune.plan()
    _say(
        f"measuring {len(plan)} kinds of matrices, about a minute; Ctrl-C leaves the "
        f"thresholds as they are"
    )
    timings = []
    try:
        for number, (n, dtype, device) in enumerate(plan, 1):
            timings.append(tune.time_routes(n, dtype, device))
            _say(f"[{number}/{len(plan)}] {device} {_short(dtype)} {n} x {n}")
    except KeyboardInterrupt:
        _say("\nrepscope: interrupted; the thresholds are as they were")
        return 130
    measured = tune.measurements(timings)
    thresholds.save(measured)
    groups = tune.grouped(timings)
    if as_json:
        rows = [row for group in groups for row in _rows(group)]
        print(json.dumps({"file": _file(), "timings": rows}, indent=2))
        return None
    on_cpu = {
        (each.dtype, each.n): each.per_matrix(tune.NUMPY)
        for each in timings
        if each.device.type == "cpu"
    }
    for group in groups:
        _print_timings(group, on_cpu)
    print(f"\nwritten to {_file()}")
    if thresholds.switched_off():
        _say(f"they are not used as long as {thresholds.OFF}")
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(group: Sequence[Timing]) -> list[dict[str, Any]]:
    taken = tune.choices(group)
    return [
        {
            "device": str(timing.device),
            "dtype": _short(timing.dtype),
            "n": timing.n,
            "batch": timing.batch,
            "seconds_per_matrix": {
                name: timing.per_matrix(name) for name in timing.seconds
            },
            "unavailable": timing.unavailable,
            "wrong": timing.wrong,
            "built_in": timing.built_in,
            "chosen": taken[timing.n],
        }
        for timing in group
    ]


def _print_timings(
    group: Sequence[Timing], on_cpu: Mapping[tuple[torch.dtype, int], float | None]
) -> None:
    place, dtype = thresholds.place_of(group[0].device), _short(group[0].dtype)
    print(f"\n{place}, {dtype}: ms for a matrix, x times as fast as {tune.NUMPY}")
    names = [
        name for name in choice.ROUTES if any(name in each.seconds for each in group)
    ]
    taken = tune.choices(group)
    rows = []
    for each in group:
        base = on_cpu.get((each.dtype, each.n))
        cells = [_cell(each.per_matrix(name), base) for name in names]
        row = [str(each.n), str(each.batch), *cells, _cell(base)]
        rows.append([*row, each.built_in, taken[each.n]])
    header = ["n", "batch", *names, "np.linalg", "built in", "chosen"]
    print(text_table(header, rows, align="r" * (len(header) - 2) + "ll"))
    for name, why in {k: v for each in group for k, v in each.wrong.items()}.items():
        print(f"{name} is wrong and never chosen: {why}")
    for each in group:
        if taken[each.n] != each.built_in:
            print(f"n = {each.n}: {_change(each, taken[each.n])}")
    print(f"thresholds: {_in_words(_pairs(tune.steps(group)))}")


def _cell(seconds: float | None, base: float | None = None) -> str | None:
    if seconds is None:
        return None
    ms = f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
    return f"{ms} {base / seconds:5.2f}x" if base else ms


def _change(timing: Timing, chosen: str) -> str:
    before, now = timing.per_matrix(timing.built_in), timing.per_matrix(chosen)
    gain = f", {before / now:.2f}x as fast" if before and now else ""
    return f"{chosen} in place of {timing.built_in}{gain}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
