"""`repscope doctor` as a user meets it: what it finds, and what it measures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import repscope
from repscope.cli import main
from repscope.cli.machine import advice
from repscope.linalg import choice, thresholds, tune
from repscope.linalg.thresholds import ANY, Measurement

CPU = torch.device("cpu")


def run(capsys, *arguments):
    code = main(["doctor", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def keep(**changes):
    versions = thresholds.versions() | changes
    table = {"float32": {64: "numpy", ANY: "scipy"}}
    place = thresholds.place_of(CPU)
    thresholds.check_writable()
    thresholds.save([Measurement(place, versions, "2026-01-31", table)])
    choice.tuned.cache_clear()


# -- what there is -------------------------------------------------------------
def test_a_stranger_sees_one_screen(tmp_path):
    code = "import sys; from repscope.cli import main; sys.exit(main())"
    environment = {k: v for k, v in os.environ.items() if k != "REPSCOPE_THRESHOLDS"}
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) < 45
    for package, version in [
        ("repscope", re.escape(repscope.__version__)),
        ("torch", re.escape(torch.__version__)),
        ("triton", r"[\d.]+|not installed"),
        ("BLAS of torch", r"\S.*, 1 thread"),
        ("threads", r"1 \(OMP_NUM_THREADS 1\)"),
    ]:
        assert re.search(rf"^{package} +{version}$", done.stdout, re.M), package
    assert re.search(r"^cpu +scipy +works$", done.stdout, re.M)
    assert re.search(
        r"^cpu +cupy +CuPy serves CUDA devices, not cpu$", done.stdout, re.M
    )
    assert re.search(
        r"^cpu +float32 +torch up to 128, scipy up to 2048, then torch +built in$",
        done.stdout,
        re.M,
    )
    assert "`repscope doctor --tune` measures them on this machine" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_says_the_same(cache, capsys):
    code, out, err = run(capsys, "--format", "json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["versions"]["torch"] == torch.__version__
    assert {each["route"] for each in found["routes"]} == set(choice.ROUTES)
    assert {each["of"] for each in found["blas"]} >= {"torch"}
    cpu = found["thresholds"][0]
    assert cpu["measured"] is cpu["why_not"] is None
    assert cpu["up_to"]["float64"] == [[128, "torch"], [2048, "scipy"], [None, "torch"]]


def test_measured_thresholds_are_shown_with_their_date(cache, capsys):
    keep()
    code, out, _ = run(capsys)
    assert code == 0
    assert re.search(
        r"float32 +numpy up to 64, then scipy +measured 2026-01-31$", out, re.M
    )
    assert f"kept in {cache}" in out
    assert "measures again" not in out


def test_thresholds_that_are_not_used_are_a_warning(cache, capsys):
    keep(numpy="1.0")
    code, out, _ = run(capsys)
    assert code == 0
    assert "built in" in out
    assert (
        "warning: the measured thresholds are not used for cpu: they were measured "
        "with numpy 1.0, and this is numpy "
    ) in out
    cache.write_text("{")
    choice.tuned.cache_clear()
    _, out, _ = run(capsys)
    assert (
        "for cpu: the file is damaged; `repscope doctor --tune` measures again" in out
    )


def test_thresholds_that_are_switched_off_are_not_a_warning(cache, capsys, monkeypatch):
    keep()
    monkeypatch.setenv("REPSCOPE_THRESHOLDS", "off")
    _, out, _ = run(capsys)
    assert "built in" in out
    assert "measured ones are not used: REPSCOPE_THRESHOLDS=off" in out
    assert "measures again" not in out


def test_built_in_thresholds_on_several_threads_are_explained(cache, capsys):
    note = "on several threads, batches go to scipy (float32, above 32) or numpy"
    assert note not in run(capsys)[1]
    torch.set_num_threads(2)
    assert note in run(capsys)[1]
    small, large = torch.eye(32), torch.eye(64)
    assert choice.order(small.expand(8, 32, 32))[0] == "torch"
    assert choice.order(large.expand(8, 64, 64))[0] == "scipy"
    assert choice.order(small.double().expand(8, 32, 32))[0] == "numpy"


def test_a_home_folder_is_not_spelled_out(cache, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keep()
    _, out, _ = run(capsys)
    assert "kept in ~/cache/repscope/thresholds.json" in out
    assert str(tmp_path) not in out


def test_without_a_home_folder_it_still_answers(cache, capsys, monkeypatch):
    def nowhere():
        raise OSError("there is no home folder")

    monkeypatch.setattr(thresholds, "path", nowhere)
    code, out, _ = run(capsys, "--format", "json")
    assert (code, json.loads(out)["file"]) == (0, None)


def test_a_cuda_route_that_fails_says_why(cache, capsys, monkeypatch):
    def broken(C):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setitem(choice.ROUTES, "cusolver", broken)
    code, out, _ = run(capsys)
    assert code == 0
    assert re.search(r"cusolver +CUDA driver version is insufficient$", out, re.M)


SOUND = {
    "threads": 4,
    "cores": 8.0,
    "load": 0.5,
    "OMP_NUM_THREADS": None,
    "blas": [
        {"of": "torch", "library": "mkl", "threads": 4},
        {"of": "numpy", "library": "openblas", "threads": 8},
    ],
    "cuda": {"torch": None, "driver": None, "devices": [], "why_not": None},
    "thresholds": [{"device": "cpu", "why_not": None}],
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"cores": 1.5}, ["may use 1.5 cores: set OMP_NUM_THREADS=1"]),
        ({"load": 7.0}, ["7.0 processes shared 8 cores, .* where several run"]),
        ({"load": 7.0, "OMP_NUM_THREADS": "4"}, []),
        ({"load": 7.0, "threads": 1}, []),
        ({"load": None}, []),
        (
            {"blas": [{}, {"of": "numpy", "library": "mkl", "threads": 8}]},
            [r"numpy \(mkl\) takes 8 threads, torch 4.* set OMP_NUM_THREADS=4"],
        ),
        (
            {"cuda": SOUND["cuda"] | {"driver": "550.54"}},
            [r"NVIDIA driver \(550.54\).*install one that has it"],
        ),
        (
            {"cuda": SOUND["cuda"] | {"driver": "470.1", "why_not": "it is too old"}},
            ["torch cannot use CUDA: it is too old"],
        ),
    ],
)
def test_advice_is_given_where_something_can_be_mended(changes, said):
    found = advice(SOUND | changes)
    assert len(found) == len(said)
    for text, pattern in zip(found, said, strict=True):
        assert re.search(pattern, text)


# -- measuring -----------------------------------------------------------------
@pytest.fixture
def quick(cache, monkeypatch):
    """Measure small matrices only, and let numpy be the fastest at 32."""
    real = tune.time_routes

    def timed(n, dtype, device):
        def seconds(calls):
            times = dict.fromkeys(calls, [0.016] * 3)
            return times | ({"numpy": [0.008] * 3} if n == 32 else {})

        return real(n, dtype, device, measure=seconds)

    monkeypatch.setattr(tune, "SIZES", (16, 32))
    monkeypatch.setattr(tune, "devices", lambda: [CPU])
    monkeypatch.setattr(tune, "time_routes", timed)
    return cache


def test_tune_prints_what_it_measured_and_what_changed(quick, capsys):
    code, out, err = run(capsys, "--tune")
    assert code == 0
    assert "[4/4] cpu float64 32 x 32" in err
    first = out.removeprefix("\n").split("\n\n")[0]
    assert "float32: ms for a matrix, x times as fast as np.linalg.eigvalsh" in first
    row = r"^32 +256 +0\.0625 +1\.00x +0\.0625 +1\.00x +0\.0312 +2\.00x +0\.0625 +"
    assert re.search(row + "torch +numpy$", first, re.M)
    assert "n = 32: numpy in place of torch, 2.00x as fast" in first
    assert first.endswith(
        "thresholds: torch up to 16, numpy up to 32, torch up to 128, scipy up to "
        "2048, then torch"
    )
    assert out.endswith(f"\nwritten to {quick}\n")
    choice.tuned.cache_clear()
    assert choice.order(torch.eye(20)[None])[0] == "numpy"
    before = quick.read_bytes()
    assert run(capsys, "--tune")[1] == out
    assert quick.read_bytes() == before


def test_tune_prints_json(quick, capsys):
    code, out, _ = run(capsys, "--tune", "--format", "json")
    found = json.loads(out)
    assert (code, found["file"]) == (0, str(quick))
    rows = [(r["dtype"], r["n"], r["built_in"], r["chosen"]) for r in found["timings"]]
    assert rows[:2] == [
        ("float32", 16, "torch", "torch"),
        ("float32", 32, "torch", "numpy"),
    ]
    assert found["timings"][1]["seconds_per_matrix"]["numpy"] == 0.008 / 256


def test_tune_says_that_a_route_is_wrong(quick, capsys, monkeypatch):
    right = choice.ROUTES["numpy"]
    monkeypatch.setitem(choice.ROUTES, "numpy", lambda C: right(C) * 1.001)
    code, out, _ = run(capsys, "--tune")
    assert code == 0
    assert "numpy is wrong and never chosen: off by 1.0e-03" in out
    choice.tuned.cache_clear()
    assert choice.order(torch.eye(20)[None])[0] == "torch"


def test_tune_in_a_place_that_cannot_be_written_says_so_at_once(quick, capsys):
    quick.parent.parent.write_text("mine")
    code, out, err = run(capsys, "--tune")
    assert (code, out) == (3, "")
    (line,) = err.splitlines()
    assert line.startswith(f"repscope: nothing can be written to {quick.parent} (")
    assert "set XDG_CACHE_HOME to a folder" in line


def test_ctrl_c_leaves_the_thresholds_as_they_were(quick, capsys, monkeypatch):
    keep()
    before = quick.read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "time_routes", interrupted)
    code, out, err = run(capsys, "--tune")
    assert (code, out) == (130, "")
    assert err.endswith("repscope: interrupted; the thresholds are as they were\n")
    assert [each.name for each in quick.parent.iterdir()] == [quick.name]
    assert quick.read_bytes() == before


def test_tune_says_that_thresholds_are_switched_off(quick, capsys, monkeypatch):
    monkeypatch.setenv("REPSCOPE_THRESHOLDS", "off")
    code, _, err = run(capsys, "--tune")
    assert (code, quick.exists()) == (0, True)
    assert err.endswith("they are not used as long as REPSCOPE_THRESHOLDS=off\n")
