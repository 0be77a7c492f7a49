"""Recorded system calls, replayed: every call is a place for a kill and a power cut.

A kill leaves everything up to a call, of the last write any number of bytes. A power
cut leaves what was fsynced; of later writes any subset of pages and any of the sizes,
of later names any subset, until their folder is fsynced. Some of what is left is then
recovered, and recorded into once more.
"""

from __future__ import annotations

import collections
import copy
import random
import shutil
from pathlib import Path

import pytest
from faults.disk import Disk, cuts, materialize
from faults.recorded_writer import place
from faults.syscalls import Call, parse, record
from faults.workload import Seen, examine, frames_behind, recovered, tally

from repscope.store import compact, onefile

PROGRAM = Path(__file__).with_name("recorded_writer.py")
FAULTS = {
    "no fault": "",
    "failed fdatasync": "fdatasync:error=EIO:when=3",
    "failed fsync": "fsync:error=EIO:when=9",
    "full disk": "write:error=ENOSPC:when=15",
    "failed fsyncs": "fsync:error=EIO:when=9+7",
    "full disk, packing": "pwrite64:error=ENOSPC:when=20",
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a function that records a kind of writer under a fault, once."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed (on Debian: apt install strace)")
    done: dict[tuple[str, str, int], tuple[Path, list[Call]]] = {}

    def get(kind: str, fault: str, steps: int) -> tuple[Path, list[Call]]:
        if (kind, fault, steps) not in done:
            folder = tmp_path_factory.mktemp("recorded")
            # The short ones at once, as most of their time is the program's start.
            short = steps == SHORT["steps"]
            every = SHORTS if short else ((kind, fault),)
            for name, _ in every:
                (folder / name).mkdir()
            kinds = [name for name, _ in every]
            inject = FAULTS[every[0][1]]
            lines = record(folder, PROGRAM, str(steps), *kinds, inject=inject)
            for name, its_fault in every:
                home = folder / name
                done[name, its_fault, steps] = home, list(parse(lines, home))
        return done[kind, fault, steps]

    return get


def look(disk: Disk, path: Path, rng: random.Random | None) -> Seen:
    """Return what a reader sees after a crash; ``rng`` for a power cut."""
    folder = path.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    materialize(disk.top, folder, rng)
    seen = examine(path, max(disk.acked, 0))
    # Before create() has returned nothing was promised, not even a store.
    return seen._replace(opens=True) if disk.acked < 0 else seen


def replayed(calls, root, path, *, inside, power, again=0.0, seed=0):
    """Yield ``crash, acknowledged, seen`` of every crash of a recording.

    Of some, a share ``again``, also what is seen once the store was recovered.
    """
    disk, rng = Disk(root), random.Random(seed)
    chosen = random.Random(seed)  # so that the crashes are the same without it

    def crashed(crash, disk, rng):
        seen = look(disk, path, rng)
        yield crash, disk.acked, seen
        if disk.acked >= 0 and chosen.random() < again:
            # What a reader has seen is not taken back either.
            for after in recovered(path, max(disk.acked, seen.steps)):
                yield f"recovered, {crash}", disk.acked, after

    for call in calls:
        for cut in cuts(call, rng, inside):
            torn = copy.deepcopy(disk)
            torn.apply(call, cut=cut)
            yield from crashed("kill", torn, None)
        disk.apply(call)
        if call.name == "seek" or (call.name == "open" and "O_CREAT" not in call.flags):
            continue  # nothing on the disk has changed
        yield from crashed("kill", disk, None)
        for _ in range(power):
            yield from crashed("power", disk, rng)


