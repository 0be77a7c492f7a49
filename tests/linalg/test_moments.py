from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repscope import Moments, covariance
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError
from repscope.linalg.covariance import gram, rescaled, scatter
from repscope.linalg.moments import Gathering

# The function of that name hides its module.
COVARIANCE = sys.modules["repscope.linalg.covariance"]
BYTE_BLOCKS = {torch.float32: 1, torch.float64: 1}  # as few rows as may be


def close(found, expected, rtol=1e-12):
    torch.testing.assert_close(
        found, torch.as_tensor(expected), rtol=rtol, atol=0, check_dtype=False
    )


@pytest.mark.parametrize("ddof", [0, 1])
def test_covariance_is_numpys(ddof):
    X = torch.randn(30, 4, dtype=torch.float64) + 2
    close(covariance(X, ddof=ddof), np.cov(X.numpy(), rowvar=False, ddof=ddof))
    close(covariance(X, center=False, ddof=ddof), X.mT @ X / (30 - ddof))


def test_covariance_of_a_batch_is_that_of_each_matrix():
    X = torch.randn(2, 3, 20, 4)
    assert covariance(X).shape == (2, 3, 4, 4)
    close(covariance(X)[1, 2], covariance(X[1, 2]))


@pytest.mark.parametrize("mean", [0.0, 1e6, -1e8])
def test_covariance_survives_a_mean_far_above_the_spread(mean):
    X = torch.randn(300, 3, dtype=torch.float64) + mean
    exact = oracles.exact_covariance(X)
    scale = np.abs(exact).max()
    streamed = Moments()
    for rows in X.split([1, 7, 100, 192]):
        streamed.update(rows)
    for found in (covariance(X), streamed.covariance()):
        assert np.abs(found.numpy() - exact).max() / scale <= 1e-9


def test_float32_at_mean_1e6_is_as_exact_as_its_values():
    X = torch.randn(500, 3) + 1e6
    exact = oracles.exact_covariance(X)
    assert np.abs(Moments().update(X).covariance().numpy() - exact).max() <= 1e-9


@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_float32_extremes_neither_overflow_nor_vanish(scale):
    X = torch.randn(40, 3)
    expected = covariance(X) * scale**2
    close(covariance(X * scale), expected, rtol=1e-5)
    close(Moments().update(X * scale).covariance(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_narrow_types_equal_their_float64_values(dtype):
    X = (torch.randn(4000, 3) * 30).to(dtype)
    close(covariance(X), covariance(X.to(torch.float64)))
    close(Moments().update(X).covariance(), covariance(X.to(torch.float64)))


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), offset=st.floats(-1e5, 1e5))
def test_moments_do_not_depend_on_how_the_rows_were_cut(cuts, offset):
    X = torch.randn(60, 3, dtype=torch.float64) + offset
    edges = [0, *sorted(cuts), 60]
    blocks = [X[low:high] for low, high in itertools.pairwise(edges)]
    updated = functools.reduce(Moments.update, blocks, Moments())
    parts = [Moments().update(block) for block in blocks]
    merged = functools.reduce(Moments.merge, parts, Moments())
    for found in (updated, merged):
        assert found.count == 60
        torch.testing.assert_close(found.mean, X.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.covariance(), covariance(X), atol=1e-8, rtol=0)


def test_more_rows_than_one_block():
    X = torch.randn(20_000, 2)
    found = Moments().update(X)
    torch.testing.assert_close(found.covariance(), covariance(X), rtol=0, atol=1e-13)


def test_merge_leaves_the_other_and_its_own_parts_alone():
    a, b = Moments().update(torch.randn(5, 2)), Moments().update(torch.randn(7, 2))
    before = b.covariance().clone()
    taken = Moments().merge(b).merge(a)
    assert (taken.count, b.count) == (12, 7)
    close(b.covariance(), before)
    assert a.merge(Moments()).count == 5


def test_inputs_are_not_modified_and_need_no_gradient():
    X = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    before = X.detach().clone()
    assert not covariance(X).requires_grad
    assert not Moments().update(X).mean.requires_grad
    torch.testing.assert_close(X.detach(), before, rtol=0, atol=0)


