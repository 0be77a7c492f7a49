"""When to capture: functions from a step number to yes or no. Step 0 is always due."""

from __future__ import annotations

import bisect
import math
import operator
from collections.abc import Callable, Iterable

from repscope.errors import UsageError

Schedule = Callable[[int], bool]

NEVER = 2**63


def every(k: int) -> Schedule:
    """Return the schedule 0, k, 2k, ...

    Args:
        k: Optimizer updates between captures.

    Returns:
        A function of the step number.

    Raises:
        UsageError: If ``k`` is not a positive integer.

    Example:
        >>> [step for step in range(7) if every(3)(step)]
        [0, 3, 6]
    """
    number = _as_int(k)
    if number is None or number < 1:
        raise UsageError(f"every(k) needs a positive number of steps, got {k!r}")
    return _Every(number)


def log_spaced(n: int) -> Schedule:
    r"""Return a schedule with ``n`` captures a decade, and step 0.

    Due steps are :math:`\lfloor 10^{i/n} \rceil` for :math:`i = 0, 1, 2, \ldots`

    Args:
        n: Captures per factor of 10 in the step number.

    Returns:
        A function of the step number.

    Raises:
        UsageError: If ``n`` is not a positive integer.

    Example:
        >>> [step for step in range(101) if log_spaced(2)(step)]
        [0, 1, 3, 10, 32, 100]
    """
    number = _as_int(n)
    if number is None or number < 1:
        raise UsageError(f"log_spaced(n) needs a positive count, got {n!r}")
    return _LogSpaced(number)


def at_steps(steps: Iterable[int]) -> Schedule:
    """Return the schedule of exactly these steps, and step 0.

    Args:
        steps: Step numbers (optimizer updates done).

    Returns:
        A function of the step number.

    Raises:
        UsageError: If a step is negative or not an integer.

    Example:
        >>> [step for step in range(9) if at_steps([2, 5])(step)]
        [0, 2, 5]
    """
    wanted = []
    for step in steps:
        number = _as_int(step)
        if number is None or number < 0:
            raise UsageError(f"at_steps needs step numbers >= 0, got {step!r}")
        wanted.append(number)
    return _AtSteps(frozenset([0, *wanted]))


def _as_int(value: object) -> int | None:
    """Return an integer of any library as one of Python's; None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)


class _Every:
    def __init__(self, k: int) -> None:
        self._k = k

    def __call__(self, step: int) -> bool:
        return step % self._k == 0

    def next(self, step: int) -> int:
        return (step // self._k + 1) * self._k


class _LogSpaced:
    def __init__(self, n: int) -> None:
        self._n = n

    def __call__(self, step: int) -> bool:
        return step == 0 or (step > 0 and self.next(step - 1) == step)

    def next(self, step: int) -> int:
        i = math.floor(self._n * math.log10(step)) if step > 0 else 0
        while (due := round(10 ** (i / self._n))) <= step:
            i += 1
        return due


class _AtSteps:
    """A schedule that ends: how many captures there will be is known."""

    def __init__(self, steps: frozenset[int]) -> None:
        self.steps = steps
        self._sorted = sorted(steps)

    def __call__(self, step: int) -> bool:
        return step in self.steps

    def next(self, step: int) -> int:
        later = bisect.bisect_right(self._sorted, step)
        return self._sorted[later] if later < len(self._sorted) else NEVER


def as_schedule(value: int | Schedule) -> Schedule:
    """Return ``value`` as a schedule: an int ``k`` means every ``k``-th step.

    Args:
        value: An int, or a function from a step number to a truth value.

    Returns:
        A function of the step number, true at step 0.

    Raises:
        UsageError: If ``value`` is neither.
    """
    if not callable(value) and hasattr(value, "__index__"):
        return every(value)
    if not callable(value):
        raise UsageError(
            f"every= takes a number of steps, rs.every(k), rs.log_spaced(n), "
            f"rs.at_steps([...]) or a function of the step, got {value!r}"
        )
    if isinstance(value, _Every | _LogSpaced | _AtSteps):
        return value
    return lambda step: step == 0 or bool(value(step))
