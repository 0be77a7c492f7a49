"""Frozen results: numbers and what they mean, nothing else.

Metrics return them, plots take them, reports print them. ``to_frame()`` gives the
same numbers as a tidy table.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def _frame(columns: dict[str, object]) -> pd.DataFrame:
    import pandas as pd

    plain = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        for name, value in columns.items()
    }
    return pd.DataFrame(plain)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of a covariance, a second moment or a weight matrix.

    Attributes:
        eigenvalues: Descending, non-negative, shape ``(..., n_features)``; beyond
            ``min(n_samples, n_features)`` they are exact zeros.
        kind: ``"covariance"`` (centred), ``"second_moment"`` (uncentred) or
            ``"weight"`` (squared singular values).
        n_samples: Rows that went in (for a weight: its rows).
        n_features: Columns.
        ddof: Delta degrees of freedom of the normalisation; ``None`` for weights.
        effective_rank: Exponential of the entropy of the eigenvalue shares,
            shape ``(...)``.
        degenerate: Why the spectrum carries no information (``"constant"``), or
            ``None``.
    """

    eigenvalues: Tensor
    kind: Literal["covariance", "second_moment", "weight"]
    n_samples: int
    n_features: int
    ddof: int | None
    effective_rank: Tensor
    degenerate: str | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row per eigenvalue: ``batch, index, eigenvalue, share``."""
        flat = self.eigenvalues.detach().reshape(-1, self.eigenvalues.shape[-1])
        batch, k = flat.shape
        total = flat.sum(-1, keepdim=True)
        index = [i for _ in range(batch) for i in range(1, k + 1)]
        return _frame(
            {
                "batch": [b for b in range(batch) for _ in range(k)],
                "index": index,
                "eigenvalue": flat.reshape(-1),
                "share": (flat / total).reshape(-1),
            }
        )


@dataclass(frozen=True, eq=False)
class ClassCosine:
    """Cosine similarity between classes.

    Attributes:
        matrix: Shape ``(n_classes, n_classes)``; NaN where a class is excluded.
        classes: The labels, ascending, shape ``(n_classes,)``.
        norms: Norm of each class mean, shape ``(n_classes,)``.
        mean_share: ``m^2 / (m^2 + s^2)``: the share of the common mean in the class
            means, 0-dim.
        n_excluded: Zero vectors (classes, or samples for pairs) left out, because
            their direction is undefined.
        counts: Samples of each class, shape ``(n_classes,)``; ``None`` for an average
            over runs, as the next two.
        centred_std: Standard deviation of the cosines between different classes after
            the unweighted mean of the class means was subtracted, 0-dim.
        norm_cv: Standard deviation of ``norms`` over their mean, 0-dim.
    """

    matrix: Tensor
    classes: Tensor
    norms: Tensor
    mean_share: Tensor
    n_excluded: int
    counts: Tensor | None = None
    centred_std: Tensor | None = None
    norm_cv: Tensor | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row per ordered pair: ``class_a, class_b, cosine``."""
        labels = self.classes.tolist()
        return _frame(
            {
                "class_a": [a for a in labels for _ in labels],
                "class_b": [b for _ in labels for b in labels],
                "cosine": self.matrix.reshape(-1),
            }
        )


@dataclass(frozen=True, eq=False)
class ClassAlignment:
    """Readings of how classes point the same way, beside those of baselines.

    Attributes:
        features: What was read: ``"features"``, then the baselines.
        metrics: Names of the readings.
        values: Shape ``(n_features, n_metrics)``.
    """

    features: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Return one row per set of features: ``features`` and every metric."""
        columns = dict(zip(self.metrics, self.values.unbind(-1), strict=True))
        return _frame({"features": self.features, **columns})


@dataclass(frozen=True, eq=False)
class ClassDimension:
    """The parts of a covariance within and between classes.

    Attributes:
        within_rank: Effective rank of the covariance within classes, shape ``(...)``.
        between_rank: The same between class means, at most ``n_classes - 1``.
        within_share: Share of the total variance, in [0, 1].
        between_share: The rest.
        classes: The labels, ascending, shape ``(n_classes,)``.
        counts: Samples of each class, shape ``(n_classes,)``.
    """

    within_rank: Tensor
    between_rank: Tensor
    within_share: Tensor
    between_share: Tensor
    classes: Tensor
    counts: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Return two rows per matrix: ``batch, part, effective_rank, share``."""
        ranks = torch.stack([self.within_rank, self.between_rank], -1).reshape(-1, 2)
        shares = torch.stack([self.within_share, self.between_share], -1)
        return _frame(
            {
                "batch": [i for i in range(len(ranks)) for _ in range(2)],
                "part": ["within", "between"] * len(ranks),
                "effective_rank": ranks.reshape(-1),
                "share": shares.reshape(-1),
            }
        )