def test_repr_names_what_was_seen():
    assert repr(Moments()) == "Moments(count=0, n_features=None)"
    assert repr(Moments().update([[1.0, 2.0]])) == "Moments(count=1, n_features=2)"


def test_bad_input_is_refused_and_changes_nothing():
    good = Moments().update(torch.ones(4, 3))
    bad = {
        "flatten the leading": torch.ones(2, 4, 3),
        "have 3 features, the new rows 5": torch.ones(4, 5),
        "leave the float64 range": torch.full((2, 3), 1e200, dtype=torch.float64),
    }
    for text, rows in bad.items():
        with pytest.raises(MetricError, match=text):
            good.update(rows)
    with pytest.raises(NonFiniteError, match=r"first at \(1, 0\)"):
        good.update([[1.0, 1.0, 1.0], [float("inf"), 1.0, 1.0]])
    with pytest.raises(MetricError, match="have 3 features, the new rows 2"):
        good.merge(Moments().update(torch.ones(4, 2)))
    assert good.count == 4
    close(good.mean, torch.ones(3))


def test_too_few_samples():
    with pytest.raises(NotEnoughSamples, match="no rows"):
        Moments().update(torch.empty(0, 3)).mean  # noqa: B018 - the property raises
    with pytest.raises(NotEnoughSamples, match="at least 2 samples, got 1"):
        Moments().update(torch.ones(1, 3)).covariance(ddof=0)
    with pytest.raises(NotEnoughSamples, match="at least 2 samples, got 1"):
        covariance(torch.ones(1, 3))
    with pytest.raises(NotEnoughSamples, match="ddof=3 needs at least 4"):
        covariance(torch.ones(3, 3), ddof=3)


def test_covariance_beyond_float64_is_refused_not_infinite():
    with pytest.raises(MetricError, match="leaves the float64 range"):
        covariance(torch.tensor([[1e200], [-1e200]], dtype=torch.float64))


@pytest.mark.parametrize("value", [5e-324, 3e-310, 1.0, 1.7e308])
def test_rescaling_is_exact_and_of_order_one(value):
    X = torch.tensor([[value, -value / 2]], dtype=torch.float64)
    scaled, exponent = rescaled(X)
    assert np.array_equal(np.ldexp(scaled.numpy(), int(exponent)), X.numpy())
    if value > 1e-300:
        assert 0.5 <= float(scaled.abs().max()) <= 1


# -- as a tensor -------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 50])
def test_a_tensor_holds_all_there_is(n):
    moments = Moments().update(torch.randn(n, 3) + 1e6).update(torch.randn(n, 3) + 1e6)
    t = moments.to_tensor()
    assert (t.shape, t.dtype, t.device.type) == ((6, 3), torch.float64, "cpu")
    assert t[0].tolist() == [2 * n] * 3
    assert torch.equal(t[1] + t[2], moments.mean)
    assert torch.equal(t[3:] / (2 * n - 1), moments.covariance())
    back = Moments.from_tensor(t)
    assert torch.equal(back.to_tensor(), t)
    t.zero_()
    assert back.count == 2 * n
    more = torch.randn(7, 3)
    assert torch.equal(back.update(more).mean, moments.update(more).mean)


def test_moments_without_rows_make_no_tensor():
    with pytest.raises(NotEnoughSamples, match="seen no rows"):
        Moments().to_tensor()


def _changed(place, value):
    t = Moments().update(torch.randn(9, 2)).to_tensor()
    t[place] = value
    return t


@pytest.mark.parametrize(
    ("t", "words"),
    [
        (torch.ones(5, 2), "float64 tensor .* got torch.float32 of shape .5, 2."),
        (torch.ones(4, 2, dtype=torch.float64), "n_features . 3, n_features"),
        (torch.ones(3, 0, dtype=torch.float64), "shape .3, 0."),
        (torch.ones(4, dtype=torch.float64), "shape .4,"),
        (torch.ones(2, 4, 1, dtype=torch.float64), "shape .2, 4, 1."),
        (_changed((0, 0), 8.0), "starts with 8.0"),
        (_changed(0, 0.0), "starts with 0.0"),
        (_changed(0, 2.5), "starts with 2.5"),
        (_changed((4, 1), -1.0), "negative entry"),
        (_changed((2, 1), float("nan")), "the moments has 1 non-finite"),
    ],
)
def test_a_tensor_of_something_else_is_refused(t, words):
    with pytest.raises(MetricError, match=words):
        Moments.from_tensor(t)


