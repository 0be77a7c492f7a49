"""Stores that earlier versions wrote are read for ever."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from store.golden.make import META, STEPS, values

from repscope import store
from repscope.snapshot import Snapshot
from repscope.store import manifest, packed

GOLDEN = Path(__file__).parent / "golden"
FORMS = ("run", "packed.h5", "series.h5")
VERSIONS = sorted(folder.name for folder in GOLDEN.glob("v*"))


def test_there_is_one_of_every_version():
    assert [f"v{n}" for n in range(1, manifest.VERSION + 1)] == VERSIONS
    assert packed.VERSION == 1  # packed files of another version need a golden one
    assert sum(f.stat().st_size for f in GOLDEN.rglob("*.*")) < 2**17


def check(run, same):
    assert tuple(run.steps) == STEPS
    assert run.progress == 50
    assert run.tags == {f"at-{step}": step for step in STEPS}
    for seen, step in zip(run.snapshots(), STEPS, strict=True):
        want, loss = values(step), dict(seen.scalars)
        assert math.isnan(loss.pop("nan"))
        scalars = {"loss": want.scalars["loss"]}
        same(
            Snapshot(step, seen.streams, seen.labels, loss, seen.tags),
            Snapshot(step, want.streams, want.labels, scalars, want.tags),
        )
    got = run.series("fc.weight", target="weights", units=1)
    assert got.tolist() == [
        values(s).streams["weights", "fc.weight"][:, 1].tolist() for s in STEPS
    ]
    assert {**META, "later": True}.items() <= run.meta.items()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("trust", ["default", "untrusted"])
def test_it_reads_as_it_was_recorded(version, form, trust, same):
    path = GOLDEN / version / form
    check(store.open(path, trust=trust), same)
    assert not store.check(path, full=True).damaged


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_it_goes_on(version, form, same, tmp_path):
    path = tmp_path / form
    (shutil.copytree if form == "run" else shutil.copy)(GOLDEN / version / form, path)
    w = store.reopen(path)
    assert w.progress == 50
    w.append(values(60))
    w.close()
    run = store.open(path)
    assert run.steps == [*STEPS, 60]
    same.tensor(
        run.read("fc.weight", target="weights"),
        values(60).streams["weights", "fc.weight"],
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_its_manifest_can_be_made_again(version, same, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(GOLDEN / version / "run", path)
    (path / "MANIFEST").unlink()
    store.repair(path)
    check(store.open(path), same)
