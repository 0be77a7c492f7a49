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

# Whatever changes files. Not %file, whose many stats slow an import down by a half.
_TRACED = (
    "open,openat,openat2,creat,mkdir,mkdirat,mknod,mknodat,rename,renameat,renameat2,"
    "link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,truncate,ftruncate,fallocate,"
    "write,writev,pwrite64,pwritev,pwritev2,lseek,sendfile,splice,copy_file_range,"
    "fsync,fdatasync,sync_file_range,mmap,msync,dup,dup2,dup3"
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


def record(folder: Path, program: Path, *args: str, inject: str = "") -> list[str]:
    """Run a Python program under strace.

    Args:
        folder: Where the program may write.
        program: Called with ``folder`` and ``args``.
        *args: More arguments.
        inject: A fault for strace to inject, as in ``fdatasync:error=EIO:when=3``.

    Returns:
        Lines for `parse`.
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
    return log.read_text().splitlines()


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
    if name == "mmap" and ("MAP_PRIVATE" in args[3] or "PROT_WRITE" not in args[2]):
        return  # memory through which nothing reaches the file
    if make is None:
        raise NotImplementedError(f"the replay does not know {name}({', '.join(args)})")
    if int(result) >= 0 or make in _MAY_FAIL:
        yield make(args, int(result))


def _open(args: list[str], result: int) -> Call:
    return Call("open", result, _at(args), flags=frozenset(args[2].split("|")))


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


def _unlinkat(args: list[str], result: int) -> Call:
    return Call("unlink", path=_at(args))


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
    "unlinkat": _unlinkat,
    "rmdir": _unlink,
    "rename": _rename,
}
# Of these a failure is recorded too: an injected fault must be seen to have happened.
_MAY_FAIL = (_write, _pwrite, _sync)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.strip('"').replace("\\x", ""))


def _text(text: str) -> str:
    return os.fsdecode(_bytes(text))


def _at(args: list[str]) -> str:
    """Return the path of a name, which may be relative to an open folder."""
    folder = _text(args[0].partition("<")[2].removesuffix(">"))
    return str(Path(folder, _text(args[1])))


def _fd(text: str) -> int:
    return int(text.split("<", 1)[0])
