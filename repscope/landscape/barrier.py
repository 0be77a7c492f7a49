"""The loss along the straight line between two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from repscope._checks import check_finite
from repscope.errors import NonFiniteError, UsageError
from repscope.landscape.copies import check_alike, effective, score
from repscope.landscape.matching import match_units
from repscope.results import Barrier

Recalibrate = Iterable[Any] | Callable[[nn.Module], Any]


def loss_barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    points: int = 25,
    recalibrate: Recalibrate | None = None,
    match: bool = False,
    reference: float | Barrier | None = None,
) -> Barrier:
    r"""Return the loss along the straight line between two models.

    At :math:`\theta_\alpha = (1 - \alpha)\,\theta_a + \alpha\,\theta_b`, for equally
    spaced :math:`\alpha`, the barrier is

    .. math::
        \max_\alpha \; L(\theta_\alpha) - [(1 - \alpha) L(\theta_a)
            + \alpha L(\theta_b)].

    It says no more than "linearly connected up to so much, on this line": a barrier is
    no proof of another basin, and one that matching removes was a matter of names. Two
    seeds of one optimizer have barriers too, so give theirs as ``reference``.

    Args:
        model_a: One end; both models are left untouched.
        model_b: The other, of the same architecture.
        evaluate: Returns the loss (less is better, train or test: part of the number's
            name) of a model in the training or evaluation mode of ``model_a``. Torch's
            random state is the same at every point and afterwards what it was before.
        points: Models on the line, both ends among them, at least 3.
        recalibrate: For models with batch normalisation, whose averaged statistics fit
            no averaged weights: batches of inputs (a ``DataLoader``; the first entry of
            a tuple) from which the statistics are computed anew at every point, the
            ends included; or a callable that does it to the model it is given.
        match: Permute the hidden units of ``model_b`` first, see ``match_units``.
        reference: The barrier between two seeds (or data orders) of one optimizer.

    Returns:
        Losses, the barrier (at least 0) and where it is: NaN when the loss on the line
        is, infinite when that is.

    Raises:
        NonFiniteError: If the loss at an end is not finite.
        UsageError: If the models differ in architecture, there are too few points, or
            there is batch normalisation and ``recalibrate`` is missing.

    References:
        Frankle, Dziugaite, Roy and Carbin (2020), Linear mode connectivity and the
        lottery ticket hypothesis, ICML (there: over the mean of the end losses);
        Entezari et al. (2022), The role of permutation invariance in linear mode
        connectivity of neural networks, ICLR (this definition).

    Example:
        >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(a.weight, -1.0), nn.init.constant_(b.weight, 1.0)
        >>> found = loss_barrier(a, b, lambda m: (m.weight**2 - 1).square().sum())
        >>> found.barrier.item(), found.argmax
        (1.0, 0.5)
        >>> str(found).split(";")[0]
        'linearly connected up to 1 at 25 points, largest at 0.5'
    """  # noqa: DOC502 - partly raised by _measured
    if points < 3:
        raise UsageError(f"points must be at least 3 (both ends count), got {points}")
    refresh = _refresher(recalibrate, model_a)
    if match:
        model_b = match_units(model_a, model_b)
    clone = effective(model_a)
    a, b = _state(clone), _state(effective(model_b))
    check_alike(a, b)
    for which, state in (("model_a", a), ("model_b", b)):
        for name, value in state.items():
            if value.is_floating_point():
                check_finite(value, name=f"{which}: {name!r}")
    alphas = torch.linspace(0, 1, points, dtype=torch.float64)
    losses = []
    for alpha in alphas.tolist():
        clone = effective(model_a)
        clone.load_state_dict(_between(a, b, alpha))
        losses.append(score(evaluate, refresh(clone)))
    return _measured(alphas, losses, matched=match, reference=reference)


# -- the line ----------------------------------------------------------------
def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _between(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    # Counters have no value between two; those of model_a stand in.
    return {
        name: value.lerp(b[name].to(value), alpha)
        if value.is_floating_point()
        else value
        for name, value in a.items()
    }


def _measured(
    alphas: Tensor,
    losses: list[float],
    *,
    matched: bool,
    reference: float | Barrier | None,
) -> Barrier:
    for end, loss in (("model_a", losses[0]), ("model_b", losses[-1])):
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"evaluate({end}) is {loss}; a barrier starts from two finite losses"
            )
    found = torch.tensor(losses, dtype=torch.float64)
    excess = found - found[0].lerp(found[-1], alphas)
    excess[[0, -1]] = 0.0  # whatever lerp rounded
    at = int(excess.argmax())  # the first NaN, if there is one
    beside = math.nan if reference is None else reference
    return Barrier(
        alphas=alphas,
        losses=found,
        barrier=excess[at],
        argmax=float(alphas[at]),
        matched=matched,
        reference=float(beside.barrier if isinstance(beside, Barrier) else beside),
    )


# -- batch normalisation -----------------------------------------------------
def _refresher(
    recalibrate: Recalibrate | None, model: nn.Module
) -> Callable[[nn.Module], nn.Module]:
    kept = [name for name, module in model.named_modules() if _has_statistics(module)]
    if recalibrate is None:
        if kept:
            raise UsageError(
                f"{kept[0]!r} keeps batch statistics, and those of two models averaged "
                "fit none between them; pass recalibrate=batches of training inputs "
                "(or lambda model: None to keep the averages)"
            )
        return lambda clone: clone
    if isinstance(recalibrate, Iterator):
        raise UsageError(
            "recalibrate must give its batches once for every point: pass a list or a "
            "DataLoader, not an iterator"
        )

    def refresh(clone: nn.Module) -> nn.Module:
        if callable(recalibrate):
            recalibrate(clone)
        else:
            _recalibrate(clone, recalibrate)
        return clone

    return refresh


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


@torch.no_grad()
def _recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    # To their plain average over the batches.
    with _only_statistics(model) as norms:
        for batch in batches:
            model(batch[0] if isinstance(batch, list | tuple) else batch)
    if norms and not int(norms[0].num_batches_tracked):
        raise UsageError("recalibrate has no batches")


@contextmanager
def _only_statistics(model: nn.Module) -> Iterator[list[Any]]:
    """Let batch normalisation see training batches, and dropout none."""
    modes = {module: module.training for module in model.modules()}
    norms: list[Any] = [module for module in modes if _has_statistics(module)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the cumulative average
        norm.train()
    yield norms
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes.items():
        module.training = training
