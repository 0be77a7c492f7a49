"""Accuracy bars and accuracy per task."""

from __future__ import annotations

import numpy as np
import pytest
from plots.drawables import NAN, band, interval

from repscope import plots
from repscope.errors import UsageError
from repscope.results import Interval


def points(ax, label) -> list[tuple[float, float]]:
    """Return where the marker of a label was drawn."""
    marker = plots.style(label).marker
    return [
        tuple(xy) for line in ax.lines if line.get_marker() == marker
        for xy in line.get_xydata()
    ]  # fmt: skip


def whiskers(ax) -> list[tuple[float, float]]:
    """Return low and high of every whisker, from left to right."""
    segments = [s for c in ax.collections for s in c.get_segments() if len(s)]
    return [(s[0, 1], s[-1, 1]) for s in sorted(segments, key=lambda s: s[0, 0])]


def tick_texts(ax) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def test_points_of_a_task_stand_side_by_side_at_its_number(ax) -> None:
    bands = {"sgd": band([1, 2], [0.6, 0.9]), "adam": band([1, 2], [0.5, 0.8])}
    plots.forgetting(bands, ax=ax)
    sgd, adam = np.array(points(ax, "sgd")), np.array(points(ax, "adam"))
    np.testing.assert_array_equal(sgd[:, 1], [0.6, 0.9])
    np.testing.assert_array_equal(adam[:, 1], [0.5, 0.8])
    np.testing.assert_array_equal(sgd[:, 0].round(), [1, 2])
    assert (sgd[:, 0] < adam[:, 0]).all()
    np.testing.assert_allclose(
        whiskers(ax), [(0.55, 0.65), (0.45, 0.55), (0.85, 0.95), (0.75, 0.85)]
    )


def test_tasks_are_integers_on_the_axis(ax) -> None:
    plots.forgetting({"sgd": band([1, 2, 3], [0.6, 0.8, 0.9])}, ax=ax)
    assert tick_texts(ax) == ["1", "2", "3"]
    np.testing.assert_array_equal(ax.get_xticks(), [1, 2, 3])


def test_tasks_can_be_named(ax) -> None:
    result = band([1, 2], [0.6, 0.9])
    plots.forgetting(result, ax=ax, ticks=["0/1", "2/3"], xlabel="class pair")
    assert tick_texts(ax) == ["0/1", "2/3"]
    assert ax.get_xlabel() == "class pair"


def test_every_task_needs_a_name(ax) -> None:
    with pytest.raises(UsageError, match="must name 2 tasks, got 1"):
        plots.forgetting(band([1, 2], [0.6, 0.9]), ax=ax, ticks=["0/1"])


def test_bars_start_at_zero_and_end_at_the_estimate(ax) -> None:
    plots.accuracy({"sgd": interval(0.9), "shampoo": interval(0.93, half=0.01)}, ax=ax)
    bars = [patch for patch in ax.patches if patch.get_width() > 0]
    assert [bar.get_height() for bar in bars] == [0.9, 0.93]
    assert {bar.get_y() for bar in bars} == {0}
    assert ax.get_ylim()[0] == 0
    np.testing.assert_allclose(whiskers(ax), [(0.88, 0.92), (0.92, 0.94)])
    assert tick_texts(ax) == ["SGD", "Shampoo"]
    assert [text.get_text() for text in ax.texts] == ["0.900", "0.930"]
    assert ax.get_xlabel() == "mean and interval (t, 95 %), n = 5"


def test_seeds_are_written_on_the_bars_where_they_differ(ax) -> None:
    plots.accuracy({"sgd": interval(90.0), "adam": interval(80.0, n=3)}, ax=ax)
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["90.0", "n=5", "80.0", "n=3"]
    assert ax.get_xlabel() == "mean and interval (t, 95 %)"


def test_groups_stand_apart_and_share_one_legend_entry_a_label(ax) -> None:
    results = {
        "permuted": {"sgd": interval(0.9), "shampoo": interval(0.93)},
        "pairs": {"sgd": interval(0.2)},
    }
    plots.accuracy(results, ax=ax)
    assert tick_texts(ax) == ["permuted", "pairs"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["SGD", "Shampoo"]
    sgd = points(ax, "sgd")
    assert [y for _, y in sgd] == [0.9, 0.2]
    assert sgd[1][0] - points(ax, "shampoo")[0][0] == 2  # one empty slot


def test_one_seed_has_a_bar_without_whisker(ax) -> None:
    alone = Interval(0.9, NAN, NAN, 1, "one seed")
    plots.accuracy({"sgd": alone}, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["0.900"]
    assert whiskers(ax) == []


def test_a_diverged_label_is_shown_without_a_bar(ax) -> None:
    diverged = Interval(NAN, NAN, NAN, 5, "t, 95 %")
    plots.accuracy({"sgd": interval(0.9), "adam": diverged}, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["0.900", "no finite value"]


def test_an_error_names_the_group(ax) -> None:
    with pytest.raises(UsageError, match="no results in group 'pairs'"):
        plots.accuracy({"permuted": {"sgd": interval(0.9)}, "pairs": {}}, ax=ax)


@pytest.mark.parametrize(
    ("names", "slanted"), [(["sgd"], False), (["a" * 30] * 2, True)]
)
def test_names_slant_where_they_would_run_into_each_other(names, slanted, ax) -> None:
    labels = [f"{name}{i}" for i, name in enumerate(names)]
    plots.accuracy(dict.fromkeys(labels, interval(0.9)), ax=ax)
    assert (ax.get_xticklabels()[0].get_rotation() > 0) is slanted
