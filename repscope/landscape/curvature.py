"""How sharply the loss bends: the top eigenvalue and the trace of its Hessian.

Both need Hessian-vector products only, each about two passes backward through one
forward pass that is done once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from repscope.errors import NonFiniteError, UsageError
from repscope.landscape.copies import forked
from repscope.results import TopEigenvalue, TraceEstimate

Loss = Callable[[nn.Module], Tensor]
Preconditioner = Callable[[nn.Parameter, Tensor], Tensor]
Apply = Callable[[Tensor], Tensor]


def hessian_top_eigenvalue(
    model: nn.Module,
    loss: Loss,
    *,
    preconditioner: Preconditioner | None = None,
    tolerance: float = 1e-3,
    max_products: int = 100,
    seed: int = 0,
) -> TopEigenvalue:
    r"""Return the largest eigenvalue of the Hessian of a loss, plain or preconditioned.

    :math:`\lambda_{\max}(\nabla^2_\theta L)`, the algebraically largest, by Lanczos
    iteration with full reorthogonalisation. With a preconditioner P, that of
    :math:`P^{-1} \nabla^2 L`, which has the same eigenvalues as the symmetric
    :math:`P^{-1/2} \nabla^2 L\, P^{-1/2}`: the number to compare across optimizers.
    Times the learning rate over 2 it is 1 at the edge of stability of a method without
    momentum.

    Args:
        model: Left untouched, gradients and statistics included; every parameter that
            requires a gradient takes part.
        loss: Takes the model it is given (a copy, in the mode of ``model``) and returns
            a scalar that depends on its parameters.
        preconditioner: ``(parameter of model, tensor) -> tensor``, which multiplies by
            :math:`P^{-1/2}`; see ``rs.optim.inverse_sqrt_preconditioner``.
        tolerance: Stop when the residual is at most this share of the largest
            magnitude of an eigenvalue. The error is at most that, often its square.
        max_products: Stop after so many Hessian-vector products. As many vectors of
            8 bytes a parameter are held.
        seed: Of the first vector.

    Returns:
        The eigenvalue with its residual; 0 for a loss without curvature. NaN when a
        product is not finite.

    Raises:
        NonFiniteError: If the loss is not finite.
        UsageError: If ``loss`` returns no scalar or one that does not depend on the
            model it was given, or a number is out of range.

    References:
        Lanczos (1950); Pearlmutter (1994), Fast exact multiplication by the Hessian;
        Cohen et al. (2021), Gradient descent on neural networks typically occurs at
        the edge of stability, arXiv 2103.00065, and (2022), Adaptive gradient methods
        at the edge of stability, arXiv 2207.14484.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> scale = torch.tensor([3.0, -5.0])
        >>> found = hessian_top_eigenvalue(
        ...     model, lambda m: (scale * m.weight.square()).sum() / 2
        ... )
        >>> round(found.value, 4), found.converged
        (3.0, True)
    """  # noqa: DOC502 - partly raised by _hessian
    if not tolerance > 0 or max_products < 1:
        raise UsageError(
            f"tolerance must be positive and max_products at least 1, got {tolerance} "
            f"and {max_products}"
        )
    apply, size, device = _hessian(model, loss, preconditioner)
    generator = torch.Generator(device).manual_seed(seed)
    start = torch.randn(size, generator=generator, device=device, dtype=torch.float64)
    value, residual, n_products, converged = _lanczos(
        apply, start, tolerance=tolerance, max_products=min(max_products, size)
    )
    return TopEigenvalue(
        value, residual, n_products, converged, preconditioner is not None
    )


def hessian_trace(
    model: nn.Module,
    loss: Loss,
    *,
    preconditioner: Preconditioner | None = None,
    n_probes: int = 100,
    seed: int = 0,
) -> TraceEstimate:
    r"""Estimate the trace of the Hessian of a loss, plain or preconditioned.

    Hutchinson's mean of :math:`z^\top \nabla^2 L\, z` over probes of independent
    :math:`\pm 1`, which is unbiased and exact for a diagonal Hessian.

    Args:
        model: As in ``hessian_top_eigenvalue``.
        loss: As in ``hessian_top_eigenvalue``.
        preconditioner: As in ``hessian_top_eigenvalue``, for the trace of
            :math:`P^{-1} \nabla^2 L`.
        n_probes: Hessian-vector products, at least 2.
        seed: Of the probes.

    Returns:
        The mean with its standard error.

    Raises:
        NonFiniteError: If the loss is not finite.
        UsageError: If ``loss`` returns no scalar or one that does not depend on the
            model it was given, or there are fewer than 2 probes.

    References:
        Hutchinson (1989), A stochastic estimator of the trace of the influence matrix.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> scale = torch.tensor([3.0, -5.0])
        >>> hessian_trace(
        ...     model, lambda m: (scale * m.weight.square()).sum() / 2
        ... ).value
        -2.0
    """  # noqa: DOC502 - partly raised by _hessian
    if n_probes < 2:
        raise UsageError(
            f"n_probes must be at least 2 (for a standard error), got {n_probes}"
        )
    apply, size, device = _hessian(model, loss, preconditioner)
    generator = torch.Generator(device).manual_seed(seed)
    found = []
    for _ in range(n_probes):
        signs = torch.randint(0, 2, (size,), generator=generator, device=device)
        probe = 2 * signs.to(torch.float64) - 1
        found.append(probe @ apply(probe))
    values = torch.stack(found)
    stderr = values.std() / math.sqrt(n_probes)
    return TraceEstimate(
        float(values.mean()), float(stderr), n_probes, preconditioner is not None
    )


# -- products ----------------------------------------------------------------
def _hessian(
    model: nn.Module, loss: Loss, preconditioner: Preconditioner | None
) -> tuple[Apply, int, torch.device]:
    clone = copy.deepcopy(model)
    pairs = zip(model.parameters(), clone.parameters(), strict=True)
    taking_part = [(own, copied) for own, copied in pairs if copied.requires_grad]
    with torch.enable_grad(), forked(clone):
        gradients = _gradients(loss, clone, [copied for _, copied in taking_part])
    used = [
        (own, copied, gradient)
        for (own, copied), gradient in zip(taking_part, gradients, strict=True)
        if gradient is not None
    ]
    if not used:
        raise UsageError(
            "loss(model) does not depend on the model it is given: use the argument, "
            "which is a copy of your model, and return the scalar with its graph"
        )
    originals, params = [own for own, _, _ in used], [copied for _, copied, _ in used]
    bent = [gradient for *_, gradient in used]
    home = params[0].device

    def half(flat: Tensor) -> list[Tensor]:
        pieces = flat.split([p.numel() for p in params])
        parts = [v.view_as(p).to(p) for v, p in zip(pieces, params, strict=True)]
        if preconditioner is None:
            return parts
        return [preconditioner(p, v) for p, v in zip(originals, parts, strict=True)]

    def joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        return torch.cat([v.flatten().to(home, torch.float64) for v in parts])

    def apply(flat: Tensor) -> Tensor:
        product = _product(bent, params, half(flat))
        return joined(half(joined(product)) if preconditioner else product)

    return apply, sum(p.numel() for p in params), home


def _gradients(
    loss: Loss, model: nn.Module, params: list[nn.Parameter]
) -> list[Tensor | None]:
    value = loss(model)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise UsageError(
            f"loss(model) must return a scalar tensor, got {type(value).__name__}"
            f"{shape}"
        )
    if not math.isfinite(value.item()):
        raise NonFiniteError(f"loss(model) is {value.item()}, which has no curvature")
    if not params or not value.requires_grad:
        return [None] * len(params)
    return list(
        torch.autograd.grad(
            value.squeeze(), params, create_graph=True, allow_unused=True
        )
    )


def _product(
    gradients: list[Tensor], params: list[nn.Parameter], vectors: list[Tensor]
) -> list[Tensor]:
    # Where the loss is linear, the gradient has no graph and the Hessian is zero.
    pairs = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(p) for p in params]
    return list(
        torch.autograd.grad(
            [g for g, _ in pairs],
            params,
            grad_outputs=[v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


# -- Lanczos -----------------------------------------------------------------
def _lanczos(
    apply: Apply, start: Tensor, *, tolerance: float, max_products: int
) -> tuple[float, float, int, bool]:
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        image = apply(basis[-1])
        diagonal.append(image @ basis[-1])
        # Twice is enough: without it, rounding brings found eigenvalues back.
        for _ in range(2):
            for vector in basis:
                image = image - (image @ vector) * vector
        left = image.norm()
        n = len(diagonal)
        if not bool(torch.isfinite(left)):
            return math.nan, math.nan, n, False
        T = torch.diag(torch.stack(diagonal))
        if beside:
            off = torch.stack(beside)
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(T)
        residual = float(left * vectors[-1, -1].abs())
        converged = residual <= tolerance * float(values.abs().amax())
        if converged or n == max_products:
            return float(values[-1]), residual, n, converged
        beside.append(left)
        basis.append(image / left)
