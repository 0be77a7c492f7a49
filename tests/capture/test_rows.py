import itertools
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from repscope.capture.rows import has_channels_first, leaves, to_rows
from repscope.errors import UnsupportedOutput


@dataclass
class Output:
    logits: torch.Tensor
    cache: object = None


def paths(value):
    return [path for path, _ in leaves(value, layer="layer")]


def test_every_leaf_of_a_structure_has_a_path():
    t = torch.ones(2, 3)
    pair = namedtuple("pair", "a b")
    assert paths(t) == [""]
    assert paths((t, None, t)) == ["[0]", "[2]"]
    assert paths({"h": t, "t": (t, t)}) == ["h", "t[0]", "t[1]"]
    assert paths(OrderedDict(x=t)) == ["x"]
    assert paths(pair(t, t)) == ["[0]", "[1]"]
    assert paths(Output(t)) == ["logits"]
    assert paths({"ids": torch.arange(3), "h": t}) == ["h"]
    assert paths(None) == []


def test_an_unreadable_output_is_named():
    with pytest.raises(UnsupportedOutput, match="'layer' returned a set"):
        paths({"h"})
    with pytest.raises(UnsupportedOutput, match=r"returned a function at \[1\]"):
        paths((torch.ones(1), paths))


def test_numbers_and_text_beside_tensors_are_passed_over():
    assert paths({"h": torch.ones(2), "n": 3, "name": "x", "ok": True}) == ["h"]


def rows(value, module, maps=()):
    known = set(maps)
    return to_rows(value, channels_first=has_channels_first(value, module, maps=known))


def test_rows_of_each_kind_of_layer():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(rows(x, nn.Conv2d(3, 3, 1)), x.mean((2, 3)))
    assert torch.equal(rows(x, nn.ReLU()), x.mean((2, 3)))
    series = torch.randn(2, 3, 7)
    assert torch.equal(rows(series, nn.Conv1d(3, 3, 1)), series.mean(2))
    tokens = rows(series, nn.ReLU())
    assert torch.equal(tokens, series.reshape(6, 7))
    assert rows(torch.ones(4), nn.ReLU()).shape == (4, 1)
    assert rows(torch.tensor(1.0), nn.ReLU()).shape == (1, 1)


@pytest.mark.parametrize(
    ("how", "maps", "tokens"),
    [
        ("auto", "n c a b -> n c mean", "n s t d -> (n s t) d"),
        ("pool", "n c a b -> n c mean", "n s t d -> n d mean"),
        ("positions", "n c a b -> (n a b) c", "n s t d -> (n s t) d"),
        ("tokens", "n c a b -> (n c a) b", "n s t d -> (n s t) d"),
        ("flatten", "n c a b -> n (c a b)", "n s t d -> n (s t d)"),
    ],
)
def test_every_reduction_puts_each_value_where_it_belongs(how, maps, tokens):
    """Against loops over plain numbers."""
    x = torch.randn(2, 3, 4, 5)
    for pattern, first in ((maps, True), (tokens, False)):
        got = to_rows(x, channels_first=first, how=how)
        torch.testing.assert_close(got, by_hand(x, pattern), rtol=1e-6, atol=1e-6)
    assert torch.equal(to_rows(x[0, 0], channels_first=False, how=how), x[0, 0])


def by_hand(x, pattern):
    """Return the rows that a pattern of axis names describes."""
    left, right = (side.strip() for side in pattern.split("->"))
    names = left.split()
    row_axes, *rest = re.findall(r"\([^)]*\)|\w+", right)
    mean = "mean" in rest
    row_names = row_axes.strip("()").split()
    column_names = " ".join(r for r in rest if r != "mean").strip("()").split()
    sizes = dict(zip(names, x.shape, strict=True))
    rows = []
    for row in itertools.product(*(range(sizes[n]) for n in row_names)):
        columns = []
        for column in itertools.product(*(range(sizes[n]) for n in column_names)):
            at = dict(zip([*row_names, *column_names], [*row, *column], strict=True))
            index = tuple(at.get(name, slice(None)) for name in names)
            value = x[index]
            assert mean or value.ndim == 0
            columns.append(value.double().mean().item())
        rows.append(columns)
    return torch.tensor(rows, dtype=x.dtype)


@pytest.mark.parametrize("module", [nn.Linear(5, 5), nn.LayerNorm(5)])
def test_layers_with_features_last_keep_them_whatever_comes_before(module):
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(rows(x, module), x.reshape(24, 5))


def test_what_has_the_shape_of_a_map_met_before_is_a_map():
    x = torch.randn(2, 3, 7)
    assert torch.equal(rows(x, nn.ReLU(), maps=[x.shape]), x.mean(2))
    assert rows(x, nn.LayerNorm(7), maps=[x.shape]).shape == (6, 7)


def test_half_precision_maps_are_averaged_in_float32():
    x = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    x[0, 0, 0, 0] = 1000.0
    mean = rows(x, nn.Conv2d(1, 1, 1))
    assert mean.dtype == torch.bfloat16
    assert mean.item() == pytest.approx(1 + 999 / 4096, rel=1e-2)
