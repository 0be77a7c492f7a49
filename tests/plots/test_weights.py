"""Weight magnitudes and sparsity curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plots.drawables import NAN, band, curve, histogram

from repscope import plots
from repscope.errors import UsageError
from repscope.results import Histogram


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_steps_are_shares_of_all_weights_also_those_outside(ax) -> None:
    result = histogram([1, 5, 2], n_zero=1, overflow=1)
    plots.weight_histogram({"sgd": result}, ax=ax)
    values, edges, _ = ax.patches[0].get_data()
    np.testing.assert_allclose(values, [0.1, 0.5, 0.2])
    np.testing.assert_allclose(edges, result.edges.numpy())
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "share of weights per bin"
    assert "bins of 1 decades" in ax.get_xlabel()


def test_counts_are_drawn_as_they_are(ax) -> None:
    plots.weight_histogram({"sgd": histogram([1, 5, 2])}, ax=ax, normalize=False)
    np.testing.assert_array_equal(ax.patches[0].get_data().values, [1, 5, 2])
    assert ax.get_ylabel() == "weights per bin"


def test_what_lies_outside_is_counted_in_the_legend(ax) -> None:
    outside = histogram([1], n_zero=1200, underflow=3, overflow=2)
    plots.weight_histogram({"sgd": histogram([1]), "p-sgd": outside}, ax=ax)
    assert legend(ax) == ["SGD", "P-SGD (1,200 zero, 3 below, 2 above)"]


def test_view_ends_near_the_occupied_bins(ax) -> None:
    result = histogram([0, 0, 0, 4, 1, 0, 0, 0], low=-6)
    plots.weight_histogram({"sgd": result}, ax=ax)
    np.testing.assert_allclose(ax.get_xlim(), [1e-4, 1e0], rtol=1e-4)


def test_linear_edges_get_a_linear_axis(ax) -> None:
    result = Histogram(torch.tensor([2, 1]), torch.tensor([0.0, 0.5, 1.0]), 0, 0, 0)
    plots.weight_histogram(result, ax=ax)
    assert ax.get_xscale() == "linear"
    assert "bins of 0.5" in ax.get_xlabel()


def test_different_edges_are_refused(ax) -> None:
    pair = {"sgd": histogram([1, 2]), "adam": histogram([1, 2], low=-4)}
    with pytest.raises(UsageError, match="different edges"):
        plots.weight_histogram(pair, ax=ax)


def test_different_units_are_refused_and_a_unit_is_named(ax) -> None:
    pair = {"sgd": histogram([1, 2]), "adam": histogram([1, 2], unit="rms")}
    with pytest.raises(UsageError, match="different units, \\['absolute', 'rms'\\]"):
        plots.weight_histogram(pair, ax=ax)
    plots.weight_histogram({"adam": pair["adam"]}, ax=ax)
    assert ax.get_xlabel().startswith("weight magnitude / RMS of its tensor")


def test_sparsity_line_is_the_curve_up_to_the_last_weight(ax) -> None:
    plots.sparsity({"sgd": curve([0.5, 0.9, 1.0], [0.9, 0.75, 0.5])}, ax=ax)
    line, dense = ax.lines
    np.testing.assert_allclose(line.get_xdata(), [0.5, 0.9])
    np.testing.assert_allclose(line.get_ydata(), [0.9, 0.75])
    np.testing.assert_allclose(dense.get_xydata(), [[0.0, 0.97]])


def test_sparsity_of_seeds_draws_the_band(ax) -> None:
    result = band([0.5, 0.9, 1.0], [0.8, 0.6, NAN], half=0.1)
    plots.sparsity({"sgd": result}, ax=ax, ylabel="F1")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.8, 0.6])
    drawn = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(sorted({*drawn[:, 1].round(6)}), [0.5, 0.7, 0.9])
    assert ax.get_ylabel() == "F1"


def test_sparsity_axis_opens_the_end_near_one(ax) -> None:
    plots.sparsity(curve([0.0, 0.5, 0.9, 0.99], [0.9, 0.9, 0.8, 0.4]), ax=ax)
    ax.figure.draw_without_rendering()
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert ticks == ["0", "50", "80", "90", "95", "98", "99"]
    at = ax.transData.transform([(s, 0.5) for s in (0.0, 0.9, 0.99)])[:, 0]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1])  # each a tenth of the weights
    assert ax.get_xlim()[0] < 0
    assert 0.99 < ax.get_xlim()[1] < 1


def test_sparsity_with_only_the_dense_level(ax) -> None:
    plots.sparsity(curve([0.0], [0.9]), ax=ax)
    low, high = ax.get_xlim()
    assert low < 0 < high
