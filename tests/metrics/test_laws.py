"""Laws over the dicts at the foot of each family: a new row is tested at once."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch

import repscope as rs
from repscope.landscape import SPARSITY_METRICS
from repscope.metrics.alignment import ALIGNMENT_METRICS
from repscope.metrics.collapse import COLLAPSE_METRICS, neural_collapse
from repscope.metrics.continual import CONTINUAL_METRICS
from repscope.metrics.probe import PROBE_METRICS
from repscope.metrics.similarity import SIMILARITY_METRICS
from repscope.metrics.spectra import SPECTRUM_METRICS
from repscope.metrics.units import OVERLAP_METRICS, UNIT_METRICS
from repscope.metrics.weights import WEIGHT_METRICS
from repscope.results import SparsityCurve

# name -> power of the factor that the input is scaled by; 0 is invariant.
POWER = {"trace": 2, "weight_rms": 1} | dict.fromkeys(CONTINUAL_METRICS, 1)


def over(rows):
    return pytest.mark.parametrize(("name", "metric"), rows.items(), ids=list(rows))


def equal(found, expected, rtol=1e-9):
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=1e-12, check_dtype=False
    )


def rotation(d):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


@pytest.fixture(name="X")
def features():
    mixing = torch.randn(7, 7, dtype=torch.float64) * torch.logspace(0, -1, 7)
    return torch.randn(3, 40, 7, dtype=torch.float64) @ mixing.double() + 1


@pytest.fixture
def y():
    return torch.arange(40).remainder(4)


# -- spectra -----------------------------------------------------------------
@over(SPECTRUM_METRICS)
def test_spectrum_metrics(name, metric, X):
    def read(features):
        return metric(rs.spectrum(features))

    found = read(X)
    assert found.shape == (3,)
    equal(found, torch.stack([read(one) for one in X]))
    equal(read(X[:, torch.randperm(40)]), found)
    equal(read(X[..., torch.randperm(7)]), found)
    equal(read(X @ rotation(7)), found)
    equal(read(X + torch.randn(7)), found)
    equal(read(X * -3), found * 3.0 ** POWER.get(name, 0), rtol=1e-9)
    equal(read(X.float()), found, rtol=1e-5)
    equal(metric(rs.spectrum(X).eigenvalues), found)
    twice = metric(rs.spectrum(X.repeat(1, 2, 1), ddof=0))
    equal(twice, metric(rs.spectrum(X, ddof=0)))
    wide = torch.nn.functional.pad(X, (0, 60))
    equal(read(wide @ rotation(67)), found)


@over(SPECTRUM_METRICS)
def test_spectrum_metrics_leave_the_spectrum_alone(name, metric, X):
    spectrum = rs.spectrum(X)
    before = spectrum.eigenvalues.clone()
    metric(spectrum)
    assert torch.equal(spectrum.eigenvalues, before)


# -- classes -----------------------------------------------------------------
@over(ALIGNMENT_METRICS)
def test_alignment_metrics(name, metric, X, y):
    X = X[0]
    found = metric(X, y)
    assert found.ndim == 0
    order = torch.randperm(40)
    equal(metric(X[order], y[order]), found)
    equal(metric(X @ rotation(7), y), found)
    equal(metric(X * 3, y), found)
    equal(metric(X, 50 - 7 * y), found)
    equal(metric(X.float(), y), found, rtol=1e-5)
    equal(metric(X.numpy(), y.tolist()), found)


@over(COLLAPSE_METRICS)
def test_collapse_metrics(name, metric, X, y):
    def read(features, labels):
        return metric(neural_collapse(features, labels))

    X = X[0]
    found = read(X, y)
    assert found.ndim == 0
    order = torch.randperm(40)
    equal(read(X[order], y[order]), found)
    equal(read(X @ rotation(7), y), found)
    equal(read(X + torch.randn(7), y), found)
    equal(read(X * -3, y), found)
    equal(read(X.repeat(2, 1), y.repeat(2)), found)
    equal(read(X, 50 - 7 * y), found)
    equal(read(X.float(), y), found, rtol=1e-5)
    equal(read(X.numpy(), y.tolist()), found)


# -- units -------------------------------------------------------------------
@over(UNIT_METRICS)
def test_unit_metrics(name, metric, X):
    X = X.relu()
    X[..., 2] *= 1e-3
    found = metric(X)
    assert found.shape == (3,)
    equal(found, torch.stack([metric(one) for one in X]))
    equal(metric(X[:, torch.randperm(40)]), found)
    equal(metric(X[..., torch.randperm(7)]), found)
    equal(metric(X * 3), found)
    equal(metric(X.repeat(1, 2, 1)), found)
    equal(metric(X.repeat(1, 1, 2)), found)
    equal(metric(X.float()), found, rtol=1e-5)
    equal(metric(X.tolist()), found)


@over(OVERLAP_METRICS)
def test_overlap_metrics(name, metric, X, y):
    X = X[0].relu()
    found = metric(X, y)
    assert found.ndim == 0
    order = torch.randperm(40)
    equal(metric(X[order], y[order]), found)
    equal(metric(X[:, torch.randperm(7)], y), found)
    equal(metric(X * 3, y), found)
    equal(metric(X, 50 - 7 * y), found)
    equal(metric(X.float(), y), found, rtol=1e-5)
    equal(metric(X.numpy(), y.tolist()), found)


# -- weights -----------------------------------------------------------------
@over(WEIGHT_METRICS)
def test_weight_metrics(name, metric, X):
    w = X[0]
    found = metric(w)
    assert found.ndim == 0
    equal(metric(w.flatten()[torch.randperm(280)]), found)
    equal(metric(-w), found)
    equal(metric(w * 3), found * 3.0 ** POWER.get(name, 0))
    equal(metric(w.float()), found, rtol=1e-5)
    equal(metric([w[:10], w[10:]]), found)


# -- continual ---------------------------------------------------------------
@over(CONTINUAL_METRICS)
def test_continual_metrics(name, metric):
    A = torch.rand(4, 5, 5, dtype=torch.float64)
    found = metric(A)
    equal(found, torch.stack([metric(one) for one in A]))
    equal(metric(A * 100), found * 100.0 ** POWER[name])
    later = torch.ones(5, 5).triu(1).bool()
    assert torch.equal(metric(A.masked_fill(later, torch.nan)), found)
    equal(metric(A.float()), found, rtol=1e-5)
    shift = metric(A + 0.5) - found
    keeps = name.endswith("_accuracy")
    equal(shift, torch.full_like(shift, 0.5 if keeps else 0.0))


# -- sparsity ----------------------------------------------------------------
@over(SPARSITY_METRICS)
def test_sparsity_metrics(name, metric):
    def curve(levels, score):
        found = torch.tensor(levels)
        return SparsityCurve(found, found, torch.as_tensor(score), 97.0)

    levels, score = [0.0, 0.8, 0.8997, 0.9498, 1.0], [97.0, 95.0, 91.0, 85.0, 10.0]
    found = metric(curve(levels, score))
    assert found.ndim == 0
    assert found.item() in score[2:4]
    equal(metric(curve(levels, torch.tensor(score) * 2)), found * 2)
    assert metric(curve([0.0, 0.8, 0.92], [97.0, 95.0, 91.0])).isnan()


# -- all of them -------------------------------------------------------------
def calls(X, y):
    A = torch.rand(5, 5, dtype=torch.float64)
    for name, metric in SPECTRUM_METRICS.items():
        yield name, lambda X, metric=metric: metric(rs.spectrum(X)), (X,)
    for name, metric in ALIGNMENT_METRICS.items():
        yield name, metric, (X[0], y)
    for name, metric in COLLAPSE_METRICS.items():
        yield name, lambda X, y, m=metric: m(neural_collapse(X, y)), (X[0], y)
    for name, metric in UNIT_METRICS.items():
        yield name, metric, (X.relu(),)
    for name, metric in {**OVERLAP_METRICS, **PROBE_METRICS}.items():
        yield name, metric, (X[0].relu(), y)
    for name, metric in WEIGHT_METRICS.items():
        yield name, metric, (X[0],)
    for name, metric in CONTINUAL_METRICS.items():
        yield name, metric, (A,)


def test_no_metric_modifies_its_input_or_keeps_a_graph(X, y):
    for name, metric, inputs in calls(X, y):
        inputs[0].requires_grad_()
        before = [value.detach().clone() for value in inputs]
        assert not metric(*inputs).requires_grad, name
        for value, kept in zip(inputs, before, strict=True):
            assert torch.equal(value.detach(), kept), name


def test_no_metric_needs_contiguous_input(X, y):
    for _, metric, (first, *rest) in calls(X, y):
        strided = torch.stack([first, first], -1)[..., 0]
        assert not strided.is_contiguous()
        equal(metric(strided, *rest), metric(first, *rest))


def test_names_are_unique_across_families():
    families = (
        SPECTRUM_METRICS,
        ALIGNMENT_METRICS,
        SIMILARITY_METRICS,
        COLLAPSE_METRICS,
        UNIT_METRICS,
        OVERLAP_METRICS,
        PROBE_METRICS,
        WEIGHT_METRICS,
        CONTINUAL_METRICS,
        SPARSITY_METRICS,
    )
    names = [name for family in families for name in family]
    assert len(names) == len(set(names))


def test_the_oracle_answers_of_the_hand_written_matrix_cover_every_row():
    assert set(cases.ACCURACY_ANSWERS) == set(CONTINUAL_METRICS)
    assert np.shape(cases.ACCURACY) == (3, 3)
