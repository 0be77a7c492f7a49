"""Measure which route to eigenvalues is the fastest on this machine, by size."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from operator import attrgetter
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repscope.linalg import choice, thresholds
from repscope.linalg.covariance import covariance
from repscope.linalg.routes import Unavailable
from repscope.linalg.thresholds import Measurement, Steps

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
DTYPES = (torch.float32, torch.float64)
NUMPY = "np.linalg.eigvalsh"
"""What the routes are compared with: numpy as it is, on a CPU."""

# A route replaces the one in use if it is faster by this: two runs on a busy machine
# differ by some percent, and should not differ in what they choose.
GAIN = 1.05
# On a CPU the groups that `eigvalsh` makes of a large batch, on CUDA enough to fill it.
_BATCH_BYTES = {"cpu": 2**20, "cuda": 2**26}
_MATRICES = 1024

_SECONDS = 2.5  # for one size, unless five rounds take longer
_ROUNDS = (5, 25)
_SAMPLE_SECONDS = 0.02  # quick calls are repeated until their time can be read

Measure = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Timing:
    """What every route took for a batch of matrices of one size.

    Attributes:
        device: Where the matrices were.
        dtype: Their dtype.
        n: Their size.
        batch: How many there were.
        seconds: Route to seconds for the batch, one a round; `NUMPY` is among them.
        unavailable: Route to why it could not be measured.
        wrong: Route to why it must not be taken, at any size.
        built_in: The route that RepScope takes if nothing was measured.
        in_use: The route that it takes now.
    """

    device: torch.device
    dtype: torch.dtype
    n: int
    batch: int
    seconds: Mapping[str, Sequence[float]]
    unavailable: Mapping[str, str]
    wrong: Mapping[str, str]
    built_in: str
    in_use: str

    def per_matrix(self, name: str) -> float | None:
        """Return the median seconds that a route took for one matrix.

        Args:
            name: A route or `NUMPY`.

        Returns:
            Seconds, or None if it was not measured.
        """
        rounds = self.seconds.get(name)
        return median(rounds) / self.batch if rounds else None


def devices() -> list[torch.device]:
    """Return the CPU and one CUDA device of each model.

    Returns:
        The CPU first.
    """
    # With a driver that is too old there is a count all the same.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    models: dict[str, torch.device] = {}
    for index in range(count):
        device = torch.device("cuda", index)
        models.setdefault(torch.cuda.get_device_name(device), device)
    return [torch.device("cpu"), *models.values()]


def why_not(name: str, device: torch.device) -> str | None:
    """Try a route on a tiny matrix.

    Args:
        name: A key of ``choice.ROUTES``.
        device: Where the matrix is.

    Returns:
        Why the route does not work here, or None if it does.
    """
    found = _tried(name, torch.eye(2, device=device)[None])
    return found if isinstance(found, str) else None


def plan() -> list[tuple[int, torch.dtype, torch.device]]:
    """Return what there is to measure, for `time_routes`.

    Returns:
        Sizes, dtypes and devices; those sizes are among them where the built-in route
        changes.
    """
    found = []
    for device in devices():
        for dtype in DTYPES:
            changes = choice.built_in_steps(device.type, dtype)
            sizes = {*SIZES, *(n for n in changes if n < max(SIZES))}
            found += [(n, dtype, device) for n in sorted(sizes)]
    return found


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time calls in turns, so that a busy moment of the machine meets all alike.

    Args:
        calls: What to time, by name.
        clock: Returns seconds.

    Returns:
        Seconds for one call, one a round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), clock()
    least, most = _ROUNDS
    for done in range(most):
        if done >= least and clock() - start > _SECONDS:
            break
        for name in names:
            # The first round tells how often.
            quick = max(times[name][0], 1e-6) if done else math.inf
            repeats = max(1, math.ceil(_SAMPLE_SECONDS / quick))
            begin = clock()
            for _ in range(repeats):
                calls[name]()
            times[name].append((clock() - begin) / repeats)
        names.reverse()
    return times


def time_routes(
    n: int, dtype: torch.dtype, device: torch.device, *, measure: Measure = alternate
) -> Timing:
    r"""Check every route on matrices of one size and time those that are right.

    Args:
        n: The size.
        dtype: Of the matrices.
        device: Where the matrices are.
        measure: Times calls.

    Returns:
        What they took; a route is wrong if an eigenvalue differs from LAPACK's in
        float64 by more than :math:`4 \sqrt n\,\epsilon` of the largest magnitude.
    """
    C = _covariances(n, dtype, device)
    exact = np.linalg.eigvalsh(C.cpu().double().numpy())
    eps = torch.finfo(dtype).eps
    unavailable, wrong = {}, {}
    calls: dict[str, Callable[[], object]] = {}
    for name, route in choice.ROUTES.items():
        found = _tried(name, C)
        if isinstance(found, str):
            unavailable[name] = found
        elif (error := _error(found, exact)) > 4 * math.sqrt(n) * eps:
            wrong[name] = f"off by {error:.1e} of the largest eigenvalue at n = {n}"
        else:
            calls[name] = functools.partial(_finished, route, C)
    if C.is_cpu:
        calls[NUMPY] = functools.partial(np.linalg.eigvalsh, C.numpy())
    return Timing(
        device=device,
        dtype=dtype,
        n=n,
        batch=len(C),
        seconds=measure(calls),
        unavailable=unavailable,
        wrong=wrong,
        built_in=choice.built_in(C),
        in_use=choice.order(C)[0],
    )


def _covariances(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a batch with spectra that decay, as those of layers do."""
    count = _BATCH_BYTES[device.type] // (n * n * dtype.itemsize)
    count = max(1, min(_MATRICES, count))
    generator = torch.Generator().manual_seed(n)
    scale = torch.arange(1, n + 1).pow(-0.35)
    X = torch.randn(count, 2 * n, n, generator=generator) * scale
    return covariance(X).to(device, dtype)


