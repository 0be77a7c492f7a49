"""The rule behind the verdicts, on tables with known answers."""

import math

import pandas as pd
import pytest

from repscope.studies.claims import CLAIMS, claims_hash, judge
from repscope.studies.summary import (
    HEADLINE,
    by_seed,
    difference_table,
    final_values,
    headline_table,
)

CLAIM = next(c for c in CLAIMS if c.quantity.metric == "old_task_accuracy")


def frame(first, second, *, metric="old_task_accuracy", notes=None):
    """Return a table as `measure` makes it, for the two optimizers of ``CLAIM``."""
    rows = []
    for optimizer, values in (("shampoo", first), ("adam", second)):
        for seed, value in enumerate(values):
            rows.append(
                {
                    "run": f"pairs-{optimizer}-s{seed}",
                    "optimizer": optimizer,
                    "seed": seed,
                    "task": "pairs digits",
                    "step": 100,
                    "layer": "",
                    "target": "accuracy",
                    "metric": metric,
                    "value": value,
                    "n_samples": 0,
                    "note": (notes or {}).get((optimizer, seed), ""),
                }
            )
    return final_values(pd.DataFrame(rows))


def verdict_of(table):
    (found,) = [j for j in judge(table) if j.claim is CLAIM]
    return found


def around(center, n):
    """Return ``n`` values whose mean is ``center``, spread by about 0.01."""
    return [center + 0.01 * ((-1) ** i) * (1 + i / n) for i in range(n)]


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (0.30, "holds"),
        (-0.30, "opposite sign"),
        (0.0, "no difference"),
        (0.05, "not decided"),  # right at the margin
    ],
)
def test_the_rule_follows_the_numbers(gap, expected):
    n = 10
    base = [0.4 + 0.02 * i for i in range(n)]  # seeds differ; the pairing removes it
    first = [b + g for b, g in zip(base, around(gap, n), strict=True)]
    found = verdict_of(frame(first, base))
    assert found.verdict == expected
    assert found.label == expected
    assert found.n == n
    assert found.interval.estimate == pytest.approx(sum(around(gap, n)) / n, abs=1e-12)


def test_below_ten_seeds_a_verdict_is_a_preview():
    found = verdict_of(frame([0.8, 0.81, 0.82, 0.8, 0.79], [0.1, 0.1, 0.12, 0.1, 0.1]))
    assert found.label == "preview, n = 5: holds"


def test_a_diverged_run_is_counted_and_can_forbid_the_verdict():
    notes = {("adam", 3): "diverged"}
    table = frame([0.8] * 5, [0.1, 0.12, 0.1, math.nan, 0.1], notes=notes)
    found = verdict_of(table)
    assert (found.verdict, found.n, found.n_lost) == ("not reported", 4, 1)
    header, rows = headline_table(table, (CLAIM.quantity,))
    assert header[-1] == "old pairs %"
    assert rows[0][:2] == ["adam", "5 (1 diverged)"]
    assert rows[1][:3] == ["shampoo", "5", "80.0 [80.0, 80.0]"]


def test_missing_runs_are_said_to_be_missing():
    found = verdict_of(frame([0.8, 0.8], []))
    assert (found.verdict, found.interval) == ("not reported", None)


def test_only_shared_seeds_are_compared():
    found = verdict_of(frame([0.8, 0.9, 0.7], [0.1, 0.1]))
    assert found.n == 2


def test_only_studies_that_ran_are_judged():
    judged = judge(frame([0.8], [0.1]))
    assert {j.claim.quantity.study for j in judged} == {"pairs"}


def test_tables_show_a_dash_where_a_study_has_no_such_run():
    table = frame([0.8, 0.9], [0.1, 0.2])
    header, rows = headline_table(table, (CLAIM.quantity, HEADLINE[4]))
    assert header == ["optimizer", "n", "old pairs %", "class cosine"]
    assert [row[-1] for row in rows] == ["–", "–"]
    header, rows = difference_table(table, (CLAIM.quantity,))
    assert rows == [["shampoo - adam", "2", "+70.0 [+70.0, +70.0]"]]


def test_the_last_record_of_a_run_is_what_counts():
    table = frame([0.8], [0.1])
    early = table.assign(step=1, value=0.0).drop(columns="study")
    both = pd.concat([early, table.drop(columns="study")])
    assert by_seed(final_values(both), CLAIM.quantity, "shampoo") == {0: 0.8}


def test_every_claim_is_complete_and_the_table_has_a_fingerprint():
    for claim in CLAIMS:
        assert claim.margin > 0
        assert claim.first != claim.second
        assert "section" in claim.source
    assert len(claims_hash()) == 12
    assert len({c.text for c in CLAIMS}) == len(CLAIMS)
