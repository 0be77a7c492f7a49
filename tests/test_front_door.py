"""The public names: lazy at run time, spelled out for type checkers."""

import ast
import pickle
from pathlib import Path

import pytest

import repscope
from repscope import errors, parallel


def test_the_stub_names_what_the_package_hands_out():
    stub = Path(repscope.__file__).with_suffix(".pyi").read_text()
    found = {
        (node.module, alias.asname)
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {(module, name) for name, module in repscope._HOME.items()}
    assert found == lazy | {("repscope", name) for name in repscope._SUBMODULES}
    assert set(repscope.__all__) <= set(dir(repscope))


ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.RepScopeError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_documented_prints_plainly_and_pickles(kind):
    error = kind("no layer 'a b'")
    assert kind.__doc__
    assert str(error) == "no layer 'a b'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    families = (
        errors.StoreError,
        errors.CaptureError,
        errors.MetricError,
        errors.UsageError,
    )
    assert kind is errors.RepScopeError or issubclass(kind, families)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.NotAStore, ValueError),
        (errors.StoreExists, FileExistsError),
        (errors.StoreFull, OSError),
        (errors.UnknownLayer, KeyError),
        (errors.UnsupportedOutput, TypeError),
        (errors.LabelMismatch, ValueError),
        (errors.UnknownName, KeyError),
    ],
)
def test_errors_are_also_the_builtin_a_caller_expects(kind, builtin):
    assert issubclass(kind, builtin)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([], ""),
        (["fc1"], "; did you mean 'fc1'?"),
        (["fc1", "fc2"], "; did you mean 'fc1' or 'fc2'?"),
        (["fc1", "fc2", "head", "fc3"], "; did you mean 'fc1', 'fc3' or 'fc2'?"),
    ],
)
def test_suggestions_read_as_a_sentence(known, expected):
    found = errors.suggest("fc11", known)
    assert sorted(found) == sorted(expected)  # the order among equals is free
    assert found.startswith("; did you mean 'fc1'") or not known


def _square(x):
    import torch

    return x * x, torch.get_num_threads()


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_from_workers_with_one_thread(jobs):
    found = list(parallel.run(_square, range(5), jobs=jobs))
    assert found == [(0, 1), (1, 1), (4, 1), (9, 1), (16, 1)]


def _fail(x):
    raise ValueError(f"item {x}")


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_worker_reaches_the_caller(jobs):
    with pytest.raises(ValueError, match="item"):
        list(parallel.run(_fail, [1, 2], jobs=jobs))
