"""Every worked number on the metrics page is true, and no table row is missing."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from repscope.landscape import SPARSITY_METRICS
from repscope.metrics.alignment import ALIGNMENT_METRICS
from repscope.metrics.collapse import COLLAPSE_METRICS
from repscope.metrics.continual import CONTINUAL_METRICS
from repscope.metrics.probe import PROBE_METRICS
from repscope.metrics.similarity import SIMILARITY_METRICS
from repscope.metrics.spectra import SPECTRUM_METRICS
from repscope.metrics.units import OVERLAP_METRICS, UNIT_METRICS
from repscope.metrics.weights import WEIGHT_METRICS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def test_the_worked_numbers_are_true():
    text = PAGE.read_text().replace("```pycon", "").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, {}, "metrics.md", str(PAGE), 0)
    report: list[str] = []
    results = doctest.DocTestRunner().run(test, out=report.append)
    assert results.attempted > 40
    assert not results.failed, "".join(report)


@pytest.mark.parametrize(
    "name",
    [
        *SPECTRUM_METRICS,
        *ALIGNMENT_METRICS,
        *SIMILARITY_METRICS,
        *COLLAPSE_METRICS,
        *UNIT_METRICS,
        *OVERLAP_METRICS,
        *PROBE_METRICS,
        *WEIGHT_METRICS,
        *CONTINUAL_METRICS,
        *SPARSITY_METRICS,
    ],
)
def test_every_metric_has_an_entry(name):
    assert name in PAGE.read_text()
