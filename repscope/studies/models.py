"""The networks of the studies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def mlp(sizes: Sequence[int], *, seed: int) -> nn.Sequential:
    """Return a ReLU network; ``hidden1``, ``hidden2``... are its activations.

    Args:
        sizes: Widths from the input to the output.
        seed: Decides the initial weights (PyTorch's default scheme); the global
            random state is left as it was.

    Returns:
        ``linear1, hidden1, linear2, hidden2, ..., head``.

    Example:
        >>> [name for name, _ in mlp([4, 3, 2], seed=0).named_children()]
        ['linear1', 'hidden1', 'head']
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        *hidden, last = pairwise(sizes)
        for i, (n_in, n_out) in enumerate(hidden, start=1):
            layers[f"linear{i}"] = nn.Linear(n_in, n_out)
            layers[f"hidden{i}"] = nn.ReLU()
        layers["head"] = nn.Linear(*last)
    return nn.Sequential(layers)
