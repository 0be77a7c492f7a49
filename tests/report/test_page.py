"""The report page: whole, self-contained, escaped, readable by a screen reader."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from repscope import plots
from repscope.errors import UsageError
from repscope.report import page as page_module
from repscope.report.page import Figure, Page, Table, Verdict, render, write
from repscope.results import Band

EVIL = "<script>alert('&\")</script>"
VOID = {"meta", "path", "use", "rect", "br"}


def svg(height: float) -> str:
    fig, ax = plots.figure()
    value = torch.tensor([1.0, height])
    band = Band(torch.arange(2), value, value, value, torch.ones(2))
    plots.rank_over_time({"sgd": band}, ax=ax)
    return plots.to_svg(fig, title=f"rank {height}")


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(
        title="Report",
        lead=("What was asked.", "What was found."),
        verdicts=(
            Verdict("Lower", "3.1", "rank", "+2 [1, 3]", "1", "not decided", 5, True),
            Verdict("Higher", "3.2", "rank", "+2 [1, 3]", "1", "holds", 10, False),
        ),
        tables=(
            Table(
                "Headline",
                ("optimizer", "rank"),
                (("SGD", "3 [2, 4]"), ("Muon", None)),
                caption="Inputs: probe.",
                note="Two runs diverged.",
            ),
        ),
        figures=(
            Figure("rank", "Rank", "Over training.", svg(2.0), "rank.csv", "draw(a)"),
            Figure("rank-2", "Rank again", "Over training.", svg(3.0)),
        ),
        provenance={"torch": "2.13.0", "seeds": "0, 1"},
    )


class Reader(HTMLParser):
    """Collects what a reader would meet, and fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def said(self, tag) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def test_page_needs_nothing_else(page) -> None:
    html = render(page)
    reader = Reader(html)
    assert "http" not in html
    for tag in ("script", "link", "img", "iframe", "object", "base", "form"):
        assert reader.all(tag) == []
    assert not re.search(r"url\((?!#)|@import", html)
    links = [a["href"] for a in reader.all("a")]
    assert all(link.startswith("#") or link == "rank.csv" for link in links)
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)


def test_everything_is_on_the_page_in_reading_order(page) -> None:
    reader = Reader(render(page))
    words = " ".join(text for _, text in reader.texts)
    order = ["What was asked.", "Headline", "Inputs: probe.", "Two runs diverged."]
    order += ["Lower", "Higher", "Over training.", "draw(a)", "2.13.0"]
    places = [words.index(text) for text in order]
    assert places == sorted(places)
    assert len(reader.all("svg")) == len(page.figures)
    assert len(reader.all("figcaption")) == len(page.figures)


def test_headings_never_skip_a_level(page) -> None:
    levels = [
        int(t[1]) for t, _ in Reader(render(page)).tags if re.fullmatch("h[1-6]", t)
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_tables_say_what_their_headers_are_for(page) -> None:
    reader = Reader(render(page))
    assert reader.all("html") == [{"lang": "en"}]
    assert [th["scope"] for th in reader.all("th")] == ["col", "col", "row", "row"]
    assert reader.said("th") == ["optimizer", "rank", "SGD", "Muon"]
    assert reader.said("td") == ["3", "–"]
    assert "[2, 4]" in reader.said("span")


def test_ids_are_unique_and_every_anchor_has_a_target(page) -> None:
    reader = Reader(render(page))
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = {a["href"][1:] for a in reader.all("a") if a["href"].startswith("#")}
    named |= {a["aria-labelledby"] for _, a in reader.tags if "aria-labelledby" in a}
    assert named <= set(ids)


def test_verdicts_are_words_in_one_neutral_badge(page) -> None:
    html = render(page)
    badges = re.findall(r'<span class="(badge[^"]*)">([^<]*)</span>', html)
    assert badges == [("badge", "preview, n = 5: not decided"), ("badge", "holds")]
    assert "n = 10" in html


def test_all_text_is_escaped(page) -> None:
    verdict = Verdict(*[EVIL] * 6, n=5, preview=True)
    table = Table(EVIL, (EVIL, EVIL), ((EVIL, EVIL),), EVIL, EVIL)
    figure = replace(
        page.figures[0], id=EVIL, title=EVIL, caption=EVIL, csv=EVIL, code=EVIL
    )
    evil = Page(EVIL, (EVIL,), (verdict,), (table,), (figure,), {EVIL: EVIL})
    reader = Reader(render(evil))
    assert reader.all("script") == []
    assert sum(EVIL in text for _, text in reader.texts) >= 18


def test_an_empty_page_is_a_page() -> None:
    reader = Reader(render(Page("Nothing yet")))
    assert reader.said("h1") == ["Nothing yet"]
    assert reader.all("section") == []


@pytest.mark.parametrize(
    "markup", ["<p>no</p>", "<svg></svg>", '<svg viewBox="0 0 1 1"><script/></svg>']
)
def test_a_figure_must_be_a_plain_svg(markup) -> None:
    figure = Figure("a", "A", "", markup)
    with pytest.raises(UsageError, match="figure 'a' is not a plain <svg>"):
        render(Page("x", figures=(figure,)))


def test_figures_need_ids_of_their_own(page) -> None:
    with pytest.raises(UsageError, match="ids of their own"):
        render(replace(page, figures=(page.figures[0],) * 2))


def test_rows_must_fit_their_header() -> None:
    table = Table("T", ("a", "b"), (("1",),))
    with pytest.raises(UsageError, match="table 'T' needs 2 cells"):
        render(Page("x", tables=(table,)))


def test_write_replaces_the_file_whole(page, tmp_path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write(page, str(path)) == path
    assert path.read_text(encoding="utf-8") == render(page)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(page, tmp_path, monkeypatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(page_module.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(page, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