@dataclass(frozen=True, eq=False)
class RankStability:
    """Effective rank of all examples and of two random halves of them.

    Attributes:
        effective_rank: Of all, shape ``(...)``.
        halves: Of the halves, shape ``(..., 2)``.
        ratio: Mean of the halves over that of all: near 1 when more examples would
            not change the rank; NaN for a constant layer.
        n_examples: Examples, not rows.
        note: ``"n_examples < 5 n_features"``, or ``""``.
    """

    effective_rank: Tensor
    halves: Tensor
    ratio: Tensor
    n_examples: int
    note: str

    def to_frame(self) -> pd.DataFrame:
        """Return one row per matrix: all numbers, ``n_examples`` and ``note``."""
        first, second = self.halves.reshape(-1, 2).unbind(-1)
        return _frame(
            {
                "effective_rank": self.effective_rank.reshape(-1),
                "first_half": first,
                "second_half": second,
                "ratio": self.ratio.reshape(-1),
                "n_examples": self.n_examples,
                "note": self.note,
            }
        )


@dataclass(frozen=True, eq=False)
class Interference:
    """What a step is predicted to do to the loss of another task, to first order.

    Attributes:
        predicted_change: Inner product of the gradient of that loss and the step,
            0-dim, in units of the loss; positive where the step raises it.
        cosine: Of the two, 0-dim; NaN when either is zero.
    """

    predicted_change: Tensor
    cosine: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Return one row: ``predicted_change, cosine``."""
        return _frame(
            {
                "predicted_change": self.predicted_change.reshape(1),
                "cosine": self.cosine.reshape(1),
            }
        )


@dataclass(frozen=True, eq=False)
class NeuralCollapse:
    """How far features and classifier are from the collapsed simplex; 0 is collapsed.

    Attributes:
        nc1: Within-class over between-class covariance, 0-dim, >= 0 or infinite.
        cdnv: Class-distance normalised variance, 0-dim, >= 0 or infinite.
        nc2_equinorm: Coefficient of variation of the norms of the centred class
            means, 0-dim, >= 0.
        nc2_equiangular: Mean distance of their cosines from ``-1/(C-1)``, 0-dim.
        nc3: Distance between the normalised classifier and centred class means,
            0-dim, in [0, 2]; NaN without a classifier.
        nc4: Share of samples for which the classifier and the nearest class centre
            disagree, 0-dim, in [0, 1]; NaN without a classifier.
        accuracy: Share of these samples that the classifier gets right, 0-dim; NaN
            without a classifier.
        note: What limits these numbers or makes them NaN, or ``""``.
    """

    nc1: Tensor
    cdnv: Tensor
    nc2_equinorm: Tensor
    nc2_equiangular: Tensor
    nc3: Tensor
    nc4: Tensor
    accuracy: Tensor
    note: str = ""

    def to_frame(self) -> pd.DataFrame:
        """Return one row with all fields."""
        numbers = {k: [float(v)] for k, v in vars(self).items() if k != "note"}
        return _frame({**numbers, "note": [self.note]})


@dataclass(frozen=True, eq=False)
class ActivationOverlap:
    """How much the units that classes (or tasks) use are the same units.

    Attributes:
        matrix: Shape ``(n_classes, n_classes)``, in [0, 1]; NaN where a class is
            excluded.
        classes: The labels, ascending, shape ``(n_classes,)``.
        mean: Mean over pairs of different classes, 0-dim.
        n_excluded: Classes left out, because no unit is ever active for them.
    """

    matrix: Tensor
    classes: Tensor
    mean: Tensor
    n_excluded: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row per ordered pair: ``class_a, class_b, overlap``."""
        labels = self.classes.tolist()
        return _frame(
            {
                "class_a": [a for a in labels for _ in labels],
                "class_b": [b for _ in labels for b in labels],
                "overlap": self.matrix.reshape(-1),
            }
        )


