"""Recorded system calls, replayed: every call is a place for a kill and a power cut.

A kill leaves everything up to a call, of the last write any number of bytes. A power
cut leaves what was fsynced; of later writes any subset of pages and any of the sizes,
of later names any subset, until their folder is fsynced.
"""

from __future__ import annotations

import collections
import copy
import random
import shutil
from pathlib import Path

import pytest
from faults.disk import Disk, cuts, materialize
from faults.syscalls import Call, record
from faults.workload import Seen, examine, frames_behind, tally

PROGRAM = Path(__file__).with_name("recorded_writer.py")
FAULTS = {
    "no fault": "",
    "failed fdatasync": "fdatasync:error=EIO:when=3",
    "failed fsync": "fsync:error=EIO:when=9",
    "full disk": "write:error=ENOSPC:when=15",
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a function that records a writer under a fault, once."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed (on Debian: apt install strace)")
    done: dict[tuple[str, int], tuple[Path, list[Call]]] = {}

    def get(fault: str, steps: int) -> tuple[Path, list[Call]]:
        if (fault, steps) not in done:
            folder = tmp_path_factory.mktemp("recorded")
            calls = record(folder, PROGRAM, str(steps), inject=FAULTS[fault])
            done[fault, steps] = folder, calls
        return done[fault, steps]

    return get


def look(disk: Disk, folder: Path, rng: random.Random | None) -> Seen:
    """Return what a reader sees after a crash; ``rng`` for a power cut."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    materialize(disk.top, folder, rng)
    seen = examine(folder / "run", max(disk.acked, 0))
    manifest = folder / "run" / "MANIFEST"
    assert not manifest.exists() or not frames_behind(manifest)
    # Before create() has returned nothing was promised, not even a store.
    return seen._replace(opens=True) if disk.acked < 0 else seen


def replayed(calls, root, folder, *, inside, power, seed=0):
    """Yield ``kind, acknowledged, seen`` of every crash of a recording."""
    disk, rng = Disk(root), random.Random(seed)
    for call in calls:
        for cut in cuts(call, rng, inside):
            torn = copy.deepcopy(disk)
            torn.apply(call, cut=cut)
            yield "kill", disk.acked, look(torn, folder, None)
        disk.apply(call)
        yield "kill", disk.acked, look(disk, folder, None)
        for _ in range(power):
            yield "power", disk.acked, look(disk, folder, rng)


SHORT, LONG = (
    {"steps": 6, "inside": 1, "power": 1},
    {"steps": 40, "inside": 8, "power": 5},
)


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        pytest.param("failed fdatasync", SHORT, id="short"),
        *(pytest.param(f, LONG, id=f, marks=pytest.mark.faults) for f in FAULTS),
    ],
)
def test_replay(fault, size, recorded, tmp_path, figures):
    root, calls = recorded(fault, size["steps"])
    states, acked = collections.defaultdict(list), 0
    many = {name: size[name] for name in ("inside", "power")}
    for kind, sure, seen in replayed(calls, root, tmp_path / "disk", **many):
        states[kind].append(seen)
        acked = max(acked, sure)
    for kind, every in states.items():
        figures(f"replay, {kind}, {fault}", calls=len(calls), states=len(every),
                lossy=sum(any(tally([seen]).values()) for seen in every),
                **tally(every))  # fmt: skip
    assert acked == size["steps"]
    assert any(call.failed for call in calls) == bool(FAULTS[fault])
    for every in states.values():
        assert not any(tally(every).values())


# -- the replay itself -------------------------------------------------------
def test_the_replay_ends_in_what_is_on_the_disk(recorded, tmp_path):
    root, calls = recorded("failed fdatasync", SHORT["steps"])
    disk = Disk(root)
    for call in calls:
        disk.apply(call)
    materialize(disk.top, tmp_path, None)
    real, rebuilt = (
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (root, tmp_path)
    )
    assert rebuilt == real
    assert len(real) > 5


@pytest.mark.parametrize("forget", ["data", "names"])
def test_without_its_fsyncs_the_same_writer_loses(recorded, tmp_path, forget):
    """The model can lose: a replay that never fails would prove nothing."""
    root, calls = recorded("failed fdatasync", SHORT["steps"])
    names = forget == "names"
    opened, kept = {}, []
    for call in calls:
        if call.name == "open":
            opened[call.fd] = "O_DIRECTORY" in call.flags
        if call.name != "sync" or opened[call.fd] != names:
            kept.append(call)
    assert len(kept) < len(calls)
    seen = replayed(kept, root, tmp_path / "disk", inside=0, power=1)
    lossy = [s for kind, _, s in seen if kind == "power" and (s.lost or not s.opens)]
    assert len(lossy) > 5
