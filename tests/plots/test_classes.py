"""Heat maps of class cosines."""

from __future__ import annotations

import numpy as np
import torch
from plots.drawables import NAN, cosine

from repscope import plots
from repscope.results import ClassCosine

MATRIX = [[1.0, 0.25, NAN], [0.25, 1.0, NAN], [NAN, NAN, NAN]]


def cells(ax):
    return ax.collections[0].get_array()


def test_cells_are_the_matrix_and_missing_ones_are_hatched(ax) -> None:
    plots.alignment(cosine(MATRIX), ax=ax)
    missing = np.isnan(MATRIX)
    np.testing.assert_array_equal(cells(ax).mask, missing)
    np.testing.assert_array_equal(
        np.asarray(cells(ax))[~missing], np.array(MATRIX)[~missing]
    )
    assert ax.patch.get_hatch()


def test_a_full_matrix_has_no_hatch(ax) -> None:
    plots.alignment(cosine([[1.0, 0.5], [0.5, 1.0]]), ax=ax)
    assert ax.patch.get_hatch() is None


def test_numbers_are_written_in_the_cells_that_have_one(ax) -> None:
    plots.alignment(cosine([[1.0, -0.126], [-0.126, NAN]]), ax=ax)
    assert [text.get_text() for text in ax.texts] == ["1", "-.13", "-.13"]


def test_numbers_can_be_left_out_and_are_where_they_would_be_too_small(ax) -> None:
    plots.alignment(cosine([[1.0]]), ax=ax, annotate=False)
    assert not ax.texts
    plots.alignment(cosine(torch.eye(40).tolist()), ax=ax)
    assert not ax.texts


def test_classes_are_named_by_their_labels(ax) -> None:
    result = ClassCosine(
        torch.eye(2), torch.tensor([3, 7]), torch.ones(2), torch.tensor(0.5), 0
    )
    plots.alignment(result, ax=ax)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["3", "7"]


def test_panels_share_a_scale_and_only_the_last_has_a_bar() -> None:
    fig, axes = plots.figure(1, 2, width="double")
    for panel, ax in enumerate(axes):
        plots.alignment(
            cosine([[1.0, 0.4], [0.4, 1.0]]), ax=ax, vmin=0.5, colorbar=panel == 1
        )
    fig.draw_without_rendering()
    assert [len(ax.child_axes) for ax in axes] == [0, 1]
    assert {ax.collections[0].get_clim() for ax in axes} == {(0.5, 1.0)}
    left, right = (ax.get_window_extent() for ax in axes)
    np.testing.assert_allclose(left.width, right.width, rtol=1e-6)
    assert ax.child_axes[0].get_ylabel() == "cosine"


def test_the_bar_says_when_cells_lie_below_its_end(ax) -> None:
    plots.alignment(cosine([[1.0, -0.2], [-0.2, 1.0]]), ax=ax)
    assert ax.collections[0].colorbar.extend == "min"