@dataclass(frozen=True, eq=False)
class SubspaceOverlap:
    """How much of one subspace lies in another, beside chance.

    Attributes:
        overlap: Mean squared cosine of the principal angles, shape ``(...)``.
        chance: Its expected value for random subspaces, ``k / dimension``.
        k: Dimension of both subspaces.
        space: ``"samples"`` or ``"features"``.
        dimension: Of the space they lie in: ``n_samples - 1`` or ``n_features``.
    """

    overlap: Tensor
    chance: float
    k: int
    space: Literal["samples", "features"]
    dimension: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pair of a batch, with all fields."""
        return _frame({**vars(self), "overlap": self.overlap.reshape(-1)})


@dataclass(frozen=True, eq=False)
class BetweenWithin:
    """What separates groups, beside what separates the members of one group.

    Attributes:
        groups: Their names.
        means: Mean over pairs of members, shape ``(n_groups, n_groups)``, symmetric;
            on the diagonal within the group.
        n_pairs: Pairs behind each mean, integers of the same shape.
        between: Mean over the pairs of groups.
        within: Mean over the groups.
        ratio: ``between / within``.
    """

    groups: tuple[Hashable, ...]
    means: Tensor
    n_pairs: Tensor
    between: float
    within: float
    ratio: float

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pair of groups: ``group_a, group_b, mean, n_pairs``."""
        n = len(self.groups)
        places = [(i, j) for i in range(n) for j in range(i, n)]
        return _frame(
            {
                "group_a": [self.groups[i] for i, _ in places],
                "group_b": [self.groups[j] for _, j in places],
                "mean": [float(self.means[i, j]) for i, j in places],
                "n_pairs": [int(self.n_pairs[i, j]) for i, j in places],
            }
        )


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of weight magnitudes between fixed edges.

    Attributes:
        counts: Shape ``(bins,)``, integers.
        edges: Shape ``(bins + 1,)``, magnitudes (not their logarithms).
        n_zero: Entries that are exactly zero.
        underflow: Non-zero entries below the first edge.
        overflow: Entries above the last edge.
        n_excluded: Entries left out on request, in none of the counts.
        unit: ``"absolute"``, or ``"rms"`` for magnitudes over the root mean square of
            their tensor.
    """

    counts: Tensor
    edges: Tensor
    n_zero: int
    underflow: int
    overflow: int
    n_excluded: int = 0
    unit: Literal["absolute", "rms"] = "absolute"

    def to_frame(self) -> pd.DataFrame:
        """Return one row per bin: ``low, high, count``."""
        return _frame(
            {"low": self.edges[:-1], "high": self.edges[1:], "count": self.counts}
        )


@dataclass(frozen=True, eq=False)
class SparsityCurve:
    """Score of a model against the share of its weights set to zero.

    Attributes:
        sparsity: Share actually reached, ascending, shape ``(n_levels,)``.
        threshold: Largest magnitude set to zero at that level (NaN where the cut
            differs between layers).
        score: What ``evaluate`` returned, shape ``(n_levels,)``.
        dense_score: What it returned for the untouched model.
        n_excluded: Weights left out on request: neither ranked nor counted.
        layer_sparsity: Share reached in each tensor, by parameter name, each of shape
            ``(n_levels,)``; empty where it is not known.
    """

    sparsity: Tensor
    threshold: Tensor
    score: Tensor
    dense_score: float
    n_excluded: int = 0
    layer_sparsity: Mapping[str, Tensor] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per level: ``sparsity, threshold, score``."""
        return _frame(
            {
                "sparsity": self.sparsity,
                "threshold": self.threshold,
                "score": self.score,
            }
        )


