"""What eigenvalues have in common with their matrix, whoever computed them."""

from __future__ import annotations

import torch
from torch import Tensor

from repscope.linalg.routes import Unavailable

# Times n, in units of rounding. LAPACK needs up to 4, at every n up to 1000.
_TOLERANCE = 16


def checked(values: Tensor, C: Tensor, *, of: str) -> Tensor:
    """Return eigenvalues that have the trace and the norm of their matrices.

    Args:
        values: Shape ``(batch, n)``.
        C: Symmetric matrices, shape ``(batch, n, n)``, of the same dtype and device.
        of: Whose values they are, for the message.

    Returns:
        The values.

    Raises:
        Unavailable: If they have not.
    """
    if not invariants_hold(C, values):
        raise Unavailable(
            f"the values of {of} have not the trace and the norm of the matrices"
        )
    return values


def invariants_hold(C: Tensor, values: Tensor) -> bool:
    r"""Return whether eigenvalues have the trace and the norm of their matrices.

    :math:`\sum_i w_i = \operatorname{tr} C` and
    :math:`(\sum_i w_i^2)^{1/2} = \|C\|_F`, each within
    :math:`16\, n\, \epsilon\, |w|_{\max}`. It finds what a race or a bad compilation
    does to a batch for a pass over it; it does not bound the error of each value.

    Args:
        C: Symmetric matrices, shape ``(batch, n, n)``.
        values: Shape ``(batch, n)``, of the same dtype and device.

    Returns:
        False as well where a value is not finite.
    """
    # No entry is larger than the largest eigenvalue, if the values are right.
    largest = torch.linalg.vector_norm(C, torch.inf, dim=(-2, -1))
    top = torch.maximum(values.abs().amax(-1), largest)[:, None]
    top = torch.where(top > 0, top, 1)
    C, values = C / top[:, :, None], values / top
    trace = C.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    norm = C.square_().sum((-2, -1), dtype=torch.float64).sqrt()
    apart = values.sum(-1, dtype=torch.float64) - trace
    longer = values.double().square().sum(-1).sqrt() - norm
    allowed = _TOLERANCE * C.shape[-1] * torch.finfo(C.dtype).eps
    return bool(((apart.abs() <= allowed) & (longer.abs() <= allowed)).all())
