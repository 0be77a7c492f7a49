from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import repscope as rs
from repscope.errors import MetricError, NonFiniteError, UsageError
from repscope.metrics.weights import WEIGHT_METRICS, weight_rms


def total(histogram) -> int:
    """Count every weight, the excluded ones too."""
    outside = histogram.n_zero + histogram.underflow + histogram.overflow
    return int(histogram.counts.sum()) + outside + histogram.n_excluded


def test_histogram_is_numpys_on_fixed_edges():
    w = torch.randn(50, 40) * 10 ** torch.empty(50, 40).uniform_(-8, 1)
    found = rs.weight_histogram(w)
    assert found.counts.tolist() == oracles.log_histogram(w, 64).tolist()
    np.testing.assert_allclose(found.edges, np.logspace(-10, 2, 65))
    assert total(found) == 2000


@settings(deadline=None, max_examples=60)
@given(
    w=arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e3, 1e3)),
    bins=st.integers(1, 20),
    log=st.booleans(),
)
def test_every_weight_is_counted_once(w, bins, log):
    found = rs.weight_histogram(w, bins=bins, log=log)
    assert found.counts.shape == (bins,)
    assert found.edges.shape == (bins + 1,)
    assert total(found) == len(w)
    assert found.n_zero == int((w == 0).sum())


def test_edges_belong_to_the_bin_above_and_the_last_to_both():
    found = rs.weight_histogram([1e-10, 1e-4, 1e2, 9e-11, 101.0, 0.0], bins=2)
    assert found.counts.tolist() == [1, 2]
    assert (found.n_zero, found.underflow, found.overflow) == (1, 1, 1)


def test_linear_edges_run_from_zero_to_the_largest():
    found = rs.weight_histogram([-4.0, 1.0, 2.5, 0.0], bins=4, log=False)
    assert found.edges.tolist() == [0, 1, 2, 3, 4]
    assert found.counts.tolist() == [0, 1, 1, 1]
    assert (found.n_zero, found.underflow, found.overflow) == (1, 0, 0)
    zeros = rs.weight_histogram(torch.zeros(3), bins=2, log=False)
    assert (zeros.n_zero, zeros.edges.tolist()) == (3, [0, 0.5, 1])


def test_lists_and_dicts_are_pooled():
    a, b = torch.randn(3, 4), torch.randn(7)
    pooled = torch.cat([a.flatten(), b])
    for w in ([a, b], {"a": a, "b": b}, (b, a)):
        assert torch.equal(
            rs.weight_histogram(w).counts, rs.weight_histogram(pooled).counts
        )
        for metric in WEIGHT_METRICS.values():
            torch.testing.assert_close(metric(w), metric(pooled))


def test_hoyer_and_rms_known_answers():
    assert rs.hoyer_sparsity([0.0, 0.0, -3.0]).item() == 1.0
    assert rs.hoyer_sparsity([2.0, -2.0, 2.0]).item() == pytest.approx(0, abs=1e-12)
    w = torch.randn(20, 3)
    assert rs.hoyer_sparsity(w).item() == pytest.approx(oracles.hoyer(w))
    assert weight_rms(w).item() == pytest.approx(w.square().mean().sqrt().item())


def test_degenerate_weights():
    assert math.isnan(rs.hoyer_sparsity(torch.zeros(5)).item())
    assert math.isnan(rs.hoyer_sparsity([3.0]).item())
    assert weight_rms(torch.zeros(5)).item() == 0.0


@pytest.mark.parametrize("scale", [1e20, 1e-25, 1e200, 1e-200])
def test_no_scale_overflows(scale):
    w = torch.randn(30, dtype=torch.float64)
    assert rs.hoyer_sparsity(w * scale).item() == pytest.approx(oracles.hoyer(w))
    assert weight_rms(w * scale).item() / scale == pytest.approx(weight_rms(w).item())


@pytest.mark.parametrize("metric", [rs.weight_histogram, *WEIGHT_METRICS.values()])
def test_bad_weights_are_named(metric):
    with pytest.raises(NonFiniteError, match=r"w\['fc2'\] has 1 non-finite"):
        metric({"fc1": torch.ones(2), "fc2": torch.tensor([1.0, math.nan])})
    with pytest.raises(NonFiniteError, match=r"w\[1\] has 1 non-finite"):
        metric([torch.ones(2), torch.tensor([math.inf])])
    for empty in ([], {}, torch.empty(0), [torch.empty(0, 3)]):
        with pytest.raises(MetricError, match="w holds no weights"):
            metric(empty)


def test_no_bins_is_refused():
    with pytest.raises(UsageError, match="bins must be at least 1, got 0"):
        rs.weight_histogram([1.0], bins=0)


