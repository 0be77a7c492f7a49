"""Routes to the eigenvalues of symmetric matrices: one file for each way there."""

from __future__ import annotations


class Unavailable(Exception):
    """A route cannot serve this input on this machine; the text says why."""
