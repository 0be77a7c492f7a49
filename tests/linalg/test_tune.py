"""Which route `repscope doctor --tune` chooses, by clocks and routes of the test."""

from __future__ import annotations

from itertools import count
from statistics import median

import pytest
import torch

from repscope.linalg import choice, thresholds, tune
from repscope.linalg.routes import Unavailable
from repscope.linalg.thresholds import ANY

CPU = torch.device("cpu")


def seconds(**per_route):
    """Return a measure under which routes take these seconds, in each of 3 rounds."""
    return lambda calls: {name: [per_route.get(name, 9.0)] * 3 for name in calls}


def timing(measure, n=16, dtype=torch.float32):
    return tune.time_routes(n, dtype, CPU, measure=measure)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"torch": 2.0, "scipy": 1.0, "numpy": 1.5}, "scipy"),
        ({"torch": 2.0, "scipy": 1.5, "numpy": 1.0}, "numpy"),
        ({"torch": 1.0, "scipy": 2.0, "numpy": 2.0}, "torch"),
        ({"torch": 1.04, "scipy": 1.0, "numpy": 1.0}, "torch"),
        ({"torch": 1.06, "scipy": 2.0, "numpy": 1.0}, "numpy"),
    ],
)
def test_another_route_is_taken_if_it_is_faster_by_more_than_noise(times, chosen):
    assert tune.fastest(timing(seconds(**times))) == chosen


def test_what_was_measured_before_is_what_has_to_be_beaten(cache):
    table = {"float32": {ANY: "numpy"}}
    place, versions = thresholds.place_of(CPU), thresholds.versions()
    thresholds.check_writable()
    thresholds.save([thresholds.Measurement(place, versions, "2026-01-31", table)])
    found = timing(seconds(torch=1.0, numpy=1.04, scipy=2.0))
    assert (found.built_in, tune.fastest(found)) == ("torch", "numpy")
    assert tune.fastest(timing(seconds(torch=1.0, numpy=1.06))) == "torch"


def test_a_busy_moment_that_slows_a_whole_round_does_not_count():
    # By their medians, scipy took 6 and torch 7.
    rounds = {"torch": [1.0, 7.0, 7.0], "scipy": [2.0, 6.0, 14.0], "numpy": [9.0] * 3}
    measure = lambda calls: {name: rounds.get(name, [9.0] * 3) for name in calls}  # noqa: E731
    assert median(rounds["scipy"]) < median(rounds["torch"])
    assert tune.fastest(timing(measure)) == "torch"


def with_route(monkeypatch, name, change):
    right = choice.ROUTES[name]
    monkeypatch.setitem(choice.ROUTES, name, lambda C: change(right(C)))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values + 1e-3,
        lambda values: values.flip(-1),
        lambda values: torch.where(values > 0, torch.nan, values),
        lambda values: values.where(torch.arange(len(values))[:, None] < 3, 0.0),
    ],
    ids=["off", "descending", "nan", "later matrices"],
)
def test_a_wrong_route_is_neither_timed_nor_chosen(monkeypatch, change):
    with_route(monkeypatch, "scipy", change)
    found = timing(seconds(torch=2.0, scipy=1.0, numpy=2.0))
    assert "scipy" not in found.seconds
    assert "of the largest eigenvalue at n = 16" in found.wrong["scipy"]
    assert tune.fastest(found) == "torch"


def test_a_route_that_is_wrong_at_one_size_is_taken_at_none(monkeypatch):
    quick = seconds(torch=2.0, scipy=1.0, numpy=1.5)
    with_route(
        monkeypatch, "scipy", lambda values: values + 1e-3 * (values.shape[-1] == 32)
    )
    # Above the measured sizes scipy has those up to 2048 by the built-in thresholds.
    assert tune.steps([timing(quick, 16), timing(quick, 32)]) == {
        32: "numpy",
        128: "torch",
        2048: "numpy",
        ANY: "torch",
    }


def test_without_a_right_route_nothing_changes(monkeypatch):
    for name in choice.ROUTES:
        monkeypatch.setitem(choice.ROUTES, name, lambda C: C.sum(-1))
    found = timing(seconds())
    assert {"torch", "scipy", "numpy"} <= found.wrong.keys()
    assert tune.fastest(found, without=found.wrong) == "torch"


@pytest.mark.parametrize("error", [Unavailable, RuntimeError, OSError, ImportError])
def test_a_route_that_fails_leaves_the_others(monkeypatch, error):
    def fail(C):
        raise error("no such library")

    monkeypatch.setitem(choice.ROUTES, "torch", fail)
    assert tune.why_not("torch", CPU) == "no such library"
    assert tune.why_not("scipy", CPU) is None
    found = timing(seconds(scipy=2.0, numpy=1.0))
    assert found.unavailable["torch"] == "no such library"
    assert tune.fastest(found) == "numpy"


