"""Linear algebra that several rooms need: moments, covariance, eigenvalues, roots."""

from __future__ import annotations

from repscope.linalg.eigen import eigvalsh
from repscope.linalg.moments import Moments, covariance
from repscope.linalg.roots import inverse_root

__all__ = ["Moments", "covariance", "eigvalsh", "inverse_root"]
