"""What a linear reader finds in frozen features.

Features have shape ``(n_samples, n_features)``, labels ``(n_samples,)``. scikit-learn
does the fitting, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from repscope.errors import MetricError, NotEnoughSamples, UsageError
from repscope.linalg.classes import grouped
from repscope.linalg.covariance import rescaled


def linear_probe_accuracy(
    X: Any,
    y: Any,
    *,
    seed: int = 0,
    test_share: float = 0.2,
    C: float = 1.0,
    max_iter: int = 1000,
) -> Tensor:
    """Return the held-out accuracy of a logistic regression on frozen features.

    The samples are split at random, class by class in proportion; features are
    standardised with the means and deviations of the training part; a multinomial
    logistic regression with penalty ``|w|^2 / (2 C)`` is fitted to it by L-BFGS and
    scored on the rest. To ask whether features are degenerate, pass the samples of
    *all* classes or tasks at once: two classes at a time may be separable in features
    that cannot tell ten apart. Compare with chance, which is the share of the largest
    class, and with the same probe at initialisation and on the raw inputs.

    Args:
        X: Features, shape ``(n_samples, n_features)``.
        y: Integer labels, shape ``(n_samples,)``.
        seed: Of the split; the result depends on it and on the order of the samples,
            on nothing else.
        test_share: Share of the samples that is held out, in (0, 1).
        C: Inverse of the strength of the penalty, > 0.
        max_iter: Most iterations of L-BFGS, after which scikit-learn warns.

    Returns:
        0-dim float64 on the device of ``X``, in [0, 1], in steps of one over the
        number of samples held out; the share of the largest class for constant
        features.

    Raises:
        UsageError: If ``test_share`` or ``C`` is out of range.
        MetricError: If there is a single class.
        NotEnoughSamples: If a class is too small to be on both sides of the split.

    References:
        Alain and Bengio (2016), Understanding intermediate layers using linear
        classifier probes, arXiv 1610.01644.

    Example:
        >>> X, y = [[0.0, 1.0], [0.0, 5.0], [2.0, 3.0]] * 5, [0, 1, 2] * 5
        >>> linear_probe_accuracy(X, y).item()
        1.0
    """  # noqa: DOC502 - raised by _check_sizes
    if not 0 < test_share < 1:
        raise UsageError(f"test_share must be in (0, 1), got {test_share}")
    if not (C > 0 and math.isfinite(C)):
        raise UsageError(f"C must be a finite number above 0, got {C}")
    features, members, classes = grouped(X, y)
    _check_sizes(members.bincount(), classes, test_share=test_share)
    scaled, _ = rescaled(features)

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = members.cpu().numpy()
    train_X, test_X, train_y, test_y = train_test_split(
        scaled.cpu().numpy(),
        labels,
        test_size=test_share,
        stratify=labels,
        random_state=seed,
    )
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))
    accuracy = reader.fit(train_X, train_y).score(test_X, test_y)
    return features.new_tensor(accuracy)


def _check_sizes(counts: Tensor, classes: Tensor, *, test_share: float) -> None:
    if len(classes) < 2:
        raise MetricError(
            f"a probe needs at least 2 classes, got {int(classes[0])} alone; pass the "
            f"samples of all classes at once"
        )
    # Rounding down must leave one on either side.
    needed = math.ceil(1 / min(test_share, 1 - test_share) - 1e-9)
    small = counts < needed
    if small.any():
        label, count = int(classes[small][0]), int(counts[small][0])
        raise NotEnoughSamples(
            f"a probe that holds out {test_share:g} of the samples needs at least "
            f"{needed} of each class, got {count} of class {label} "
            f"({int(small.sum())} of {len(classes)} classes are too small); leave "
            f"them out or record more"
        )


PROBE_METRICS: dict[str, Callable[[Any, Any], Tensor]] = {
    "linear_probe_accuracy": linear_probe_accuracy,
}
