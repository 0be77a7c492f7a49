"""Record the system calls by which a program changes a folder, with strace."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import repscope

_TRACED = (
    "%file,write,writev,pwrite64,pwritev,pwritev2,lseek,ftruncate,fsync,fdatasync,"
    "sync_file_range,fallocate,sendfile,copy_file_range,mmap,msync,dup,dup2,dup3"
)
_HARMLESS = re.compile(
    r"(new|l|f)?f?stat(at|x|fs|64)?$|access$|faccessat2?$|readlink(at)?$|f?chmod(at)?$"
    r"|execve$|getcwd$|chdir$|[gl]+etxattr$"
)
_LINE = re.compile(r"(?P<pid>\d+) +(?P<name>\w+)\((?P<args>.*)\) += (?P<result>-?\d+)")


class Call(NamedTuple):
    """One call that changed something, with the names that the program used."""

    name: str  # mkdir, open, write, seek, truncate, sync, rename, unlink
    fd: int = -1
    path: str = ""
    to: str = ""
    data: bytes = b""
    offset: int | None = None
    flags: frozenset[str] = frozenset()
    failed: bool = False


def record(folder: Path, program: Path, *args: str, inject: str = "") -> list[Call]:
    """Run a Python program under strace.

    Args:
        folder: Only calls that name it matter.
        program: Called with ``folder`` and ``args``.
        *args: More arguments.
        inject: A fault for strace to inject, as in ``fdatasync:error=EIO:when=3``.

    Returns:
        The calls in order.
    """
    log = folder.with_name(folder.name + ".strace")
    fault = ["-e", f"inject={inject}"] if inject else []
    roots = [Path(__file__).parents[1], Path(repscope.__file__).parents[1]]
    subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", str(2**26),
         "-o", log, "-e", f"trace={_TRACED}", *fault,
         sys.executable, program, folder, *args],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))},
        check=True,
        timeout=300,
    )  # fmt: skip
    return list(parse(log.read_text().splitlines(), folder))


def parse(lines: list[str], folder: Path) -> Iterator[Call]:
    """Yield the calls of a strace log that change something below ``folder``.

    Args:
        lines: Made with ``-f -y -xx``: strings and paths are all hexadecimal.
        folder: An absolute path.

    Yields:
        One call for each line.
    """
    mark = "".join(f"\\x{byte:02x}" for byte in os.fsencode(folder))
    begun: dict[str, str] = {}
    for line in lines:
        pid = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>")
            continue
        if "resumed>" in line:
            line = begun.pop(pid) + line.split("resumed>", 1)[1]
        if mark in line and (found := _LINE.match(line)):
            yield from _call(found["name"], found["args"].split(", "), found["result"])


def _call(name: str, args: list[str], result: str) -> Iterator[Call]:
    """Yield the call if it changes something.

    Raises:
        NotImplementedError: If the replay does not know its meaning.
    """
    make = _MEANING.get(name)
    if make is None and not _HARMLESS.match(name):
        raise NotImplementedError(f"the replay does not know {name}({', '.join(args)})")
    if make is not None and (int(result) >= 0 or make in (_write, _sync)):
        yield make(args, int(result))


def _open(args: list[str], result: int) -> Call:
    path, flags = args[1:3]
    return Call("open", result, _text(path), flags=frozenset(flags.split("|")))


def _write(args: list[str], result: int) -> Call:
    data = _bytes(args[1])[: max(result, 0)]
    return Call("write", _fd(args[0]), data=data, failed=result < 0)


def _pwrite(args: list[str], result: int) -> Call:
    return _write(args, result)._replace(offset=int(args[3]))


def _seek(args: list[str], result: int) -> Call:
    return Call("seek", _fd(args[0]), offset=result)


def _truncate(args: list[str], result: int) -> Call:
    return Call("truncate", _fd(args[0]), offset=int(args[1]))


def _sync(args: list[str], result: int) -> Call:
    return Call("sync", _fd(args[0]), failed=result < 0)


def _mkdir(args: list[str], result: int) -> Call:
    return Call("mkdir", path=_text(args[0]))


def _unlink(args: list[str], result: int) -> Call:
    return Call("unlink", path=_text(args[0]))


def _rename(args: list[str], result: int) -> Call:
    return Call("rename", path=_text(args[0]), to=_text(args[1]))


_MEANING = {
    "openat": _open,
    "write": _write,
    "pwrite64": _pwrite,
    "lseek": _seek,
    "ftruncate": _truncate,
    "fsync": _sync,
    "fdatasync": _sync,
    "mkdir": _mkdir,
    "unlink": _unlink,
    "rename": _rename,
}


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.strip('"').replace("\\x", ""))


def _text(text: str) -> str:
    return os.fsdecode(_bytes(text))


def _fd(text: str) -> int:
    return int(text.split("<", 1)[0])
