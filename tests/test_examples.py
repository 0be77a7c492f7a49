"""The examples run to their end; the documentation says what is true of the code."""

from __future__ import annotations

import argparse
import ast
import doctest
import re
import runpy
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import repscope
from repscope import optim, plots, studies
from repscope.cli.main import PLOT_KINDS, _parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BUILT = ("_build", "gallery", "generated")
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if not set(BUILT) & set(page.relative_to(DOCS).parts)
]
# Needs stores that exist only after `make demo`, files of the reader, or packages with
# which tests/integrations runs it.
SKETCHES = ("first-run.md", "store-format.md", "integrations.md")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


# -- examples ----------------------------------------------------------------
# With a screen but no window system, `plt.show()` says that it shows nothing.
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_examples_run_to_their_end_and_leave_nothing_behind(path, folder):
    runpy.run_path(str(path))
    assert plt.get_fignums()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_examples_assert_something(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert sum(isinstance(node, ast.Assert) for node in nodes) >= 3


# -- pages -------------------------------------------------------------------
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python") and p.name not in SKETCHES],
    ids=name,
)
def test_snippets_run_as_printed(page, folder):
    code = "\n".join(blocks(page, "python"))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_worked_steps_are_true():
    page = DOCS / "explanation" / "what-belongs-to-a-step.md"
    text = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    report: list[str] = []
    results = doctest.DocTestRunner().run(test, out=report.append)
    assert results.attempted
    assert not results.failed, "".join(report)


def commands() -> Iterator[tuple[str, str]]:
    for page in [*PAGES, ROOT / "README.md"]:
        for block in blocks(page, "(?:sh)?"):
            for line in block.splitlines():
                if line.startswith("repscope "):
                    yield page.name, line


def test_printed_commands_parse():
    found = list(commands())
    assert len(found) > 15
    for page, line in found:
        arguments = shlex.split(line, comments=True)[1:]
        try:
            parsed = _parser().parse_args(arguments)
        except SystemExit as error:
            pytest.fail(f"{page}: `{line}` is refused (exit code {error.code})")
        assert getattr(parsed, "kind", "spectrum") in PLOT_KINDS, line
        assert getattr(parsed, "name", "pairs") in studies.STUDIES, line


# -- reference ---------------------------------------------------------------
def subcommands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (
        action
        for action in _parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return found.choices


def test_every_command_and_option_is_on_the_command_line_page():
    text = (DOCS / "reference" / "cli.md").read_text()
    sections = dict(
        re.findall(r"^## repscope (\w+)(.*?)(?=^## |\Z)", text, re.M | re.S)
    )
    assert sections.keys() == subcommands().keys()
    sections["study"] += sections["demo"]  # "the options are those of demo"
    for command, parser in subcommands().items():
        known = {option for a in parser._actions for option in a.option_strings}
        missing = {o for o in known - {"-h", "--help"} if o not in sections[command]}
        assert not missing, command
        written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", sections[command]))
        assert written <= known, command
    for kind in PLOT_KINDS:
        assert f"| `{kind}` |" in sections["plot"]


def documented(module: str) -> set[str]:
    text = (DOCS / "reference" / "api.md").read_text()
    (section,) = re.findall(
        rf"currentmodule:: {re.escape(module)}\n(.*?)(?=currentmodule|automodule|\Z)",
        text,
        re.S,
    )
    listed = re.findall(r"^   (\w+)$", section, re.M)
    return {*listed, *re.findall(r"py:data:: (\w+)", section)}


@pytest.mark.parametrize(
    ("module", "public"),
    [
        ("repscope", set(repscope._HOME)),
        ("repscope.optim", set(optim.__all__)),
        ("repscope.plots", set(plots.__all__)),
        ("repscope.studies", set(studies.__all__)),
        # the rest of the room is for the rooms above it
        ("repscope.store", {"Check", "check", "pack", "remove", "repair"}),
    ],
)
def test_the_api_page_lists_exactly_the_public_names(module, public):
    assert documented(module) == public


def test_every_public_name_has_its_room_on_the_api_page():
    text = (DOCS / "reference" / "api.md").read_text()
    for module in repscope._SUBMODULES:
        assert f"## rs.{module}\n" in text


def test_every_page_is_in_a_table_of_contents():
    index = (DOCS / "index.md").read_text()
    for page in PAGES:
        entry = page.relative_to(DOCS).with_suffix("").as_posix()
        assert entry == "index" or re.search(rf"^{entry}$", index, re.M), entry
