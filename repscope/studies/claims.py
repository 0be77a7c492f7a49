"""The paper's claims, each with a metric and a margin fixed before any run.

The table is data; `judge` applies one rule to all rows, whichever way they fall.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from repscope.metrics.comparison import verdict
from repscope.results import Interval
from repscope.studies.summary import FURTHER, HEADLINE, Quantity, by_seed, difference

if TYPE_CHECKING:
    import pandas as pd

# Fewer seeds than this carry no verdict, only a preview of one.
SEEDS_FOR_A_VERDICT = 10


@dataclass(frozen=True)
class Claim:
    """One sentence of arXiv 2507.12224 as a paired difference.

    Attributes:
        text: The claim.
        source: Where the paper makes it.
        quantity: The one primary metric that decides it.
        first: Optimizer the claim is about.
        second: Optimizer it is compared with.
        direction: Whether ``first`` is claimed to be greater or less.
        margin: Smallest difference that matters, in units of the metric.
    """

    text: str
    source: str
    quantity: Quantity
    first: str
    second: str
    direction: Literal["greater", "less"]
    margin: float


@dataclass(frozen=True)
class Judgement:
    """What the runs say about a claim.

    Attributes:
        claim: The row of ``CLAIMS``.
        interval: Paired difference over seeds, ``None`` when runs are missing.
        verdict: ``"holds"``, ``"opposite sign"``, ``"no difference"``,
            ``"not decided"``, or ``"not reported"`` when runs are missing.
        n: Seeds with both values.
        n_lost: Seeds in which a run diverged.
    """

    claim: Claim
    interval: Interval | None
    verdict: str
    n: int
    n_lost: int

    @property
    def label(self) -> str:
        """The verdict as printed, marked as a preview below 10 seeds."""
        if self.verdict == "not reported" or self.n >= SEEDS_FOR_A_VERDICT:
            return self.verdict
        return f"preview, n = {self.n}: {self.verdict}"


_BY_METRIC = {(q.study, q.metric, q.layer): q for q in (*HEADLINE, *FURTHER)}


def _rank_is_lower(rival: str, name: str) -> Claim:
    return Claim(
        f"Shampoo's hidden layer has a lower effective rank than {name}'s",
        "section 3.1, figure 3 right",
        _BY_METRIC["permuted", "effective_rank", "hidden1"],
        "shampoo",
        rival,
        "less",
        1.0,
    )


def _remembers_more(rival: str, name: str) -> Claim:
    return Claim(
        f"Shampoo ends with a higher average accuracy than {name}",
        "section 3.1, figure 3 left",
        _BY_METRIC["permuted", "average_accuracy", ""],
        "shampoo",
        rival,
        "greater",
        0.01,
    )


def _forgets_less(rival: str, name: str) -> Claim:
    return Claim(
        f"Shampoo forgets less than {name}",
        "section 3.1",
        _BY_METRIC["permuted", "forgetting", ""],
        "shampoo",
        rival,
        "less",
        0.01,
    )


CLAIMS = (
    _remembers_more("sgd", "SGD"),
    _remembers_more("adamw", "AdamW"),
    _forgets_less("sgd", "SGD"),
    _forgets_less("adamw", "AdamW"),
    _rank_is_lower("sgd", "SGD"),
    _rank_is_lower("adamw", "AdamW"),
    Claim(
        "Shampoo keeps more of the old class pairs than Adam",
        "section 3.1, figure 4 left",
        _BY_METRIC["pairs", "old_task_accuracy", ""],
        "shampoo",
        "adam",
        "greater",
        0.05,
    ),
    Claim(
        "Features of different classes are less alike with Shampoo than Adam",
        "section 3.1, figure 4 right",
        _BY_METRIC["pairs", "class_cosine", "hidden2"],
        "shampoo",
        "adam",
        "less",
        0.01,
    ),
    Claim(
        "Power-preconditioned SGD survives 95 % sparsity better than SGD",
        "section 3.2",
        _BY_METRIC["sparsity", "accuracy_at_95", "global"],
        "p-sgd",
        "sgd",
        "greater",
        0.01,
    ),
    Claim(
        "The same when each layer is scaled to equal RMS before pruning",
        "section 3.2 (our control)",
        _BY_METRIC["sparsity", "accuracy_at_95", "balanced"],
        "p-sgd",
        "sgd",
        "greater",
        0.01,
    ),
    Claim(
        "Adam with P after it survives 95 % sparsity better than AdamW",
        "section 3.2",
        _BY_METRIC["sparsity", "accuracy_at_95", "global"],
        "p-adam",
        "adamw",
        "greater",
        0.01,
    ),
)


def claims_hash() -> str:
    """Return a hash of the claims table, margins included, for the report."""
    return hashlib.sha256(repr([asdict(c) for c in CLAIMS]).encode()).hexdigest()[:12]


def judge(frame: pd.DataFrame) -> list[Judgement]:
    """Return a verdict on every claim whose study was run.

    Args:
        frame: From `final_values`.

    Returns:
        One `Judgement` a claim, in the order of ``CLAIMS``.
    """
    studies = set(frame["study"])
    return [_judge(frame, c) for c in CLAIMS if c.quantity.study in studies]


def _judge(frame: pd.DataFrame, claim: Claim) -> Judgement:
    found = difference(frame, claim.quantity, claim.first, claim.second)
    runs = [by_seed(frame, claim.quantity, o) for o in (claim.first, claim.second)]
    n_seeds = len(runs[0].keys() & runs[1].keys())
    if found is None:
        return Judgement(claim, None, "not reported", 0, n_seeds)
    lost = n_seeds - found.n
    # Dropping the runs that failed would flatter whoever fails.
    if lost > 0.1 * n_seeds:
        return Judgement(claim, found, "not reported", found.n, lost)
    word = verdict(found, margin=claim.margin, direction=claim.direction)
    return Judgement(claim, found, word, found.n, lost)
