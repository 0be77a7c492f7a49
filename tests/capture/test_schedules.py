import pytest

from repscope import at_steps, every, log_spaced
from repscope.capture import as_schedule
from repscope.errors import UsageError


def due(schedule, n=1001):
    return [step for step in range(n) if schedule(step)]


def test_every_kth_step_and_step_zero():
    assert due(every(250)) == [0, 250, 500, 750, 1000]
    assert due(as_schedule(500)) == [0, 500, 1000]


@pytest.mark.parametrize("n", [1, 3, 10])
def test_log_spaced_has_n_captures_a_decade(n):
    steps = due(log_spaced(n), 100_001)
    assert steps[:2] == [0, 1]
    assert steps[-1] == 100_000
    late = [step for step in steps if 1_000 < step <= 100_000]
    assert len(late) == 2 * n


def test_at_steps_always_adds_step_zero():
    assert due(at_steps([7, 3])) == [0, 3, 7]


def test_a_function_of_the_step_is_a_schedule():
    assert due(as_schedule(lambda step: step == 5)) == [0, 5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: every(0),
        lambda: every(True),
        lambda: every(2.5),
        lambda: log_spaced(0),
        lambda: at_steps([-1]),
        lambda: at_steps(["3"]),
        lambda: as_schedule("often"),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize(
    "schedule",
    [
        every(1),
        every(7),
        log_spaced(1),
        log_spaced(3),
        log_spaced(20),
        at_steps([5, 90]),
    ],
)
def test_the_next_step_is_the_first_that_is_due(schedule):
    due = [step for step in range(3000) if schedule(step)]
    assert due[0] == 0
    for step in range(due[-1]):
        assert schedule.next(step) == min(d for d in due if d > step)


def test_a_schedule_that_ended_has_no_next_step():
    assert at_steps([5]).next(5) > 10**18