# -- common scales -----------------------------------------------------------
def test_edges_of_another_histogram_make_linear_scales_comparable():
    a, b = torch.randn(30), 3 * torch.randn(40)
    first = rs.weight_histogram(b, bins=8, log=False)
    second = rs.weight_histogram(a, edges=first.edges)
    assert torch.equal(second.edges, first.edges)
    counts = np.histogram(a.double().abs(), first.edges)[0]
    assert second.counts.tolist() == counts.tolist()
    narrow = rs.weight_histogram([0.0, 1.0, 5.0, 9.0], edges=[2.0, 5.0, 6.0])
    assert narrow.counts.tolist() == [0, 1]
    assert (narrow.n_zero, narrow.underflow, narrow.overflow) == (1, 1, 1)


def test_in_units_of_rms_a_rescaled_layer_counts_the_same():
    w1, w2 = torch.randn(20, 5), torch.randn(5, 20)
    found = rs.weight_histogram([w1, w2], unit="rms")
    assert found.unit == "rms"
    moved = rs.weight_histogram([8 * w1, w2 / 8], unit="rms")
    assert torch.equal(moved.counts, found.counts)
    absolute = [rs.weight_histogram(w).counts for w in ([w1, w2], [8 * w1, w2 / 8])]
    assert not torch.equal(*absolute)
    over = [w / w.double().square().mean().sqrt() for w in (w1, w2)]
    assert torch.equal(rs.weight_histogram(over).counts, found.counts)
    zeros = rs.weight_histogram([torch.zeros(3), w1], unit="rms")
    assert zeros.n_zero == 3
    # A list of plain numbers is one tensor, whose numbers share one scale.
    one = rs.weight_histogram([1.0, 10.0], unit="rms", edges=[0.0, 1.0, 2.0])
    assert one.counts.tolist() == [1, 1]


@pytest.mark.parametrize("edges", [[1.0], [2.0, 1.0], [-1.0, 1.0], [[0.0, 1.0]], []])
def test_edges_that_are_none(edges):
    with pytest.raises(UsageError, match="edges must be at least 2 strictly ascending"):
        rs.weight_histogram([1.0], edges=edges)


def test_units_are_named():
    with pytest.raises(UsageError, match="did you mean 'rms'"):
        rs.weight_histogram([1.0], unit="RMS")


# -- exclusion ---------------------------------------------------------------
def test_excluded_weights_enter_nothing_and_are_counted():
    w = {"fc1": torch.randn(6, 4), "fc2": torch.randn(3)}
    mask = torch.rand(6, 4) < 0.3
    rest = torch.cat([w["fc1"][~mask], w["fc2"]])
    found = rs.weight_histogram(w, exclude={"fc1": mask})
    assert found.n_excluded == int(mask.sum())
    assert total(found) == 27
    assert torch.equal(found.counts, rs.weight_histogram(rest).counts)
    for metric in (rs.hoyer_sparsity, weight_rms):
        excluding = metric(w, exclude={"fc1": mask})
        torch.testing.assert_close(excluding, metric(rest))
        assert excluding != metric(w)
    alone = rs.weight_histogram(w["fc1"], exclude=mask.numpy(), unit="rms")
    kept = w["fc1"][~mask].double()
    by_hand = rs.weight_histogram(kept / kept.square().mean().sqrt())
    assert torch.equal(alone.counts, by_hand.counts)
    listed = rs.hoyer_sparsity([3.0, 4.0, 0.0], exclude=[False, False, True])
    torch.testing.assert_close(listed, rs.hoyer_sparsity([3.0, 4.0]))


@pytest.mark.parametrize("metric", [rs.weight_histogram, *WEIGHT_METRICS.values()])
def test_masks_that_do_not_fit_are_named(metric):
    w = {"fc1": torch.ones(2), "fc2": torch.ones(2)}
    yes = torch.ones(2, dtype=torch.bool)
    with pytest.raises(
        MetricError, match=r"exclude\['fc1'\] must be a boolean mask of"
    ):
        metric(w, exclude={"fc1": torch.ones(2)})
    with pytest.raises(MetricError, match=r"of shape \(2,\), got torch.bool of shape"):
        metric(w, exclude={"fc1": yes[:1]})
    with pytest.raises(MetricError, match=r"one mask for each weight of w \(\['fc1"):
        metric(w, exclude={"fc3": yes})
    with pytest.raises(MetricError, match=r"w \(\[0, 1\]\), got a single one"):
        metric([*w.values()], exclude=yes)
    with pytest.raises(MetricError, match=r"all 4 weights of w are excluded"):
        metric(w, exclude={"fc1": yes, "fc2": yes})
