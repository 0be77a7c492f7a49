import pytest
import torch
from torch import nn

from repscope import layers
from repscope.capture import select
from repscope.errors import UnknownLayer, UsageError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.attention = nn.MultiheadAttention(4, 2)
        self.fc1 = nn.Linear(4, 3)
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc2(self.fc1(self.encoder(x)))


NAMES = ["encoder.0", "encoder.1", "attention", "fc1", "fc2"]


def names(model, spec):
    return [item.name for item in select(model, spec)]


def test_layers_lists_leaves_and_attention_as_one():
    assert layers(Net()) == NAMES


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("*", NAMES),
        ("fc*", ["fc1", "fc2"]),
        ("encoder", ["encoder"]),
        (["fc2", "encoder.*"], ["encoder.0", "encoder.1", "fc2"]),
        (nn.Linear, None),
        ([nn.ReLU, "fc1"], ["encoder.1", "fc1"]),
        (lambda name, module: name.endswith("2"), ["fc2"]),
    ],
)
def test_ways_to_choose(spec, expected):
    chosen = names(Net(), spec)
    if expected is None:  # out_proj of the attention is a Linear too
        expected = ["encoder.0", "attention.out_proj", "fc1", "fc2"]
    assert chosen == expected


def test_only_a_full_name_counts_as_exact():
    chosen = {item.name: item.exact for item in select(Net(), ["fc*", "fc1"])}
    assert chosen == {"fc1": True, "fc2": False}


def test_wrapper_prefixes_are_not_part_of_a_name():
    assert layers(nn.DataParallel(Net())) == NAMES
    assert layers(torch.compile(Net())) == NAMES


@pytest.mark.parametrize("spec", ["fc_1", "head.*", ["fc1", "nope"], nn.Conv2d, []])
def test_what_matches_nothing_is_refused(spec):
    with pytest.raises(UnknownLayer) as caught:
        select(Net(), spec)
    assert isinstance(caught.value, KeyError)


def test_the_message_offers_the_three_nearest_names():
    with pytest.raises(UnknownLayer) as caught:
        select(Net(), "fc_1")
    message = str(caught.value)
    assert "no layer matches 'fc_1'; did you mean 'fc1'" in message
    assert message.split("?")[0].count("'") == 2 * 4
    assert "lists all 5" in message


@pytest.mark.parametrize("spec", [3, [3]])
def test_other_types_are_refused(spec):
    with pytest.raises(UsageError, match="globs, names, module types"):
        select(Net(), spec)
