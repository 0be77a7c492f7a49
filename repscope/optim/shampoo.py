"""Shampoo, from the paper: one preconditioner for each dimension of a tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from repscope.errors import NonFiniteError, UsageError
from repscope.linalg.roots import inverse_root
from repscope.optim._groups import label


class Shampoo(torch.optim.Optimizer):
    r"""Precondition every dimension of a gradient by its own second-moment matrix.

    For a matrix with gradient :math:`G_t`, of shape ``(m, n)``,

    .. math::
        L_t = L_{t-1} + G_t G_t^\top, \qquad R_t = R_{t-1} + G_t^\top G_t, \qquad
        \theta_{t+1} = \theta_t
            - \eta\,(L_t + \epsilon I)^{-1/4}\, G_t\, (R_t + \epsilon I)^{-1/4}.

    A tensor of order k has k statistics and the exponent -1/(2k), so a vector has one
    and the exponent -1/2. Dimensions of size 1 are skipped: a ``(8, 4, 1, 1)`` kernel
    is a matrix, and a tensor with a single entry a vector of length 1. Memory and
    time go with the largest dimension: a statistic and its root for each.

    Args:
        params: Parameters, named parameters or groups of either; float32 or float64.
        lr: Learning rate, :math:`\eta`.
        eps: Absolute damping, added to the eigenvalues after their clamp at 0. A
            direction never seen so far has gain ``eps ** -0.25`` a side.
        beta: ``None`` keeps the running sum of the paper. A number in [0, 1) keeps a
            moving average with that decay, divided by ``1 - beta ** t`` so that the
            first steps are not too long.
        root_every: Recompute the roots at steps 1, 1 + k, 1 + 2k, ...
        warm_steps: Recompute them at each of the first so many steps too.
        norm_cap: Shorten a preconditioned step whose Frobenius norm is above the
            bound for fresh roots: ``sqrt(min(m, n))`` for a matrix, 1 for a vector;
            tensors of higher order are not capped. Stale roots can exceed that bound
            a hundredfold when a new task brings directions unseen so far.
        weight_decay: Decoupled decay: ``theta *= 1 - lr * weight_decay`` before the
            step; it enters neither the statistics nor the cap.

    Raises:
        UsageError: If a hyper-parameter is outside its range, or a parameter is
            neither float32 nor float64.

    References:
        Gupta, Koren and Singer (2018), Shampoo: preconditioned stochastic tensor
        optimization, ICML, algorithms 1 and 2.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Shampoo([weight], lr=1.0, eps=1e-12)
        >>> weight.grad = torch.tensor([[5.0, 0.0], [0.0, 0.1]])
        >>> optimizer.step()
        >>> weight.data.round(decimals=4)
        tensor([[-1.,  0.],
                [ 0., -1.]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        eps: float = 1e-4,
        beta: float | None = None,
        root_every: int = 25,
        warm_steps: int = 5,
        norm_cap: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "beta": beta,
            "root_every": root_every,
            "warm_steps": warm_steps,
            "norm_cap": norm_cap,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with hyper-parameters of its own.

        Args:
            param_group: ``{"params": ..., "lr": ..., ...}``; what is left out takes
                the value given to the constructor.

        Raises:
            UsageError: If a hyper-parameter is outside its range, or a parameter is
                neither float32 nor float64.
        """
        _check_hyper({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, param in enumerate(param_group["params"]):
            if param.dtype not in (torch.float32, torch.float64):
                self.param_groups.pop()
                culprit = label(param_group, len(self.param_groups), index)
                raise UsageError(
                    f"Shampoo needs float32 or float64 parameters, but {culprit} is "
                    f"{param.dtype}; keep it in float32 and use torch.autocast"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        All gradients are checked before anything changes, and all steps are computed
        before the first parameter moves.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            NonFiniteError: If a gradient holds NaN or infinity, or is too large to be
                squared (nothing has changed then); or if a preconditioned step
                overflows (no parameter has moved then).
            UsageError: If a gradient is sparse.
        """  # noqa: DOC502 - raised by the helpers that check
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        jobs = list(self._jobs())
        _check_gradients(jobs)
        states = [self.state[job.param] for job in jobs]
        for job, state in zip(jobs, states, strict=True):
            _accumulate(job, state)
        _refresh_roots(jobs, states)
        steps = [
            _precondition(job.grad, state["roots"])
            for job, state in zip(jobs, states, strict=True)
        ]
        for job, step, scale in zip(jobs, steps, _scales(jobs, steps), strict=True):
            lr, decay = float(job.group["lr"]), job.group["weight_decay"]
            if decay:
                job.param.mul_(1 - lr * decay)
            job.param.add_(step.view_as(job.param), alpha=-lr * scale)
        return loss

    def _jobs(self) -> Iterator[_Job]:
        for place, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is None or not param.numel():
                    continue
                name = label(group, place, index)
                if param.grad.layout != torch.strided:
                    raise UsageError(
                        f"Shampoo needs dense gradients, but that of {name} is "
                        f"{param.grad.layout}; build the layer with sparse=False"
                    )
                dims = [n for n in param.shape if n != 1] or [1]
                yield _Job(param, param.grad.reshape(dims), group, name)


class _Job(NamedTuple):
    """One parameter with a gradient, seen without its dimensions of size 1."""

    param: Tensor
    grad: Tensor
    group: dict[str, Any]
    name: str


def _check_hyper(hyper: dict[str, Any]) -> None:
    beta = hyper["beta"]
    rules = {
        "lr": (hyper["lr"] >= 0, "at least 0"),
        "eps": (hyper["eps"] > 0, "positive"),
        "beta": (beta is None or 0 <= beta < 1, "None or in [0, 1)"),
        "root_every": (hyper["root_every"] >= 1, "at least 1"),
        "warm_steps": (hyper["warm_steps"] >= 0, "at least 0"),
        "weight_decay": (hyper["weight_decay"] >= 0, "at least 0"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise UsageError(f"Shampoo: {name} must be {rule}, got {hyper[name]}")


def _check_gradients(jobs: list[_Job]) -> None:
    # A finite sum of squares proves finite entries and finite statistics.
    squares = [torch.dot(flat, flat) for flat in (job.grad.flatten() for job in jobs)]
    for job, square in zip(jobs, squares, strict=True):
        if math.isfinite(square.item()):
            continue
        bad = int((~torch.isfinite(job.grad)).sum())
        fault = (
            f"holds NaN or infinity in {bad} of {job.grad.numel()} entries"
            if bad
            else f"is too large to be squared in {job.grad.dtype}"
        )
        raise NonFiniteError(
            f"the gradient of {job.name} {fault}; nothing was changed: lower the "
            "learning rate, or look for the step at which the loss diverged"
        )


def _accumulate(job: _Job, state: dict[str, Any]) -> None:
    """Count the step and add the gradient to the statistic of each dimension."""
    if not state:
        state["step"] = 0
        state["statistics"] = [job.grad.new_zeros(n, n) for n in job.grad.shape]
        state["roots"] = [torch.eye(n).to(job.grad) for n in job.grad.shape]
    state["step"] += 1
    beta = job.group["beta"]
    keep, add = (1, 1) if beta is None else (beta, 1 - beta)
    for dim, statistic in enumerate(state["statistics"]):
        rows = job.grad.movedim(dim, 0).reshape(len(statistic), -1)
        statistic.addmm_(rows, rows.T, beta=keep, alpha=add)


def _refresh_roots(jobs: list[_Job], states: list[dict[str, Any]]) -> None:
    """Recompute the roots that are due, one decomposition for each matrix size."""
    batches = defaultdict(list)
    for job, state in zip(jobs, states, strict=True):
        if not _is_due(state["step"] - 1, job.group):
            continue
        for dim, C in enumerate(_unbiased(state, beta=job.group["beta"])):
            key = (len(C), C.dtype, C.device, job.group["eps"])
            batches[key].append((state["roots"], dim, C))
    for (*_, eps), batch in batches.items():
        p = torch.tensor([2 * len(roots) for roots, _, _ in batch])
        fresh = inverse_root(torch.stack([C for _, _, C in batch]), p=p, eps=eps)
        for (roots, dim, _), root in zip(batch, fresh, strict=True):
            roots[dim] = root


def _is_due(age: int, group: dict[str, Any]) -> bool:
    return not age % group["root_every"] or bool(age < group["warm_steps"])


def _unbiased(state: dict[str, Any], *, beta: float | None) -> list[Tensor]:
    statistics: list[Tensor] = state["statistics"]
    if beta is None:
        return statistics
    return [C / (1 - beta ** state["step"]) for C in statistics]


def _precondition(grad: Tensor, roots: list[Tensor]) -> Tensor:
    # Contracting the first dimension appends the result as the last one, so after
    # one turn per dimension they stand in their old order.
    for root in roots:
        grad = torch.tensordot(grad, root, dims=([0], [0]))
    return grad


def _scales(jobs: list[_Job], steps: list[Tensor]) -> list[float]:
    norms = [torch.linalg.vector_norm(step) for step in steps]
    scales = []
    for job, step, norm in zip(jobs, steps, (n.item() for n in norms), strict=True):
        # Before the cap: cap / inf * inf would be NaN.
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the preconditioned step of {job.name} overflows; no parameter was "
                "changed: raise eps or lower root_every"
            )
        cap = _norm_cap(step) if job.group["norm_cap"] else math.inf
        scales.append(1.0 if norm <= cap else cap / norm)
    return scales


def _norm_cap(step: Tensor) -> float:
    # The largest Frobenius norm that a step with fresh roots can have.
    return {1: 1.0, 2: math.sqrt(min(step.shape))}.get(step.ndim, math.inf)
