from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from repscope.linalg.threads import blas_threads, in_threads


def counts():
    np.linalg.eigvalsh(np.eye(2))
    found = ThreadpoolController().select(internal_api="openblas").info()
    return {entry["num_threads"] for entry in found}


@pytest.fixture(autouse=True)
def three_threads():
    with threadpool_limits(3, user_api="blas"):
        if counts() != {3}:
            pytest.skip("no BLAS whose threads can be set")
        yield


def test_a_limit_is_undone():
    with blas_threads(1):
        assert counts() == {1}
    assert counts() == {3}


def test_more_than_there_were_is_not_given():
    with blas_threads(8):
        assert counts() == {3}


def test_limits_that_end_in_another_order_are_undone():
    first, second = blas_threads(2), blas_threads(1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert counts() == {1}
    second.__exit__(None, None, None)
    assert counts() == {3}


@pytest.mark.parametrize("threads", [1, 3])
def test_slices_run_with_one_blas_thread_each(threads):
    assert in_threads(lambda a, b: (a, b, counts()), 7, threads=threads) == [
        (7 * i // threads, 7 * (i + 1) // threads, {1}) for i in range(threads)
    ]
