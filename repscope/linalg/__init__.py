"""Linear algebra that several rooms need: moments, covariance, eigenvalues, roots."""

from __future__ import annotations

from repscope.linalg.covariance import covariance
from repscope.linalg.eigen import eigvalsh
from repscope.linalg.moments import Moments
from repscope.linalg.roots import inverse_root

__all__ = ["Moments", "covariance", "eigvalsh", "inverse_root"]