def _tried(name: str, C: Tensor) -> Tensor | str:
    try:
        return choice.ROUTES[name](C)
    # A broken installation must not hide the other routes.
    except (Unavailable, RuntimeError, OSError, ImportError) as why:
        return str(why)


def _finished(route: Callable[[Tensor], Tensor], C: Tensor) -> None:
    route(C)
    if C.is_cuda:
        torch.cuda.synchronize(C.device)


def _error(found: Tensor, exact: np.ndarray[Any, Any]) -> float:
    off = np.abs(found.double().cpu().numpy() - exact).max(-1)
    worst = (off / np.abs(exact).max(-1)).max()
    return float(np.nan_to_num(worst, nan=np.inf))


def fastest(timing: Timing, *, without: Collection[str] = ()) -> str:
    """Return the route to take: the one in use unless another is clearly faster.

    Args:
        timing: Of one size.
        without: Routes that must not be taken.

    Returns:
        A route.
    """
    rounds = {
        name: seconds
        for name, seconds in timing.seconds.items()
        if name in choice.ROUTES and name not in without
    }
    if not rounds:
        return timing.in_use
    known = timing.in_use if timing.in_use in rounds else next(iter(rounds))

    def gain(name: str) -> float:
        # Round by round: a busy moment then slows both.
        pairs = zip(rounds[known], rounds[name], strict=True)
        return median(before / now for before, now in pairs)

    best = max(rounds, key=gain)
    return known if known == timing.in_use and gain(best) < GAIN else best


def choices(timings: Sequence[Timing]) -> dict[int, str]:
    """Return the route to take at each measured size.

    Args:
        timings: Of one device and dtype, by ascending size.

    Returns:
        Size to route. A route that was wrong at one size is taken at none.
    """
    wrong = {name for timing in timings for name in timing.wrong}
    return {timing.n: fastest(timing, without=wrong) for timing in timings}


def steps(timings: Sequence[Timing]) -> Steps:
    """Return thresholds; above the largest measured size the built-in ones.

    Args:
        timings: Of one device and dtype, by ascending size.

    Returns:
        Up to which size which route is the fastest.
    """
    found = choices(timings)
    largest, wrong = timings[-1].n, {name for each in timings for name in each.wrong}
    for n, name in choice.built_in_steps(
        timings[0].device.type, timings[0].dtype
    ).items():
        if n > largest:
            found[n] = found[largest] if name in wrong else name
    routes = [*found.values(), None]
    return {
        n: name
        for (n, name), following in zip(found.items(), routes[1:], strict=True)
        if name != following
    }


def grouped(timings: Sequence[Timing]) -> list[list[Timing]]:
    """Return timings apart by device and dtype.

    Args:
        timings: In the order of `plan`.

    Returns:
        One list for each, in the same order.
    """
    key = attrgetter("device", "dtype")
    return [[*group] for _, group in itertools.groupby(timings, key=key)]


def measurements(timings: Sequence[Timing]) -> list[Measurement]:
    """Return what is to be kept of timings.

    Args:
        timings: In the order of `plan`.

    Returns:
        One for each device.
    """
    up_to: dict[torch.device, dict[str, Steps]] = {}
    for group in grouped(timings):
        table = up_to.setdefault(group[0].device, {})
        table[str(group[0].dtype).removeprefix("torch.")] = steps(group)
    today = date.today().isoformat()
    return [
        Measurement(thresholds.place_of(device), thresholds.versions(), today, table)
        for device, table in up_to.items()
    ]
