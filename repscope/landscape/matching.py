"""Which hidden unit of one network is which of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repscope.errors import UsageError
from repscope.landscape.copies import check_alike, effective

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# These treat every unit alike and on its own.
_UNITWISE = (
    nn.Identity,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_MAX_ROUNDS = 100


def match_units(model_a: nn.Module, model_b: nn.Module) -> nn.Module:
    r"""Reorder the hidden units of one network to resemble those of another.

    Permutations :math:`P_\ell` that make :math:`\sum_i \langle \theta_{a,i},
    \theta_{b,i}(P) \rangle` over all weights, biases and normalisation parameters
    large: one layer at a time, exactly by linear assignment, until no layer gains. The
    sum grows in every round, but what it reaches need not be the best: a barrier that
    is left after matching shows nothing. Rescaling of ReLU units is not undone.

    Args:
        model_a: Sets the order; an ``nn.Sequential`` (of such, too) of linear and
            convolutional layers with activations, pooling and batch normalisation.
        model_b: Another of the same architecture; left untouched.

    Returns:
        A copy of ``model_b`` that computes the same function with its units in another
        order.

    Raises:
        UsageError: If the architectures differ, or a layer is none of the above; its
            name is in the message.

    References:
        Ainsworth, Hayase and Srinivasa (2023), Git Re-Basin, ICLR, weight matching
        (there with the layers in random order); Entezari et al. (2022), ICLR.

    Example:
        >>> a = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> b = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> order = [4, 2, 0, 1, 3]
        >>> b[0].weight.data = a[0].weight.data[order]
        >>> b[0].bias.data = a[0].bias.data[order]
        >>> b[2].weight.data = a[2].weight.data[:, order]
        >>> torch.equal(match_units(a, b)[2].weight, a[2].weight)
        True
    """  # noqa: DOC502 - raised by _hidden_layers and check_alike
    layers = _hidden_layers(model_a)
    matched = effective(model_b)
    a, b = effective(model_a).state_dict(), dict(matched.state_dict())
    check_alike(a, b)
    _hidden_layers(matched)
    for _ in range(_MAX_ROUNDS):
        gained = [_reorder(layer, a, b) for layer in layers]
        if not any(gained):
            break
    matched.load_state_dict(b)
    return matched


# -- one layer of hidden units -----------------------------------------------
@dataclass
class _Hidden:
    """Tensors with one entry per unit: along rows, or along columns of the next."""

    module: nn.Module
    compared: list[str]
    carried: list[str]
    next_weight: str = ""
    flat: bool = False

    @property
    def n_units(self) -> int:
        return len(self.module.weight)  # type: ignore[arg-type]

    def fits(self, module: nn.Module) -> bool:
        """Return whether the next layer reads the units, one column or block each."""
        inputs = int(module.weight.shape[1])  # type: ignore[index]
        if isinstance(self.module, nn.Linear) or not isinstance(module, nn.Linear):
            alike = isinstance(self.module, nn.Linear) == isinstance(module, nn.Linear)
            return alike and inputs == self.n_units and not self.flat
        return self.flat and inputs % self.n_units == 0


def _reorder(layer: _Hidden, a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    from scipy.optimize import linear_sum_assignment  # costs 0.1 s, and few need it

    gains = _similarity(layer, a, b)
    _, found = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    order = torch.as_tensor(found, device=gains.device)
    gain = gains.gather(1, order[:, None]).sum() - gains.diagonal().sum()
    if not gain > 1e-9 * gains.abs().amax():  # ties could be turned for ever
        return False
    for name in (*layer.compared, *layer.carried):
        b[name] = b[name][order.to(b[name].device)]
    name = layer.next_weight
    columns = _columns(b[name], layer.n_units)
    b[name] = columns[:, order.to(columns.device)].reshape(b[name].shape)
    return True


def _similarity(layer: _Hidden, a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    pairs = [(a[name], b[name]) for name in layer.compared]
    following = (a[layer.next_weight], b[layer.next_weight])
    pairs.append(
        tuple(_columns(w, layer.n_units).movedim(1, 0) for w in following)  # type: ignore[arg-type]
    )
    total = torch.zeros(layer.n_units, layer.n_units, dtype=torch.float64)
    for one, other in pairs:
        rows, columns = (
            t.reshape(layer.n_units, -1).to(torch.float64) for t in (one, other)
        )
        total = total.to(rows.device) + rows @ columns.to(rows.device).mT
    return total


def _columns(weight: Tensor, n_units: int) -> Tensor:
    # After a Flatten every unit is a block of neighbouring inputs.
    return weight.reshape(len(weight), n_units, -1)


# -- the chain ---------------------------------------------------------------
def _hidden_layers(model: nn.Module) -> list[_Hidden]:
    layers: list[_Hidden] = []
    for name, module in _leaves(model, ""):
        before = layers[-1] if layers else None
        if isinstance(module, _WEIGHTED):
            if any(layer.module is module for layer in layers):
                raise _cannot(name, module)
            if before is not None:
                before.next_weight = f"{name}.weight"
            if getattr(module, "groups", 1) != 1 or (
                before and not before.fits(module)
            ):
                raise _cannot(name, module)
            layers.append(_Hidden(module, _names(name, module.named_parameters()), []))
        elif not _passes(module, before):
            raise _cannot(name, module)
        elif isinstance(module, nn.Flatten) and before is not None:
            before.flat = isinstance(before.module, _WEIGHTED[1:])
        elif isinstance(module, _BatchNorm) and before is not None:
            before.compared += _names(name, module.named_parameters())
            before.carried += _names(name, module.named_buffers())
    return layers[:-1]


def _passes(module: nn.Module, before: _Hidden | None) -> bool:
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if isinstance(module, _BatchNorm) and before is not None:
        return module.num_features == before.n_units and not before.flat
    return isinstance(module, (*_UNITWISE, _BatchNorm))


def _names(prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [f"{prefix}.{name}" for name, tensor in tensors if tensor.ndim]


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        # Not named_children, which would leave out what is used a second time.
        for key, child in module._modules.items():
            yield from _leaves(child, f"{name}.{key}".lstrip("."))
    elif name:
        yield name, module
    else:
        raise UsageError(
            f"match_units knows the order of layers in an nn.Sequential only, got a "
            f"{type(module).__name__}; pass the Sequential inside it"
        )


def _cannot(name: str, module: nn.Module) -> UsageError:
    return UsageError(
        f"match_units cannot carry hidden units through {name!r}, {module}; it knows "
        "linear and ungrouped convolutional layers, each used once, with batch "
        "normalisation, activations, pooling and a Flatten between the two kinds"
    )
