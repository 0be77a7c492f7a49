"""One rank of the distributed tests of Moments: reduce every case, save what came out.

Usage: one_rank.py RANK WORLD FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from repscope import Moments
from repscope.errors import MetricError, UsageError

CASES = {
    "plain": lambda rank: torch.randn(100 + 50 * rank, 5),
    "mean 1e6": lambda rank: torch.randn(300 - 99 * rank, 5) + 1e6,
    "ranks far apart": lambda rank: torch.randn(200, 5) * 1e-3 + 1e6 + rank,
    "rank 0 saw none": lambda rank: torch.randn(150 * rank, 5) - 1e6,
    "rank 1 saw one": lambda rank: torch.randn(1 if rank else 40, 5),
    "nobody saw any": lambda rank: torch.empty(0, 5),
    "widths differ": lambda rank: torch.randn(40, 5 + 2 * rank),
    "too far apart": lambda rank: torch.full((4, 5), 1e200 * (-1) ** rank),
}


def moments_of(rows: torch.Tensor) -> Moments:
    moments = Moments()
    for block in rows.split(64):
        moments.update(block)
    return moments


def outcome(moments: Moments, group: object = None) -> tuple[str, torch.Tensor | None]:
    try:
        assert moments.all_reduce(group) is moments
        error = ""
    except (MetricError, UsageError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return error, moments.to_tensor() if moments.count else None


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    found = {}
    for number, (name, rows) in enumerate(CASES.items()):
        torch.manual_seed(100 * rank + number)
        own = rows(rank)
        found[name] = own, *outcome(moments_of(own))
    torch.manual_seed(rank)
    own = torch.randn(9, 5)
    only_first = dist.new_group([0])
    found["only rank 0"] = own, *outcome(moments_of(own), only_first)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