@dataclass(frozen=True, eq=False)
class Displacement:
    """How far weights are from where they started.

    Attributes:
        names: One per tensor; ``("",)`` for a single one.
        distance: Frobenius norm of the difference, shape ``(n_tensors,)``.
        relative: The same over the norm at the start.
        total: Norm of the difference of all tensors together, 0-dim.
        total_relative: The same over the norm of all at the start, 0-dim.
    """

    names: tuple[str, ...]
    distance: Tensor
    relative: Tensor
    total: Tensor
    total_relative: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Return one row per tensor: ``name, distance, relative``."""
        return _frame(
            {
                "name": list(self.names),
                "distance": self.distance,
                "relative": self.relative,
            }
        )


@dataclass(frozen=True, eq=False)
class Movement:
    """The path of weights or of a representation, and where it led.

    Attributes:
        n_steps: Steps between the points that were given.
        path_length: Sum of the lengths of the steps, 0-dim.
        displacement: Distance between the first and the last point, 0-dim.
        wasted: ``path_length / displacement``, 0-dim.
        step_cosine: Mean cosine between one step and the next, 0-dim.
        n_still: Steps of length 0, which have no direction and enter no cosine.
    """

    n_steps: int
    path_length: Tensor
    displacement: Tensor
    wasted: Tensor
    step_cosine: Tensor
    n_still: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row with all fields."""
        return _frame(
            {
                name: [float(value) if isinstance(value, Tensor) else value]
                for name, value in vars(self).items()
            }
        )


