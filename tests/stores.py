"""Comparing what two runs have recorded."""

from __future__ import annotations

import torch


def assert_resumed_like(run, whole):
    """Fail unless a run that was stopped reads like one that was not."""
    assert run.steps == whole.steps
    assert run.streams == whole.streams
    for target, layer in whole.streams:
        # Outputs end a step before weights do.
        for step in whole.steps[: -1 if target == "outputs" else None]:
            a, b = (each.read(layer, step=step, target=target) for each in (run, whole))
            assert torch.equal(a, b)
    assert run.scalars().equals(whole.scalars())
