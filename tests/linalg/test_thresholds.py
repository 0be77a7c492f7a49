"""Measured thresholds: which ones hold here, and what is done with a bad file."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repscope import eigvalsh
from repscope.linalg import choice, thresholds
from repscope.linalg.thresholds import ANY, Measurement

CPU = torch.device("cpu")
C = torch.tensor([[2.0, 1.0], [1.0, 2.0]])


def measured(**changes):
    up_to = {"float32": {8: "numpy", ANY: "scipy"}, "float64": {ANY: "torch"}}
    here = Measurement(
        thresholds.place_of(CPU), thresholds.versions(), "2026-01-31", up_to
    )
    return replace(here, **changes)


def keep(*entries):
    thresholds.check_writable()
    file = thresholds.save(entries)
    choice.tuned.cache_clear()
    return file


def taken(monkeypatch, matrices):
    """Return the routes that `eigvalsh` really goes."""
    seen = []
    for name, route in list(choice.ROUTES.items()):
        monkeypatch.setitem(
            choice.ROUTES, name, lambda C, n=name, r=route: seen.append(n) or r(C)
        )
    eigvalsh(matrices)
    return seen


@pytest.mark.parametrize(
    ("n", "dtype", "route"),
    [
        (2, torch.float32, "numpy"),
        (8, torch.float32, "numpy"),
        (9, torch.float32, "scipy"),
        (200, torch.float64, "torch"),
    ],
)
def test_eigvalsh_goes_the_route_that_was_measured(cache, monkeypatch, n, dtype, route):
    matrices = torch.eye(n, dtype=dtype)
    assert choice.built_in(matrices[None]) != route
    keep(measured())
    assert taken(monkeypatch, matrices) == [route]


def test_a_dtype_that_was_not_measured_goes_the_built_in_route(cache, monkeypatch):
    keep(measured(up_to={"float32": {ANY: "numpy"}}))
    assert taken(monkeypatch, C.double()) == ["torch"]


def test_other_routes_still_come_after_the_measured_one(cache):
    keep(measured())
    assert choice.order(C[None]) == ["numpy", "scipy", "torch"]


def test_the_number_of_threads_decides_at_every_call(cache):
    keep(measured())
    torch.set_num_threads(2)
    assert choice.order(C[None])[0] == "torch"
    torch.set_num_threads(1)
    assert choice.order(C[None])[0] == "numpy"


class OnCuda:
    """What `order` asks a batch on a device that is not there."""

    is_cpu, is_cuda, dtype = False, True, torch.float32
    device = torch.device("cuda", 1)

    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return self.shape[0]


def test_batches_on_cuda_go_the_route_of_their_device(cache, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device: f"model {device.index}"
    )
    place = thresholds.place_of(OnCuda.device)
    assert place == ("cuda", "model 1", None)
    keep(
        measured(), measured(place=place, up_to={"float32": {8: "cupy", ANY: "torch"}})
    )
    assert choice.order(OnCuda(4, 8, 8))[0] == "cupy"
    assert choice.order(OnCuda(4, 99, 99))[0] == "torch"
    torch.set_num_threads(2)
    assert choice.order(OnCuda(4, 8, 8))[0] == "cupy"
    # A single matrix was not measured.
    assert choice.order(OnCuda(1, 8, 8)) == choice.order(OnCuda(1, 9, 9))


def test_places_are_kept_beside_each_other_and_replaced_by_themselves(cache):
    other = thresholds.place_of(CPU)._replace(name="another processor")
    keep(measured(), measured(place=other))
    keep(measured(date="2026-02-01"))
    assert thresholds.find(other, routes=choice.ROUTES)[0].date == "2026-01-31"
    assert choice.tuned(CPU, 1)[0].date == "2026-02-01"
    assert len(json.loads(cache.read_text())["measurements"]) == 2


def test_what_is_read_is_what_was_kept(cache):
    keep(measured())
    assert choice.tuned(CPU, 1) == (measured(), None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "Z80"}, "nothing for .*, but for Z80 with 1 thread$"),
        ({"threads": 64}, "but for .* with 64 threads$"),
        ({"numpy": "1.0"}, "measured with numpy 1.0, and this is numpy "),
        ({"torch": "1.0"}, "measured with torch 1.0, and this is torch "),
        ({"scipy": "1.0"}, "measured with scipy 1.0, and this is scipy "),
        ({"route": "abacus"}, "the route 'abacus', which this RepScope lacks"),
    ],
)
def test_what_was_measured_otherwise_is_not_used(cache, changes, why):
    entry = measured()
    place = {k: v for k, v in changes.items() if k in ("name", "threads")}
    versions = {k: v for k, v in changes.items() if k in entry.versions}
    route = changes.get("route", "numpy")
    keep(
        measured(
            place=entry.place._replace(**place),
            versions=entry.versions | versions,
            up_to={"float32": {ANY: route}},
        )
    )
    found, said = choice.tuned(CPU, 1)
    assert found is None
    assert re.search(why, said)
    assert eigvalsh(C).tolist() == pytest.approx([3.0, 1.0])


WHOLE = '{"format": 1, "measurements": []}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the file is damaged"),
        ("\0\xff", "the file is damaged"),
        ("[" * 100_000, "the file is damaged"),
        (WHOLE[:-5], "the file is damaged"),
        ("[]", "the file is damaged"),
        ('{"format": 1}', "the file is damaged"),
        ('{"format": 1, "measurements": [{}]}', "the file is damaged"),
        ('{"format": 1, "measurements": {"a": 1}}', "the file is damaged"),
        (
            '{"format": 2, "measurements": []}',
            "the format of the file is 2, and this RepScope reads 1",
        ),
        (WHOLE, None),
    ],
)
def test_a_file_that_cannot_be_understood_is_ignored(cache, text, why):
    thresholds.check_writable()
    cache.write_text(text, encoding="latin-1")
    assert choice.tuned(CPU, 1) == (None, why)
    assert choice.order(C[None])[0] == "torch"


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [[None, "torch"], [8, "numpy"]],
        [[8, "torch"], [4, "numpy"], [None, "torch"]],
        [[8, "torch"]],
        [["8", "torch"], [None, "torch"]],
        [[[], "torch"], [None, "torch"]],
        [8, None],
        {"8": "torch"},
        None,
    ],
)
def test_steps_that_do_not_cover_every_size_are_damage(cache, pairs):
    file = keep(measured())
    data = json.loads(file.read_text())
    data["measurements"][0]["up_to"]["float32"] = pairs
    file.write_text(json.dumps(data))
    assert choice.tuned(CPU, 1) == (None, "the file is damaged")


def test_every_truncation_is_ignored_or_whole(cache):
    whole = keep(measured()).read_bytes()
    for length in range(0, len(whole) - 2, 7):
        cache.write_bytes(whole[:length])
        assert thresholds.find(thresholds.place_of(CPU), routes=choice.ROUTES) == (
            None,
            "the file is damaged",
        )


def test_a_file_in_place_of_the_folder_is_ignored(cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("mine")
    assert choice.tuned(CPU, 1) == (None, "the file cannot be read: Not a directory")


def test_it_can_be_switched_off(cache, monkeypatch):
    keep(measured())
    monkeypatch.setenv("REPSCOPE_THRESHOLDS", "off")
    assert choice.tuned(CPU, 1) == (None, "REPSCOPE_THRESHOLDS=off")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(cache, monkeypatch):
    before = keep(measured()).read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        thresholds.save([measured(date="2026-02-01")])
    assert cache.read_bytes() == before
    assert [each.name for each in cache.parent.iterdir()] == [cache.name]


# -- where it is, and what the processor is called --------------------------------
@pytest.mark.parametrize(
    ("system", "folder"),
    [
        ("linux", ".cache"),
        ("darwin", "Library/Caches"),
        ("win32", "AppData/Local"),
    ],
)
def test_without_xdg_it_is_where_the_system_has_its_caches(
    monkeypatch, tmp_path, system, folder
):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", system)
    assert thresholds.path() == tmp_path / folder / "repscope" / "thresholds.json"


def test_without_a_home_there_are_no_measured_thresholds(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    found, why = choice.tuned(CPU, 1)
    assert found is None
    assert "set XDG_CACHE_HOME" in why


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model name": "AMD EPYC 7B13"}, "AMD EPYC 7B13"),
        ({"CPU implementer": "0x41", "CPU part": "0xd40"}, "riscv 0x41 0xd40"),
        ({}, "riscv"),
    ],
)
def test_the_name_of_the_processor(monkeypatch, fields, name):
    monkeypatch.setattr(thresholds, "_first_processor", lambda: fields)
    monkeypatch.setattr(thresholds.platform, "machine", lambda: "riscv")
    assert thresholds.processor() == name
