"""Optimizers that change what training finds, and all of them by name."""

from repscope.optim.power import PowerPreconditioned, power_beta, powerprop
from repscope.optim.preconditioner import inverse_sqrt_preconditioner
from repscope.optim.registry import OPTIMIZERS, describe, make
from repscope.optim.shampoo import Shampoo

__all__ = [
    "OPTIMIZERS",
    "PowerPreconditioned",
    "Shampoo",
    "describe",
    "inverse_sqrt_preconditioner",
    "make",
    "power_beta",
    "powerprop",
]
