r"""Power-propagation, as a preconditioner and as a reparameterisation.

With :math:`\theta = \phi |\phi|^{\alpha - 1}`, gradient flow on :math:`\phi` is

.. math::
    \dot\theta = -\alpha^2 |\theta|^{2 - 2/\alpha} \nabla_\theta L,

so scaling a step on :math:`\theta` by :math:`|\theta|^\beta`, with
:math:`\beta = 2 - 2/\alpha` and a learning rate larger by :math:`\alpha^2`, follows
the same path as the step size goes to zero.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from repscope.errors import UsageError
from repscope.optim._groups import label
from repscope.optim.shampoo import Shampoo

Module = TypeVar("Module", bound=nn.Module)


class PowerPreconditioned(Optimizer):
    r"""Scale another optimizer's finished step by :math:`|\theta|^\beta`.

    With :math:`d` the step that the inner optimizer took from :math:`\theta`,

    .. math:: \theta \leftarrow \theta + \max(|\theta|, \text{floor})^\beta \, d .

    The inner optimizer sees the plain gradient, so that Adam's normalisation cannot
    cancel the scaling. Large weights move more and small ones less, which leaves a
    network that survives pruning. The learning rate has to grow by about one over the
    mean of :math:`|\theta|^\beta`, and is bounded: nothing brakes a weight that grows.

    Decoupled weight decay stays outside: it is recognised in AdamW, Adafactor, Muon,
    `Shampoo` and every group with ``decoupled_weight_decay=True``. Coupled decay is
    part of the gradient, hence of the step, and is scaled with it.

    Parameter groups and state are those of the inner optimizer: schedulers and
    ``zero_grad`` work on either. `state_dict` adds a ``"power"`` entry to the inner
    one and can be loaded by both.

    Args:
        optimizer: Any optimizer; call ``step`` on the wrapper from now on.
        beta: Exponent, at least 0; see `power_beta`.
        min_ndim: Tensors with fewer dimensions take the inner step as it is. Biases
            start at zero in many networks, and an exact zero never moves.
        floor: Smallest magnitude used in the scaling. Above 0 it lets zeros move,
            pruned weights included.

    Raises:
        UsageError: If ``optimizer`` is not an optimizer or a number is out of range.

    References:
        Schwarz et al. (2021), Powerpropagation: a sparsity inducing weight
        reparameterisation, NeurIPS; Pascanu et al. (2025), Optimizers qualitatively
        alter solutions and we should leverage this, section 3.2.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[2.0, 0.5]]))
        >>> inner = torch.optim.SGD([weight], lr=0.1)
        >>> optimizer = PowerPreconditioned(inner, beta=1.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([[1.8000, 0.4500]])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta: float,
        min_ndim: int = 2,
        floor: float = 0.0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UsageError(
                "PowerPreconditioned wraps a torch.optim.Optimizer, got "
                f"{type(optimizer).__name__}; build the inner optimizer first"
            )
        for name, value in (("beta", beta), ("min_ndim", min_ndim), ("floor", floor)):
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} must be finite and at least 0, got {value}")
        self.optimizer = optimizer
        self.beta = beta
        self.min_ndim = min_ndim
        self.floor = floor
        self._zeros_checked = False
        # The base constructor would make groups of its own; __setstate__, meant for
        # unpickling, sets up the hooks and nothing else.
        self.__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimizer, not a copy."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the inner optimizer, not a copy."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the inner optimizer, not a copy."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the inner optimizer step, then scale what it did.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the inner optimizer's ``step`` returned.
        """
        before = [
            (param, param.clone(), group)
            for group in self.param_groups
            for param in group["params"]
            if param.ndim >= self.min_ndim
        ]
        if not self._zeros_checked:
            self._warn_of_zeros()
        result = self.optimizer.step(closure)
        for param, theta, group in before:
            if param.grad is not None:
                gain = theta.abs().clamp_(min=self.floor).pow_(self.beta)
                decayed = theta.mul_(1 - _decoupled_decay(self.optimizer, group))
                param.copy_(decayed.addcmul(gain, param - decayed))
        return result

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer.

        Args:
            param_group: As the inner optimizer takes it.
        """
        self.optimizer.add_param_group(param_group)
        self._zeros_checked = False

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state with a ``"power"`` entry.

        Returns:
            ``{"state", "param_groups", "power"}``.
        """
        power = {"beta": self.beta, "min_ndim": self.min_ndim, "floor": self.floor}
        return {**self.optimizer.state_dict(), "power": power}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of the inner optimizer returned.

        Args:
            state_dict: With a ``"power"`` entry, its numbers replace those given to
                the constructor, as learning rates do.
        """
        self.optimizer.load_state_dict(state_dict)
        power = state_dict.get("power", {})
        self.beta = power.get("beta", self.beta)
        self.min_ndim = power.get("min_ndim", self.min_ndim)
        self.floor = power.get("floor", self.floor)

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "beta", "min_ndim", "floor", "_zeros_checked")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The inner optimizer writes and reads the state, so hooks on that go to it.
        for name in _STATE_HOOKS:
            setattr(self, name, getattr(self.optimizer, name))

    def __repr__(self) -> str:
        return (
            f"PowerPreconditioned(beta={self.beta}, min_ndim={self.min_ndim}, "
            f"floor={self.floor}, optimizer={self.optimizer!r})"
        )

    def _warn_of_zeros(self) -> None:
        self._zeros_checked = True
        if self.floor or not self.beta:
            return
        stuck = [
            label(group, place, index)
            for place, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
            if param.ndim >= self.min_ndim and bool((param == 0).any())
        ]
        if stuck:
            warnings.warn(
                f"exact zeros in {', '.join(stuck)}: |0|^beta is 0, so they will never "
                "move; initialise away from zero, set floor=, or ignore this if they "
                "are pruned",
                stacklevel=5,
            )


_STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# Optimizers of every torch this runs on whose decay is decoupled whatever the group.
_DECOUPLED = (
    Shampoo,
    *(
        getattr(torch.optim, name)
        for name in ("AdamW", "Adafactor", "Muon")
        if hasattr(torch.optim, name)
    ),
)


def _decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    if isinstance(optimizer, _DECOUPLED) or group.get("decoupled_weight_decay"):
        return group["lr"] * group["weight_decay"]
    return 0.0


def power_beta(alpha: float) -> float:
    r"""Return the exponent of the preconditioner that equals Power-propagation.

    .. math:: \beta = 2 - 2/\alpha

    One Jacobian factor comes from the chain rule, the other from mapping the step on
    :math:`\phi` back to :math:`\theta`. The learning rate on :math:`\theta` is
    :math:`\alpha^2` times the one on :math:`\phi`.

    Args:
        alpha: Exponent of Power-propagation, at least 1.

    Returns:
        A number in [0, 2).

    Raises:
        UsageError: If ``alpha`` is below 1 or not finite.

    Example:
        >>> [power_beta(alpha) for alpha in (1.0, 2.0, 4.0)]
        [0.0, 1.0, 1.5]
    """
    if not 1 <= alpha < math.inf:
        raise UsageError(f"alpha must be finite and at least 1, got {alpha}")
    return 2 - 2 / alpha


class _Power(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, phi: Tensor) -> Tensor:
        # sign * |phi|^alpha, because the gradient of phi * |phi|^(alpha - 1) at an
        # exact zero is NaN for alpha < 2.
        return phi if self.alpha == 1 else phi.sign() * phi.abs().pow(self.alpha)

    def right_inverse(self, theta: Tensor) -> Tensor:
        return theta.sign() * theta.abs().pow(1 / self.alpha)


def powerprop(module: Module, *, alpha: float) -> Module:
    r"""Reparameterise every weight by Power-propagation, in place.

    Each parameter with at least 2 dimensions becomes
    :math:`\theta = \phi |\phi|^{\alpha - 1}` with :math:`\phi` trained and
    :math:`\theta` starting where it was. Build the optimizer afterwards.

    Args:
        module: Any module; its submodules are included.
        alpha: Exponent, at least 1; 1 changes nothing.

    Returns:
        The same module.

    Raises:
        UsageError: If ``alpha`` is below 1 or not finite, or a weight is shared by
            two modules or already reparameterised (nothing has changed then).

    References:
        Schwarz et al. (2021), Powerpropagation: a sparsity inducing weight
        reparameterisation, NeurIPS.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = layer.weight.detach().clone()
        >>> torch.testing.assert_close(powerprop(layer, alpha=2.0).weight, before)
    """
    if not 1 <= alpha < math.inf:
        raise UsageError(f"alpha must be finite and at least 1, got {alpha}")
    weights = [
        (owner, path, name, param)
        for path, owner in module.named_modules()
        for name, param in owner.named_parameters(recurse=False)
        if param.ndim >= 2
    ]
    uses = Counter(id(param) for *_, param in weights)
    for owner, path, name, param in weights:
        if uses[id(param)] > 1 or isinstance(owner, parametrize.ParametrizationList):
            raise UsageError(
                f"{path}.{name} is shared by two modules or already reparameterised; "
                "untie it or apply powerprop to the submodules that own their weights"
            )
    for owner, _, name, _ in weights:
        parametrize.register_parametrization(owner, name, _Power(alpha))
    return module