SHORT, LONG, LARGE = (
    {"steps": 4, "inside": 0, "power": 1, "again": 0.03},
    {"steps": 40, "inside": 8, "power": 5, "again": 0.05},
    {"steps": 40, "inside": 2, "power": 3, "again": 0.05},
)
# One program makes all of these; the fault strikes the first.
SHORTS = (
    ("batch", "failed fdatasync"),
    ("merged append", "no fault"),
    ("file", "no fault"),
)
RECORDINGS = (
    *(("batch", f, LONG)
      for f in ("no fault", "failed fdatasync", "failed fsync", "full disk")),
    *(("append", f, LARGE) for f in ("no fault", "failed fdatasync", "full disk")),
    ("merged", "no fault", LARGE),
    ("merged", "failed fsyncs", LARGE),
    ("merged append", "failed fdatasync", LARGE),
    ("merged reopened", "no fault", LARGE),
    *(("file", f, LARGE)
      for f in ("no fault", "failed fsyncs", "full disk, packing")),
    ("file append reopened", "no fault", LARGE),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fault", "size"),
    [
        *(pytest.param(*each, SHORT, id=f"short {each[0]}") for each in SHORTS),
        *(pytest.param(*each, id=f"{each[0]}, {each[1]}", marks=pytest.mark.faults)
          for each in RECORDINGS),
    ],
)  # fmt: skip
def test_replay(kind, fault, size, recorded, tmp_path, figures, monkeypatch):
    if "merged" in kind:
        monkeypatch.setattr(compact, "FAN", 3)  # merge while going on, too
    root, calls = recorded(kind, fault, size["steps"])
    states, acks = collections.defaultdict(list), set()
    path = place(tmp_path / "disk", kind)
    many = {name: size[name] for name in ("inside", "power", "again")}
    for crash, sure, seen in replayed(calls, root, path, **many):
        states[crash].append(seen)
        acks.add(sure)
        manifest = onefile.located(path) / "MANIFEST"
        assert not manifest.exists() or not frames_behind(manifest)
    for crash, every in sorted(states.items()):
        figures(f"{crash}: {kind}, {fault}", calls=len(calls), states=len(every),
                lossy=sum(any(tally([seen]).values()) for seen in every),
                **tally(every))  # fmt: skip
    assert max(acks) == size["steps"]
    assert any(call.failed for call in calls) == bool(FAULTS[fault])
    if "append" in kind:
        assert acks == set(range(-1, size["steps"] + 1))
    if "merged" in kind:
        removed = [c for c in calls if c.name == "unlink" and c.path.endswith(".h5")]
        # After a merge that failed its batches stay as they are.
        assert len(removed) >= (3 if FAULTS[fault] else size["steps"] // 3)
    for every in states.values():
        assert not any(tally(every).values())


# -- the replay itself -------------------------------------------------------
@pytest.mark.parametrize(("kind", "fault"), SHORTS)
def test_the_replay_ends_in_what_is_on_the_disk(kind, fault, recorded, tmp_path):
    root, calls = recorded(kind, fault, SHORT["steps"])
    disk = Disk(root)
    for call in calls:
        disk.apply(call)
    materialize(disk.top, tmp_path, None)
    real, rebuilt = (
        {p.relative_to(top): p.is_file() and p.read_bytes() for p in top.rglob("*")}
        for top in (root, tmp_path)
    )
    assert rebuilt == real
    assert len(real) == 2 if kind == "file" else len(real) > 5


@pytest.mark.parametrize("forget", ["data", "names"])
@pytest.mark.parametrize(("kind", "fault"), SHORTS)
def test_without_its_fsyncs_the_same_writer_loses(
    kind, fault, recorded, tmp_path, forget
):
    """The model can lose: a replay that never fails would prove nothing."""
    root, calls = recorded(kind, fault, SHORT["steps"])
    names = forget == "names"
    opened, kept = {}, []
    for call in calls:
        if call.name == "open":
            opened[call.fd] = "O_DIRECTORY" in call.flags
        if call.name != "sync" or opened[call.fd] != names:
            kept.append(call)
    assert len(kept) < len(calls)
    path = place(tmp_path / "disk", kind)
    seen = replayed(kept, root, path, inside=0, power=1)
    lossy = [s for kind, _, s in seen if kind == "power" and (s.lost or not s.opens)]
    assert len(lossy) > 5
