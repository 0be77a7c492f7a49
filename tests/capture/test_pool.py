"""Memory for rows: lent once at a time, and never read before a copy has arrived."""

from __future__ import annotations

import threading

import torch

from repscope.capture import Pool


class Event:
    """A copy that arrives when it is told to, as an event of a GPU."""

    def __init__(self):
        self.arrived = threading.Event()

    def synchronize(self):
        assert self.arrived.wait(10)


def test_two_threads_that_wait_for_one_copy_both_wait():
    pool, event = Pool(), Event()
    pool._arriving.append(event)
    ended = []
    threads = [
        threading.Thread(target=lambda: (pool.settle(), ended.append(1)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        thread.join(0.1)
    assert not ended
    event.arrived.set()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 2
    assert not pool._arriving


def test_what_comes_back_is_lent_again_and_what_is_foreign_is_not():
    pool, value = Pool(), torch.randn(3, 4)
    first = pool.copy(value, dtype=torch.float32)
    second = pool.copy(value, dtype=torch.float32)
    assert first.data_ptr() != second.data_ptr()
    pool.take_back([first, torch.zeros(3, 4)])
    places = {pool.copy(value, dtype=torch.float32).data_ptr() for _ in range(2)}
    assert first.data_ptr() in places
    assert second.data_ptr() not in places


def test_what_was_not_wanted_since_the_last_time_is_forgotten():
    pool = Pool()
    old, new = (pool.copy(torch.ones(n, 2), dtype=torch.float32) for n in (5, 6))
    pool.renew([old])
    pool.renew([new])
    assert sum(map(len, pool._free.values())) == 1


def test_without_reuse_nothing_is_lent_again():
    pool = Pool(reuse=False)
    pool.take_back([pool.copy(torch.ones(2, 2), dtype=torch.float32)])
    assert not any(pool._free.values())