ALIKE = {"torch": 2.0, "scipy": 2.0, "numpy": 2.0}


@pytest.mark.parametrize(
    ("dtype", "quick", "expected"),
    [
        # Nothing is faster: the built-in thresholds, as far as they were measured ...
        (torch.float32, {16: None, 128: None, 256: None}, choice.built_in_steps),
        (torch.float64, {16: None, 128: None, 256: None}, choice.built_in_steps),
        # ... one size is changed, then all of them; what is larger stays as it was.
        (
            torch.float32,
            {16: None, 32: "numpy", 128: None},
            {16: "torch", 32: "numpy", 128: "torch", 2048: "scipy", ANY: "torch"},
        ),
        (
            torch.float64,
            {16: "scipy", 128: "scipy", 256: "scipy"},
            {2048: "scipy", ANY: "torch"},
        ),
        (torch.float64, {16: "numpy", 64: "numpy"}, {64: "numpy", 2048: "scipy"}),
    ],
)
def test_thresholds_follow_from_the_fastest_routes(dtype, quick, expected):
    timings = [
        timing(seconds(**(ALIKE | ({name: 1.0} if name else {}))), n, dtype)
        for n, name in quick.items()
    ]
    if callable(expected):
        expected = expected("cpu", dtype)
    assert tune.steps(timings).items() >= expected.items()


def test_the_batches_are_those_that_eigvalsh_makes_of_a_large_one():
    assert [timing(seconds(), n).batch for n in (16, 128)] == [1024, 16]
    assert timing(seconds(), 16, torch.float64).batch == 512


def test_the_plan_has_every_size_at_which_the_built_in_route_changes(monkeypatch):
    steps = {100: "torch", 8192: "scipy", ANY: "numpy"}
    monkeypatch.setitem(choice._UP_TO, ("cpu", torch.float64), steps)
    sizes = [n for n, dtype, device in tune.plan() if dtype == torch.float64]
    assert sizes == [16, 32, 64, 100, 128, 256, 512, 1024, 2048]


def test_measurements_hold_here_and_are_dated(cache):
    timings = [timing(seconds(numpy=1.0), 16, dtype) for dtype in tune.DTYPES]
    (found,) = tune.measurements(timings)
    assert found.up_to["float32"][16] == found.up_to["float64"][16] == "numpy"
    thresholds.check_writable()
    thresholds.save([found])
    choice.tuned.cache_clear()
    assert choice.order(torch.eye(16)[None])[0] == "numpy"
    assert choice.order(torch.eye(17)[None])[0] == "torch"


def test_each_model_of_cuda_device_is_measured_once(monkeypatch):
    names = ["H100", "A2", "H100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: names[d.index])
    assert [str(each) for each in tune.devices()] == ["cpu", "cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.devices() == [CPU]


# -- the clock -----------------------------------------------------------------
class Clock:
    """A clock that only calls move on."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, *durations):
        numbers = count()

        def run():
            self.calls.append(name)
            self.now += durations[min(next(numbers), len(durations) - 1)]

        return run


def test_routes_take_turns_in_changing_order():
    clock = Clock()
    calls = {"a": clock.call("a", 0.5), "b": clock.call("b", 1.0)}
    found = tune.alternate(calls, clock=clock)
    assert found == {"a": [0.5] * 5, "b": [1.0] * 5}
    assert "".join(clock.calls) == "abbaabbaab"


def test_quick_calls_are_repeated_until_their_time_can_be_read():
    clock = Clock()
    found = tune.alternate({"a": clock.call("a", 0.001)}, clock=clock)
    assert found["a"] == pytest.approx([0.001] * 25)
    assert len(clock.calls) == 1 + 24 * 20


def test_a_call_without_any_duration_comes_to_an_end():
    clock = Clock()
    assert tune.alternate({"a": clock.call("a", 0.0)}, clock=clock) == {"a": [0.0] * 25}


# -- the machine itself ----------------------------------------------------------
@pytest.mark.slow
def test_what_is_chosen_is_not_slower_than_what_is_built_in():
    timings = [
        tune.time_routes(n, dtype, CPU) for dtype in tune.DTYPES for n in (16, 128, 512)
    ]
    again = [tune.time_routes(each.n, each.dtype, CPU) for each in timings]
    for first, second in zip(timings, again, strict=True):
        assert not first.wrong
        # Chosen by one measurement, judged by another one, twice the noise apart.
        chosen = median(second.seconds[tune.fastest(first)])
        assert chosen <= median(second.seconds[first.built_in]) * tune.GAIN**2, first
