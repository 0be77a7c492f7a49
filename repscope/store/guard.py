"""Look at files in a child process, which a hostile one may crash, bloat or stall."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from repscope.store import walker

SECONDS = 20.0  # for one file; a walk of ten thousand chunks takes a part of one
_LONGEST = 2**16  # of an answer


class Guard:
    """A child that walks files, one at a time; started at the first.

    It runs `walker` alone, isolated from the environment and from the caller's script,
    without plugins, and with limits of memory and time.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; the next question starts another."""
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
            answer = _parsed(_line(child.stdout.fileno()))
        except TimeoutError:
            answer = {"refused": [f"looking at it took over {SECONDS:g} s"]}
            self.close()
        except (BrokenPipeError, ValueError):
            answer = {"refused": ["looking at it ended its process"]}
            self.close()
        if "refused" in answer:
            raise walker.Refused(*answer["refused"])
        return answer


def _environment() -> dict[str, str]:
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "OPENBLAS_CORETYPE")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "OPENBLAS_NUM_THREADS": "1"
    }


def _line(fd: int) -> bytes:
    """Return a line, or what came of it before the child ended.

    Raises:
        TimeoutError: If it takes too long.
    """
    line, end = b"", time.monotonic() + SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while not line.endswith(b"\n") and len(line) < _LONGEST:
            if not selector.select(max(end - time.monotonic(), 0)):
                raise TimeoutError
            piece = os.read(fd, 2**16)
            if not piece:
                break
            line += piece
    return line


def _parsed(line: bytes) -> dict[str, Any]:
    """Return an answer.

    Raises:
        ValueError: If it is none: a child that died may have said anything before.
    """
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError(answer)
    return answer
