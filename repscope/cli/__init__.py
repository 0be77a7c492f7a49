"""The ``repscope`` command: parse, call, print."""

from repscope.cli.main import main

__all__ = ["main"]
