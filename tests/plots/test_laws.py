"""What holds for every row of PLOTS."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex
from plots.drawables import MAPPINGS, ONE, draw

from repscope import plots
from repscope.errors import UsageError

KINDS = list(plots.PLOTS)


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def colors(ax) -> set[str]:
    """Return the colours of everything that carries data."""
    found = {to_hex(line.get_color()) for line in ax.lines}
    found |= {to_hex(color) for c in ax.collections for color in c.get_edgecolor()}
    found |= {to_hex(color) for c in ax.collections for color in c.get_facecolor()}
    found |= {to_hex(p.get_facecolor()) for p in ax.patches if p.get_alpha()}
    return found | {to_hex(p.get_edgecolor()) for p in ax.patches if not p.get_fill()}


def test_every_plot_has_a_case() -> None:
    assert set(ONE) == set(plots.PLOTS)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_on_the_given_axes_and_nowhere_else(kind) -> None:
    fig, (left, right) = plots.figure(1, 2)
    assert draw(kind, ONE[kind][0], ax=right) is right
    assert right.has_data()
    assert not left.has_data()
    assert fig.axes == [left, right]
    assert plt.get_fignums() == []


@pytest.mark.parametrize("kind", KINDS)
def test_draws_on_the_current_axes_by_default(kind) -> None:
    fig, (first, second) = plt.subplots(1, 2)
    plt.sca(first)
    assert draw(kind, ONE[kind][0]) is first
    assert not second.has_data()
    assert plt.get_fignums() == [fig.number]


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_the_settings_of_matplotlib_alone(kind) -> None:
    before = dict(mpl.rcParams)
    fig, ax = plots.figure()
    draw(kind, ONE[kind][0], ax=ax)
    plots.to_svg(fig, title="x")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("kind", KINDS)
def test_title_is_taken_literally(kind, ax) -> None:
    draw(kind, ONE[kind][0], ax=ax, title="cost $5_0$ & $")
    ax.figure.draw_without_rendering()
    assert ax.get_title(loc="left") == "cost $5_0$ & $"


@pytest.mark.parametrize("kind", KINDS)
def test_axes_are_labelled(kind, ax) -> None:
    draw(kind, ONE[kind][0], ax=ax)
    assert ax.get_xlabel()
    assert ax.get_ylabel()


@pytest.mark.parametrize("kind", MAPPINGS)
def test_a_label_has_one_color_in_every_plot(kind, ax) -> None:
    draw(kind, ONE[kind][0], ax=ax)
    background = {"#ffffff", "#f4f4f4"}
    assert colors(ax) - background == {plots.style("shampoo").color.lower()}


@pytest.mark.parametrize("kind", ["spectrum", "rank_over_time", "sparsity"])
def test_lines_have_the_dash_and_marker_of_their_label(kind, ax) -> None:
    result, _ = ONE[kind]
    plots.PLOTS[kind]({"p-adam": result}, ax=ax)
    line, look = ax.lines[0], plots.style("p-adam")
    (reference,) = plots.figure()[1].plot([0], [0], linestyle=look.dash, linewidth=1.3)
    assert line.get_marker() == look.marker
    # matplotlib scales dashes by the line width and keeps them in one private field.
    assert line._dash_pattern == reference._dash_pattern


@pytest.mark.parametrize("kind", MAPPINGS)
def test_one_result_needs_no_label(kind, ax) -> None:
    assert plots.PLOTS[kind](ONE[kind][0], ax=ax) is ax
    legend = ax.get_legend()
    assert legend is None or all(t.strip() for t in legend_texts(ax))


@pytest.mark.parametrize(
    "kind", ["spectrum", "rank_over_time", "weight_histogram", "sparsity", "forgetting"]
)
def test_legend_shows_names_as_written_and_any_text_literally(kind, ax) -> None:
    result, _ = ONE[kind]
    plots.PLOTS[kind]({"p-adam": result, "_mine": result, "$a$": result}, ax=ax)
    ax.figure.draw_without_rendering()
    names = [text.strip().split(" ")[0] for text in legend_texts(ax)]
    assert names == ["Adam+P", "_mine", "$a$"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_draw_is_an_error(kind, ax) -> None:
    with pytest.raises(UsageError, match=f"plots.{kind} found no "):
        draw(kind, ONE[kind][1], ax=ax)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_one_label_without_values_is_named_and_the_others_drawn(kind, ax) -> None:
    good, bad = ONE[kind]
    if kind == "weight_histogram":
        bad = type(bad)(0 * good.counts, good.edges, 0, 0, 0)
    plots.PLOTS[kind]({"sgd": good, "shampoo": bad}, ax=ax)
    shown = [t.get_text() for t in ax.texts] + (
        legend_texts(ax) if ax.get_legend() else []
    )
    assert any("no " in text for text in shown)
    assert plots.style("sgd").color in colors(ax)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_an_empty_mapping_is_an_error(kind, ax) -> None:
    with pytest.raises(UsageError, match=rf"plots\.{kind} got no results"):
        plots.PLOTS[kind]({}, ax=ax)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [3.0, {"sgd": [1.0, 2.0]}], ids=["bare", "labelled"])
def test_anything_but_results_is_an_error(kind, wrong, ax) -> None:
    with pytest.raises(
        UsageError, match=rf"plots\.{kind} draws .*, got (float|list|dict)"
    ):
        plots.PLOTS[kind](wrong, ax=ax)
    assert not ax.has_data()


def test_labels_are_text(ax) -> None:
    with pytest.raises(UsageError, match="under text labels, got Spectrum under 3"):
        plots.spectrum({3: ONE["spectrum"][0]}, ax=ax)


def test_legend_stays_inside_where_nothing_makes_room() -> None:
    _, ax = plt.subplots()
    draw("rank_over_time", ONE["rank_over_time"][0], ax=ax)
    ax.figure.canvas.draw()
    legend, box = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert box.x0 <= legend.x0
    assert legend.y1 <= box.y1


def test_legend_covers_no_data_and_title_covers_no_legend() -> None:
    fig, ax = plots.figure()
    result, _ = ONE["rank_over_time"]
    names = ("sgd", "adam", "adamw", "shampoo", "p-sgd", "p-adam", "muon")
    plots.rank_over_time(dict.fromkeys(names, result), ax=ax, title="title")
    fig.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    title = ax._left_title.get_window_extent()
    assert ax.get_window_extent().y1 <= legend.y0
    assert legend.y1 <= title.y0 + 1
    assert title.y1 <= fig.bbox.y1
    assert legend.x1 <= fig.bbox.x1