# -- over ranks --------------------------------------------------------------
@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """Return what each of two ranks had and got in each case: rows, error, tensor."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("one_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", folder],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=60)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [each[name] for each in found] for name in found[0]}


@pytest.mark.parametrize(
    "name",
    ["plain", "mean 1e6", "ranks far apart", "rank 0 saw none", "rank 1 saw one"],
)
def test_every_rank_holds_the_moments_of_all_rows(reduced, name):
    rows, errors, tensors = zip(*reduced[name], strict=True)
    assert errors == ("", "")
    assert torch.equal(*tensors)
    X, found = torch.cat(rows), Moments.from_tensor(tensors[0])
    alone = Moments().update(X)
    assert found.count == alone.count
    close(found.mean, alone.mean)
    for expected in (alone.covariance().numpy(), oracles.exact_covariance(X)):
        gap = np.abs(found.covariance().numpy() - expected).max()
        assert gap / np.abs(expected).max() <= 1e-10


def test_ranks_without_rows_reduce_to_none(reduced):
    assert [one[1:] for one in reduced["nobody saw any"]] == [("", None)] * 2


@pytest.mark.parametrize(
    ("name", "words"),
    [("widths differ", "seen 5 and 7 features"), ("too far apart", "float64 range")],
)
def test_every_rank_refuses_and_keeps_what_it_had(reduced, name, words):
    for rows, error, tensor in reduced[name]:
        assert error.startswith("MetricError")
        assert words in error
        assert Moments.from_tensor(tensor).count == len(rows)


def test_a_group_reduces_its_own_ranks_only(reduced):
    (_, inside, first), (_, outside, second) = reduced["only rank 0"]
    assert inside == ""
    assert "belongs to" in outside
    for tensor in (first, second):
        assert Moments.from_tensor(tensor).count == 9


def test_without_a_process_group_there_is_nothing_to_reduce_over():
    with pytest.raises(UsageError, match="init_process_group first"):
        Moments().all_reduce()


# -- few rows at a time --------------------------------------------------------
@pytest.mark.parametrize("size", [1, 3, 128, 1024, 5000])
@pytest.mark.parametrize("drift", [0.0, 0.01, 30.0])
def test_gathered_moments_are_those_of_all_rows(size, drift):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 6, generator=generator, dtype=torch.float64)
    rows += 1e4 + drift * torch.arange(5000)[:, None]
    rows[:, 4] = 3.0  # dead
    rows[:, 5] *= 1e-6
    gathering = Gathering()
    for block in rows.split(size):
        gathering.update(block)
        block.zero_()  # what was taken in is no longer needed
    moments = gathering.finish()
    rows = torch.randn(5000, 6, generator=generator.manual_seed(0), dtype=torch.float64)
    rows += 1e4 + drift * torch.arange(5000)[:, None]
    rows[:, 4] = 3.0
    rows[:, 5] *= 1e-6
    assert moments.count == 5000
    wanted = np.cov(rows.numpy() - rows.numpy().mean(0), rowvar=False)
    scale = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert (np.abs(moments.covariance().numpy() - wanted) <= 1e-9 * scale + 1e-18).all()
    np.testing.assert_allclose(moments.mean, rows.numpy().mean(0), rtol=1e-12)


def test_gathering_begins_anew():
    gathering = Gathering()
    assert gathering.finish().count == 0
    gathering.update(torch.full((3, 2), float("nan")))
    gathering.update(torch.ones(2, 2))
    spoiled = gathering.finish()
    assert spoiled.count == 5
    assert spoiled.mean.isnan().all()
    gathering.update(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))  # another width
    assert gathering.finish().mean.tolist() == [2.0, 2.0, 2.0]
    gathering.update(torch.zeros(0, 3))
    assert gathering.finish().count == 0
    gathering.update(torch.ones(2, 3))
    with pytest.raises(MetricError, match="have 3 features, the new rows 4"):
        gathering.update(torch.ones(2, 4))


def test_moments_take_rows_that_are_not_finite_if_told_to():
    moments = Moments(finite=False).update([[1.0, float("inf")], [2.0, 3.0]])
    assert moments.count == 2
    assert not moments.covariance().isfinite().all()
    with pytest.raises(NonFiniteError):
        Moments().update([[1.0, float("inf")], [2.0, 3.0]])


@pytest.mark.parametrize(("offset", "limit"), [(0.0, 1e-6), (1e6, 1e-9)])
def test_float32_products_bear_any_mean(offset, limit):
    X = torch.randn(20_000, 8) + offset
    exact = np.cov(X.double().numpy() - offset, rowvar=False)
    found = covariance(X, dtype=torch.float32)
    assert found.dtype == torch.float32
    assert np.abs(found.double().numpy() - exact).max() / np.abs(exact).max() < (
        max(limit, 2e-7)
    )
    found = covariance(X)
    assert np.abs(found.numpy() - exact).max() / np.abs(exact).max() < 1e-9


@pytest.mark.parametrize("product", [gram, scatter])
def test_float32_products_are_added_up_in_float64(product, monkeypatch):
    monkeypatch.setattr(COVARIANCE, "_BLOCK_BYTES", BYTE_BLOCKS)
    monkeypatch.setattr(COVARIANCE, "_BLOCK_LEAST", 1)
    # Beside 2**26 a float32 loses each of the four 4s, but not their sum.
    X = torch.tensor([[[2.0**13] * 2] + [[2.0] * 2] * 4])
    rows = X.mT.contiguous() if product is gram else X
    found = product(rows, center=False, dtype=torch.float32)
    assert found.tolist() == [[[2.0**26 + 16] * 2] * 2]
    assert found.dtype == torch.float32


def test_float64_rows_are_multiplied_in_the_dtype_asked_for(monkeypatch):
    seen = []
    real = COVARIANCE._product

    def watched(rows, *, transposed):
        seen.append(rows.dtype)
        return real(rows, transposed=transposed)

    monkeypatch.setattr(COVARIANCE, "_product", watched)
    covariance(torch.randn(40, 3, dtype=torch.float64), dtype=torch.float32)
    assert seen == [torch.float32]


def test_covariance_in_another_dtype_is_refused():
    with pytest.raises(UsageError, match=r"torch.float64 or torch.float32, got"):
        covariance(torch.randn(5, 2), dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e3, 1e6])
@pytest.mark.parametrize(("product", "n"), [(scatter, 200), (gram, 20)])
def test_one_block_is_centred_as_far_as_products_can_tell(
    product, n, mean, given, dtype, monkeypatch
):
    X = (torch.randn(3, n, 60) + mean).to(given)
    X[0, :, 5] = 0.0  # a dead unit beside large means
    rows = X.double().numpy() - mean
    rows -= rows.mean(1, keepdims=True)
    rows[0, :, 5] = 0.0
    exact = np.linalg.eigvalsh(rows.swapaxes(1, 2) @ rows)[:, ::-1][:, : min(n, 60)]
    whole, reused = (
        product(X.clone(), center=True, dtype=dtype, overwrite=overwrite)
        for overwrite in (False, True)
    )
    monkeypatch.setattr(COVARIANCE, "_BLOCK_BYTES", BYTE_BLOCKS)
    monkeypatch.setattr(COVARIANCE, "_BLOCK_LEAST", 7)
    cut = product(X, center=True, dtype=dtype)
    limit = 1e-6 if dtype == torch.float32 else 1e-9
    for found in (whole, reused, cut):
        assert found.dtype == dtype
        values = np.linalg.eigvalsh(found.double().numpy())[:, ::-1]
        error = np.abs(values[:, : exact.shape[1]] - exact).max(1) / exact[:, 0]
        assert (error < limit).all()
