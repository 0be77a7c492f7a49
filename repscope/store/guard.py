"""Look at files in a child process, which a hostile one may crash, bloat or stall."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from repscope.store import walker

SECONDS = 20.0  # for one file; a walk of ten thousand chunks takes a part of one


class Guard:
    """A child that walks files, one at a time; started at the first.

    It runs `walker` alone, isolated from the environment and from the caller's script,
    without plugins, and with limits of memory and time.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def manifest(self, path: Path) -> tuple[int, int] | None:
        """Return what `walker.manifest` does."""
        answer = self._ask({"path": str(path)})
        place = answer.get("manifest")
        return None if place is None else (place[0], place[1])

    def walk(self, path: Path, expected: walker.Expected | None) -> None:
        """Do what `walker.walk` does."""
        self._ask({"path": str(path), "expected": expected})

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the child's answer.

        Raises:
            Refused: If the file was refused, or took the child with it.
        """
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-I", walker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**_environment(), "HDF5_PLUGIN_PRELOAD": "::"},
            )
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            line = _line(child.stdout.fileno())
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            stuck = child.poll() is None
            self.__exit__(None, None, None)
            what = f"took over {SECONDS:.0f} s" if stuck else "ended its process"
            raise walker.Refused(f"looking at it {what}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise walker.Refused(*answer["refused"])
        return answer


def _environment() -> dict[str, str]:
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "OPENBLAS_CORETYPE")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "OPENBLAS_NUM_THREADS": "1"
    }


def _line(fd: int) -> bytes:
    """Return a line, or what came of it before the child ended or time was up."""
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(SECONDS):
            piece = os.read(fd, 2**16)
            if not piece:
                break
            line += piece
    return line
