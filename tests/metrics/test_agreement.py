from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import accuracy_score, cohen_kappa_score

import repscope as rs
from repscope.errors import LabelError, LabelMismatch, NonFiniteError, NotEnoughSamples

ANSWERS = arrays(np.int64, 12, elements=st.integers(0, 3))


@settings(deadline=None, max_examples=10)
@given(a=ANSWERS, b=ANSWERS, c=ANSWERS)
def test_disagreement_is_a_metric(a, b, c):
    found = rs.disagreement(a, b).item()
    assert found == pytest.approx(1 - accuracy_score(a, b), abs=1e-15)
    assert rs.disagreement(a, a) == 0
    assert rs.disagreement(b, a).item() == found
    assert rs.disagreement(a, c) <= found + rs.disagreement(b, c).item() + 1e-12
    order = np.random.default_rng(0).permutation(12)
    assert rs.disagreement(a[order], b[order]).item() == pytest.approx(found)


def test_scores_count_by_their_largest():
    scores = torch.randn(3, 40, 5)
    answers = scores.argmax(-1)
    others = torch.randint(0, 5, (3, 40))
    found = rs.disagreement(scores, others)
    assert found.shape == (3,)
    assert torch.equal(found, rs.disagreement(answers, others))
    assert torch.equal(found, rs.disagreement(scores * 7, others))
    assert rs.disagreement([[0.5, 0.5]], [0]) == 0  # the first of equal ones


def test_error_consistency_is_cohens_kappa_of_being_right():
    y = torch.randint(0, 3, (200,))
    a = torch.where(torch.rand(200) < 0.7, y, (y + 1) % 3)
    b = torch.where(torch.rand(200) < 0.6, y, (y + 2) % 3)
    expected = cohen_kappa_score(a == y, b == y)
    assert rs.error_consistency(a, b, y).item() == pytest.approx(expected)
    assert rs.error_consistency(a, a, y).item() == pytest.approx(1)
    opposite = torch.where(a == y, (y + 1) % 3, y)
    assert rs.error_consistency(a, opposite, y) < 0
    assert rs.error_consistency(y, y, y).isnan()


@pytest.mark.parametrize("reading", [rs.disagreement, rs.error_consistency])
def test_predictions_that_are_none(reading):
    y = () if reading is rs.disagreement else ([0, 1],)
    with pytest.raises(LabelError, match=r"predictions_b must be integer labels"):
        reading([0, 1], [0.0, 1.0], *y)
    with pytest.raises(LabelMismatch, match=r"shape \(2,\), predictions_b \(3,\)"):
        reading([0, 1], [0, 1, 2], *y)
    with pytest.raises(NotEnoughSamples, match="predictions_a holds no predictions"):
        reading(torch.empty(0, 3), torch.empty(0, 3), *y)
    with pytest.raises(NonFiniteError, match="predictions_a has 1 non-finite"):
        reading([[float("nan"), 0.0], [0.0, 1.0]], [0, 1], *y)


def test_labels_must_be_those_of_the_predictions():
    with pytest.raises(LabelMismatch, match=r"labels must have shape \(2,\)"):
        rs.error_consistency([0, 1], [0, 1], [0, 1, 1])
