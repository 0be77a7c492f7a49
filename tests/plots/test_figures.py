"""Figures of a paper's size, and the files they become."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from plots.drawables import ONE, draw

from repscope import plots
from repscope.errors import UsageError


def drawn(kind="spectrum", **options):
    fig, ax = plots.figure()
    draw(kind, ONE[kind][0], ax=ax, **options)
    return fig


def ids(svg: str) -> list[str]:
    return re.findall(r'\bid="([^"]+)"', svg)


@pytest.mark.parametrize(("width", "inches"), [("single", 3.5), ("double", 7.2)])
def test_figure_fits_a_column(width, inches) -> None:
    fig, axes = plots.figure(2, 3, width=width)
    assert fig.get_figwidth() == inches
    assert axes.shape == (2, 3)
    assert plt.get_fignums() == []


def test_figure_height_and_shared_rows() -> None:
    fig, (left, right) = plots.figure(1, 2, height=2.0, sharey=True)
    assert fig.get_figheight() == 2.0
    left.set_ylim(3, 4)
    assert right.get_ylim() == (3, 4)


def test_unknown_width_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'double', 'single'.*got 'wide'"):
        plots.figure(width="wide")


@pytest.fixture(scope="module")
def svgs() -> dict[str, str]:
    return {kind: plots.to_svg(drawn(kind), title="x") for kind in plots.PLOTS}


@pytest.mark.parametrize("kind", plots.PLOTS)
def test_svg_is_one_element_without_address_or_foreign_names(kind, svgs) -> None:
    svg = svgs[kind]
    root = ET.fromstring(svg)
    assert root.tag == "svg"  # no namespace: it takes that of the page
    assert root.get("role") == "img"
    for trace in ("http", "xmlns", "xlink", "<?xml", "<!", "<style", "<metadata"):
        assert trace not in svg
    assert re.search(r'viewBox="0 0 252 [\d.]+"', svg)


@pytest.mark.parametrize("kind", plots.PLOTS)
def test_svg_of_equal_figures_is_equal_text(kind, svgs) -> None:
    assert plots.to_svg(drawn(kind), title="x") == svgs[kind]


def test_svg_of_one_figure_is_equal_text_twice_even_a_row_of_squares() -> None:
    fig, axes = plots.figure(1, 2, width="double")
    for panel in axes:
        draw("alignment", ONE["alignment"][0], ax=panel, colorbar=panel is axes[-1])
    assert plots.to_svg(fig, title="x") == plots.to_svg(fig, title="x")


def test_svg_ids_are_used_and_never_meet_those_of_another_figure(svgs) -> None:
    almost_equal = plots.to_svg(drawn(), title="y")
    inlined = [*svgs.values(), almost_equal]
    for svg in inlined:
        references = {*re.findall(r"url\(#([^)]+)\)", svg)}
        references |= {*re.findall(r'(?:href="#|labelledby=")([^"]+)"', svg)}
        assert references == set(ids(svg))
    every = [name for svg in inlined for name in ids(svg)]
    assert len(every) == len(set(every))


def test_svg_title_is_escaped_and_first() -> None:
    svg = plots.to_svg(drawn(), title="a < b & <script>")
    root = ET.fromstring(svg)
    assert root[0].tag == "title"
    assert root[0].text == "a < b & <script>"
    assert root.get("aria-labelledby") == root[0].get("id")
    assert "<script" not in svg


def test_svg_looks_the_same_under_other_settings(svgs) -> None:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": None}):
        assert plots.to_svg(drawn(), title="x") == svgs["spectrum"]


def test_drawing_of_a_pyplot_figure_without_layout_engine() -> None:
    fig, ax = plt.subplots()
    draw("spectrum", ONE["spectrum"][0], ax=ax)
    assert plots.to_svg(fig, title="x") == plots.to_svg(fig, title="x")
    assert fig.get_layout_engine() is None


def test_layout_goes_on_after_saving(tmp_path) -> None:
    fig = drawn()
    engine = fig.get_layout_engine()
    plots.save(fig, tmp_path / "a.png")
    assert fig.get_layout_engine() is engine


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")],
)
def test_save_writes_what_the_suffix_says_reproducibly(suffix, magic, tmp_path) -> None:
    first = plots.save(drawn(), tmp_path / f"a{suffix}")
    second = plots.save(drawn(), str(tmp_path / f"b{suffix}"))
    assert first == tmp_path / f"a{suffix}"
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()


def test_saved_svg_stands_alone(tmp_path) -> None:
    root = ET.parse(plots.save(drawn(), tmp_path / "a.svg")).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    names = {node.get("id") for node in root.iter()} - {None}
    used = {n.get("href", "")[1:] for n in root.iter()} - {""}
    assert used
    assert used <= names


@pytest.mark.parametrize("name", ["figure", "figure.jpg"])
def test_unknown_suffix_writes_nothing(name, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"suffix must be \.svg, \.png or \.pdf"):
        plots.save(drawn(), tmp_path / name)
    assert not list(tmp_path.iterdir())