@dataclass(frozen=True, eq=False)
class Barrier:
    """The loss along the straight line between two models.

    Attributes:
        alphas: Places on the line, from 0 (the first model) to 1, ``(n_points,)``.
        losses: What ``evaluate`` returned there, ``(n_points,)``.
        barrier: Largest excess of the loss over the straight line between the two end
            losses, 0-dim, at least 0.
        argmax: Where it is, a value of ``alphas``.
        matched: Whether hidden units were matched first.
        reference: The barrier between two seeds of one optimizer, or NaN.
    """

    alphas: Tensor
    losses: Tensor
    barrier: Tensor
    argmax: float
    matched: bool = False
    reference: float = float("nan")

    @property
    def ratio(self) -> float:
        """The barrier over the reference; NaN without one or for 0 / 0."""
        height = float(self.barrier)
        if self.reference == 0 and height > 0:
            return float("inf")
        return height / self.reference if self.reference else float("nan")

    def __str__(self) -> str:
        beside = "no reference between two seeds of one optimizer"
        if self.reference == self.reference:
            beside = f"{self.reference:.3g} between two seeds of one optimizer"
        height = float(self.barrier)
        matched = " after matching" if self.matched else ""
        where = f", largest at {self.argmax:.2g}" if height else ""
        return (
            f"linearly connected up to {height:.3g} at {len(self.alphas)} points"
            f"{matched}{where}; {beside}"
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``alpha, loss``."""
        return _frame({"alpha": self.alphas, "loss": self.losses})


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest eigenvalue of a Hessian.

    Attributes:
        value: The eigenvalue.
        residual: Norm of ``H v - value v`` for a unit vector v: some eigenvalue is no
            farther away than that.
        n_products: Hessian-vector products behind it.
        converged: Whether the residual is within the tolerance.
        preconditioned: Whether it is that of ``P^-1 H``.
    """

    value: float
    residual: float
    n_products: int
    converged: bool
    preconditioned: bool

    def to_frame(self) -> pd.DataFrame:
        """Return one row with all fields."""
        return _frame({name: [value] for name, value in vars(self).items()})


@dataclass(frozen=True)
class TraceEstimate:
    """The trace of a Hessian, estimated with random probes.

    Attributes:
        value: Mean over the probes.
        stderr: Standard error of that mean.
        n_probes: Hessian-vector products behind it.
        preconditioned: Whether it is that of ``P^-1 H``.
    """

    value: float
    stderr: float
    n_probes: int
    preconditioned: bool

    def to_frame(self) -> pd.DataFrame:
        """Return one row with all fields."""
        return _frame({name: [value] for name, value in vars(self).items()})


@dataclass(frozen=True)
class PowerLaw:
    """A straight line through a log-log spectrum: a description, not evidence.

    Attributes:
        exponent: ``s`` in ``lambda_i ~ i^-s``.
        first: First index of the fit, counted from 1.
        last: Last index of the fit.
        r2: Share of variance explained in log-log coordinates.
        stderr: Standard error of the exponent.
        note: Why the numbers are NaN, or ``""``.
    """

    exponent: float
    first: int
    last: int
    r2: float
    stderr: float
    note: str = ""

    def to_frame(self) -> pd.DataFrame:
        """Return one row with all fields."""
        return _frame({name: [value] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The mean, or the mean paired difference.
        low: Lower end.
        high: Upper end.
        n: Seeds behind it.
        method: How the interval was made, for example ``"paired t, 95 %"``.
        p_value: Exact sign-flip p of a paired difference, else ``None``.
        p_min: The smallest p that ``n`` seeds can give, else ``None``.
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str
    p_value: float | None = None
    p_min: float | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row with all fields."""
        return _frame({name: [value] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Holm:
    """p values adjusted for how many there are.

    Attributes:
        metrics: What each belongs to, in the order given.
        p_values: As given.
        adjusted: By Holm's step-down rule, at most 1.
    """

    metrics: tuple[str, ...]
    p_values: tuple[float, ...]
    adjusted: tuple[float, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per metric: ``metric, p_value, p_holm``."""
        return _frame(
            {
                "metric": self.metrics,
                "p_value": self.p_values,
                "p_holm": self.adjusted,
            }
        )


@dataclass(frozen=True)
class Compared:
    """One metric of two conditions over paired seeds.

    Attributes:
        metric: Its name.
        label: ``"primary"`` (declared before the run) or ``"exploratory"``.
        interval: Mean difference over the seeds with both values; of an exploratory
            metric without p.
        worst_low: Lower end of both t intervals: with diverged runs of the first at
            the lower bound and those of the second at the upper one, and the reverse.
        worst_high: Upper end of both; without diverged runs these two are the ends of
            ``interval``.
        bounds: The two values that diverged runs take, ``None`` where there are none.
        n_diverged: Diverged runs of the first and of the second.
        primary: What was declared, or ``None``.
        p_holm: p adjusted over the primary metrics, or ``None``.
        verdict: On a primary metric; ``""`` for an exploratory one.
        note: What limits the result, or ``""``.
    """

    metric: str
    label: Literal["primary", "exploratory"]
    interval: Interval
    worst_low: float
    worst_high: float
    bounds: tuple[float, float] | None
    n_diverged: tuple[int, int]
    primary: Primary | None
    p_holm: float | None
    verdict: str
    note: str

    def _row(self) -> dict[str, object]:
        low, high = self.bounds or (None, None)
        claim = self.primary
        return {
            "metric": self.metric,
            "label": self.label,
            "estimate": self.interval.estimate,
            "low": self.interval.low,
            "high": self.interval.high,
            "n": self.interval.n,
            "n_diverged_a": self.n_diverged[0],
            "n_diverged_b": self.n_diverged[1],
            "worst_low": self.worst_low,
            "worst_high": self.worst_high,
            "bound_low": low,
            "bound_high": high,
            "direction": claim.direction if claim else "",
            "margin": claim.margin if claim else None,
            "p_value": self.interval.p_value,
            "p_min": self.interval.p_min,
            "p_holm": self.p_holm,
            "verdict": self.verdict,
            "note": self.note,
        }


@dataclass(frozen=True)
class Primary:
    """What is declared of a primary metric before any run.

    Attributes:
        direction: Whether the first condition is claimed to be ``"greater"`` or
            ``"less"``.
        margin: Smallest difference that matters, in units of the metric.
        bounds: Lowest and highest value the metric can take, which diverged runs are
            given; ``None`` takes the extremes of the runs that did not diverge.
    """

    direction: Literal["greater", "less"]
    margin: float
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Every metric of two conditions over paired seeds, primary ones first.

    Attributes:
        rows: One `Compared` a metric.
    """

    rows: tuple[Compared, ...]

    def __getitem__(self, metric: str) -> Compared:
        """Return the row of a metric."""
        return {row.metric: row for row in self.rows}[metric]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per metric; p and verdict of primary metrics only."""
        import pandas as pd

        frame = pd.DataFrame([row._row() for row in self.rows])
        numbers = ["bound_low", "bound_high", "margin", "p_value", "p_min", "p_holm"]
        return frame.astype(dict.fromkeys(numbers, float))


@dataclass(frozen=True, eq=False)
class Band:
    """A curve over seeds: mean and interval at each point.

    Attributes:
        x: Positions, shape ``(n_points,)``: steps, indices, tasks or sparsities.
        estimate: Mean over seeds, shape ``(n_points,)``.
        low: Lower end of the interval, NaN where there are fewer than 2 seeds.
        high: Upper end.
        n: Seeds at each point, shape ``(n_points,)``.
    """

    x: Tensor
    estimate: Tensor
    low: Tensor
    high: Tensor
    n: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``x, estimate, low, high, n``."""
        return _frame(
            {
                name: getattr(self, name)
                for name in ("x", "estimate", "low", "high", "n")
            }
        )
