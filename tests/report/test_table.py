"""The text table."""

from __future__ import annotations

import pytest

from repscope.errors import UsageError
from repscope.report.table import display_width, text_table


def test_numbers_stand_under_each_other() -> None:
    table = text_table(
        ["optimizer", "n", "rank"], [["sgd", "5", "30.3"], ["muon", "10", "9"]]
    )
    assert table.splitlines() == [
        "optimizer   n  rank",
        "---------  --  ----",
        "sgd         5  30.3",
        "muon       10     9",
    ]


def test_columns_end_where_they_should_with_wide_and_combining_characters() -> None:
    names = ["学习率", "e\u0301tude", "plain", "ｆｕｌｌ"]
    lines = text_table(["name", "value"], [[name, "1"] for name in names]).splitlines()
    assert {display_width(line) for line in lines} == {len("ｆｕｌｌ") * 2 + 2 + 5}
    assert all(line.endswith("    1") for line in lines[2:])


def test_alignment_is_a_letter_a_column() -> None:
    rows = [["1", "a", "x"], ["10", "bb", "yy"]]
    assert text_table(["n", "name", "tail"], rows, align="rll").splitlines() == [
        " n  name  tail",
        "--  ----  ----",
        " 1  a     x",
        "10  bb    yy",
    ]


def test_missing_cells_are_dashes() -> None:
    assert text_table(["a", "b"], [["x", None]]).splitlines()[-1] == "x  –"


def test_no_rows_leave_the_headings() -> None:
    assert text_table(["a", "bb"], []) == "a  bb\n-  --"


def test_names_from_files_cannot_move_the_cursor() -> None:
    table = text_table(["run"], [["a\x1b[2Jb"], ["c\nd"], ["e\u202ef"]])
    assert table.splitlines()[2:] == ["a?[2Jb", "c?d", "e?f"]


def test_a_row_that_does_not_fit_is_named() -> None:
    with pytest.raises(UsageError, match="row 2 has 1 cells under 2 headings"):
        text_table(["a", "b"], [["1", "2"], ["3"]])


@pytest.mark.parametrize("align", ["l", "lx", "lrr", ""])
def test_alignment_that_does_not_fit_is_refused(align) -> None:
    with pytest.raises(UsageError, match="one 'l' or 'r' for each of the 2 columns"):
        text_table(["a", "b"], [], align=align)
