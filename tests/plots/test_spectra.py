"""Spectra and ranks: the drawn numbers are the result's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plots.drawables import NAN, band, spectrum

from repscope import plots
from repscope.errors import UnknownName, UsageError
from repscope.results import Spectrum


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_line_is_the_eigenvalues_without_what_is_not_positive(ax) -> None:
    plots.spectrum({"sgd": spectrum([4.0, 2.0, 1.0, 0.0])}, ax=ax)
    line = ax.lines[0]
    assert ax.get_yscale() == "log"
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(line.get_ydata(), [4, 2, 1, NAN])


def test_normalized_line_and_band_are_divided_by_the_sum(ax) -> None:
    edges = (torch.tensor([2.0, 1.0]), torch.tensor([4.0, 3.0]))
    plots.spectrum(
        {"sgd": spectrum([3.0, 1.0])}, ax=ax, band={"sgd": edges}, normalize=True
    )
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.75, 0.25])
    drawn = ax.collections[0].get_paths()[0].vertices
    assert {0.5, 0.25, 1.0, 0.75} <= set(drawn[:, 1].round(12))


def test_band_of_seeds_is_drawn_around_its_mean(ax) -> None:
    plots.spectrum({"sgd": band([1, 2], [3.0, 1.0], half=0.5)}, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3, 1])
    drawn = ax.collections[0].get_paths()[0].vertices
    assert {2.5, 3.5, 0.5, 1.5} <= set(drawn[:, 1])


def test_band_that_reaches_zero_does_not_stretch_the_axis(ax) -> None:
    plots.spectrum({"sgd": band([1, 2], [3.0, 1.0], half=2.0)}, ax=ax)
    low, high = ax.get_ylim()
    assert 0.1 < low < 1
    assert 3 < high < 30


def test_mark_sits_on_the_line_at_the_effective_rank(ax) -> None:
    plots.spectrum({"sgd": spectrum([4.0, 4.0, 4.0, 1e-9])}, ax=ax)
    mark = ax.lines[1]
    np.testing.assert_allclose(mark.get_xdata(), [3.0], atol=1e-6)
    np.testing.assert_allclose(mark.get_ydata(), [4.0], rtol=1e-4)
    assert mark.get_marker() == plots.style("sgd").marker
    assert legend(ax) == ["SGD (3.0)"]
    assert "effective rank" in ax.get_xlabel()


def test_marks_replace_the_rank_of_the_spectrum(ax) -> None:
    marks = {"sgd": torch.tensor(1.5)}
    plots.spectrum({"sgd": spectrum([4.0, 1.0])}, ax=ax, marks=marks)
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [1.5])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [2.0])  # halfway in logarithms
    assert legend(ax) == ["SGD (1.5)"]


def test_band_without_mark_says_nothing_of_rank(ax) -> None:
    plots.spectrum({"sgd": band([1, 2], [3.0, 1.0])}, ax=ax)
    assert legend(ax) == ["SGD"]
    assert ax.get_xlabel() == "index"


def test_rounding_noise_does_not_stretch_the_axis(ax) -> None:
    plots.spectrum({"sgd": spectrum([10.0, 1.0, 1e-17])}, ax=ax)
    low, high = ax.get_ylim()
    assert low == pytest.approx(10 * 1e-8, rel=0.5)
    assert high > 10


def test_axis_says_what_kind_of_spectrum_it_is(ax) -> None:
    plots.spectrum({"sgd": spectrum([2.0, 1.0], kind="weight")}, ax=ax)
    assert ax.get_ylabel() == "squared singular value"


def test_kinds_do_not_mix(ax) -> None:
    mixed = {"a": spectrum([1.0]), "b": spectrum([1.0], kind="weight")}
    with pytest.raises(UsageError, match="covariance and weight spectra together"):
        plots.spectrum(mixed, ax=ax)


def test_a_batch_is_refused(ax) -> None:
    batch = Spectrum(torch.ones(3, 2), "covariance", 9, 2, 1, torch.ones(3))
    with pytest.raises(UsageError, match=r"got a batch of shape \(3, 2\) under 'sgd'"):
        plots.spectrum({"sgd": batch}, ax=ax)


@pytest.mark.parametrize("option", ["marks", "band"])
def test_an_option_for_a_label_that_is_not_drawn_is_an_error(option, ax) -> None:
    with pytest.raises(UnknownName, match=r"names 'sdg'.*did you mean 'sgd'"):
        plots.spectrum({"sgd": spectrum([1.0])}, ax=ax, **{option: {"sdg": 1.0}})


def test_inputs_may_be_on_a_graph_and_stay_as_they_are(ax) -> None:
    values = torch.tensor([2.0, 0.0], requires_grad=True)
    before = values.detach().clone()
    result = Spectrum(values, "covariance", 9, 2, 1, torch.tensor(1.0))
    plots.spectrum(result, ax=ax, normalize=True)
    assert torch.equal(values, before)


def test_rank_over_time_draws_the_band(ax) -> None:
    result = band([0, 10, 20], [30.0, 9.0, NAN], half=1.0)
    plots.rank_over_time({"adamw": result}, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [30, 9, NAN])
    drawn = ax.collections[0].get_paths()[0].vertices
    assert {29.0, 31.0, 8.0, 10.0} <= set(drawn[:, 1])


@pytest.mark.parametrize("ends", [[10, 20], [10]], ids=["all ends", "inner ends"])
def test_tasks_are_named_between_their_ends(ends, ax) -> None:
    result = band([0, 10, 20], [30.0, 9.0, 20.0])
    plots.rank_over_time({"sgd": result}, ax=ax, boundaries=ends, ylabel="stable rank")
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == ends
    assert [(t.get_text(), t.xy[0]) for t in ax.texts] == [
        ("task 1", 5),
        ("task 2", 15),
    ]
    assert ax.get_ylabel() == "stable rank"


def test_many_tasks_are_only_numbered(ax) -> None:
    result = band([0, 60], [30.0, 9.0])
    plots.rank_over_time(result, ax=ax, boundaries=range(10, 70, 10))
    assert [t.get_text() for t in ax.texts] == ["1", "2", "3", "4", "5", "6"]
