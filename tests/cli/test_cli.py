"""The command line as a user meets it: outputs, files, messages, exit codes."""

import csv
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

import repscope as rs
from repscope import store
from repscope.cli import main
from repscope.cli.main import PLOT_KINDS
from repscope.plots import PLOTS
from repscope.report.figures import FIGURES
from repscope.report.study import FIGURES_OF
from repscope.snapshot import Snapshot
from repscope.studies.summary import HEADLINE

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from repscope.cli import main; sys.exit(main())",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run a small demo: all studies, two seeds, the quick optimizers."""
    out = tmp_path_factory.mktemp("demo") / "runs"
    done = subprocess.run(
        [*COMMAND, "demo", "--out", str(out), "--seeds", "2", "--jobs", "2",
         "--optimizers", "sgd", "adamw", "adam", "p-sgd"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_demo_prints_tables_and_a_verdict_for_each_claim(demo):
    _, done = demo
    for quantity in HEADLINE:
        assert quantity.title in done.stdout
    assert re.search(r"^SGD +2 ", done.stdout, re.M)
    assert re.search(r"^P-SGD − SGD +2 ", done.stdout, re.M)
    assert "preview, n = 2: " in done.stdout
    assert "not reported" in done.stdout  # Shampoo did not run
    assert "report  " in done.stdout
    assert "[1/14]" in done.stderr  # progress when nobody watches a bar


def test_the_demo_writes_a_self_contained_report(demo):
    out, _ = demo
    page = (out / "report.html").read_text()
    assert page.count("<svg ") == len(FIGURES)
    assert "http" not in page
    assert "<script" not in page
    for kind in FIGURES:
        for suffix in ("svg", "png", "csv"):
            assert (out / "figures" / f"{kind}.{suffix}").stat().st_size > 100
        assert f'href="figures/{kind}.csv"' in page


def test_every_number_of_the_table_comes_back_from_the_stores(demo, capsys):
    out, done = demo
    stores = sorted((out / "stores").iterdir())
    code, text, _ = run(capsys, "metrics", *stores, "--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(text)))
    table = done.stdout.split("\n\n")[0]
    checked = 0
    for quantity in HEADLINE:
        for name, label in {"sgd": "SGD", "adam": "Adam", "p-sgd": "P-SGD"}.items():
            values = [
                float(row["value"])
                for row in rows
                if row["run"].startswith(f"{quantity.study}-{name}-s")
                and row["metric"] == quantity.metric
                and row["layer"] == quantity.layer
            ]
            if not values:
                continue
            mean = statistics.mean(values) * (100 if quantity.percent else 1)
            (line,) = re.findall(rf"^{re.escape(label)} .*$", table, re.M)
            assert f" {mean:.{quantity.digits}f} " in line, (quantity.title, label)
            checked += 1
    assert checked == 10


def test_info_shows_layers_scalars_and_the_configuration(demo, capsys):
    out, _ = demo
    store = next((out / "stores").glob("permuted-sgd-s0-*"))
    code, text, _ = run(capsys, "info", store)
    assert code == 0
    for part in ("finished", "hidden1", "1500 x 50", "accuracy/3", "task-3 at", '"lr"'):
        assert part in text
    code, text, _ = run(capsys, "info", store, "--format", "json")
    facts = json.loads(text)
    recorded = rs.open(store).scalars()["accuracy/3"].dropna().iloc[-1]
    assert facts["scalars"]["accuracy/3"]["value"] == recorded
    assert facts["meta"]["seed"] == 0


def test_metrics_prints_json_and_all_steps(demo, capsys):
    out, _ = demo
    store = next((out / "stores").glob("permuted-sgd-s0-*"))
    code, text, _ = run(
        capsys, "metrics", store, "--metric", "effective_rank", "--layers", "hidden*",
        "--all-steps", "--format", "json",
    )  # fmt: skip
    assert code == 0
    steps = [row["step"] for row in json.loads(text)]
    assert steps[0] == 0
    assert len(steps) > 4
    code, text, _ = run(capsys, "metrics", store, "--metric", "effective_rank")
    assert len(text.splitlines()) == 3  # header, rule, the last step


@pytest.mark.parametrize("kind", sorted(FIGURES))
def test_every_kind_of_plot_can_be_drawn_from_stores(demo, capsys, tmp_path, kind):
    out, _ = demo
    (study,) = [name for name, kinds in FIGURES_OF.items() if kind in kinds]
    stores = sorted((out / "stores").glob(f"{study}-*"))
    file = tmp_path / "new" / f"{kind}.svg"
    code, text, err = run(capsys, "plot", kind, *stores, "--out", file)
    assert (code, text.strip()) == (0, str(file))
    assert "2 seeds" in err or "seeds" in err
    assert file.read_text().lstrip().startswith("<?xml")


def test_the_names_of_plots_agree_everywhere():
    assert set(PLOT_KINDS) == set(FIGURES) == set(PLOTS)


def test_a_second_demo_reuses_the_runs_and_says_the_same(demo, capsys):
    out, done = demo
    before = (out / "results.csv").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "stores").rglob("*")}
    code, text, err = run(
        capsys, "demo", "--out", out, "--seeds", "2",
        "--optimizers", "sgd", "adamw", "adam", "p-sgd",
    )  # fmt: skip
    assert code == 0
    assert "trained 0, reused 14" in err
    assert text == done.stdout
    assert (out / "results.csv").read_text() == before
    assert stamps == {p: p.stat().st_mtime_ns for p in (out / "stores").rglob("*")}


def test_report_draws_a_folder_again(demo, capsys):
    out, done = demo
    (out / "report.html").unlink()
    code, text, _ = run(capsys, "report", out)
    assert code == 0
    assert text == done.stdout
    assert (out / "report.html").exists()


def test_an_interrupted_store_is_run_again_and_others_are_kept(demo, capsys):
    out, _ = demo
    store = next((out / "stores").glob("pairs-sgd-s0-*"))
    manifest = store / "MANIFEST"
    manifest.write_bytes(manifest.read_bytes()[:-40])  # as if killed before its end
    assert not rs.open(store).closed
    code, _, err = run(
        capsys, "study", "pairs", "--out", out, "--seeds", "1", "--optimizers", "sgd"
    )
    assert code == 0
    assert "trained 1, reused 0" in err
    assert rs.open(store).closed


def test_ctrl_c_ends_with_130_and_the_next_run_goes_on(tmp_path):
    out = tmp_path / "runs"
    arguments = ["study", "permuted", "--out", str(out), "--seeds", "1",
                 "--jobs", "1", "--optimizers", "adamw", "sgd"]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("stores/*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished runs are kept" in err
    assert "Traceback" not in err
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=True
    )
    assert re.search(r"trained [123], reused [123] ", done.stderr)
    assert all(rs.open(path).closed for path in out.glob("stores/*"))


# -- wrong usage ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["study", "permutd"], 2, "did you mean 'permuted'"),
        (["study", "pairs", "--optimizers", "shampo"], 2, "did you mean 'shampoo'"),
        (["study", "pairs", "--data", "minst"], 2, "known: digits, mnist"),
        (["study", "pairs", "--data", "mnist"], 3, "--data-dir"),
        (["study", "pairs", "--data", "mnist", "--data-dir", "gone"], 3, "gone"),
        (["study", "pairs", "--seeds", "0"], 2, "at least 1"),
        (["study", "pairs", "--data", "kmnist", "--data-dir", "gone"], 3, "gone"),
        (["info", "gone"], 3, "gone"),
        (["metrics", "gone"], 3, "gone"),
        (["report", "gone"], 3, "repscope demo --out gone"),
        (["plot", "spectrum", "gone", "--out", "x.svg"], 3, "gone"),
    ],
)
def test_errors_are_one_line_with_a_code_and_nothing_is_written(
    arguments, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPSCOPE_DATA", raising=False)
    found, out, err = run(capsys, *arguments)
    assert found == code
    assert message in err
    assert err.splitlines()[-1].startswith("repscope: ")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_one_line_too(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    code, out, err = run(capsys, "study", "pairs", "--out", tmp_path / "file",
                         "--seeds", "1", "--optimizers", "sgd")  # fmt: skip
    assert (code, out) == (3, "")
    assert err.splitlines()[-1].startswith("repscope: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrics", "{store}", "--metric", "effectiv_rank"], "did you mean"),
        (["metrics", "{store}", "--layers", "hiden*"], "'hidden1'"),
        (
            ["plot", "spectra", "{store}", "--out", "{new}.svg"],
            "did you mean 'spectrum'",
        ),
        (
            ["plot", "spectrum", "{store}", "--layer", "fc", "--out", "{new}.svg"],
            "no layer",
        ),
        (["plot", "spectrum", "{store}", "--out", "{new}.docx"], "suffix"),
        (["plot", "sparsity", "{store}", "--out", "{new}.svg"], "no sparsity curve"),
    ],
)
def test_wrong_names_are_explained(demo, capsys, tmp_path, arguments, message):
    out, _ = demo
    store = next((out / "stores").glob("permuted-sgd-s0-*"))
    filled = [a.format(store=store, new=tmp_path / "new") for a in arguments]
    code, text, err = run(capsys, *filled)
    assert (code, text) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


# -- check and pack -------------------------------------------------------------
@pytest.fixture
def recorded(tmp_path):
    """A small closed store."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    path = tmp_path / "run"
    with rs.Recorder(net, path, every=1, probe=torch.randn(8, 4)) as recorder:
        for step in range(5):
            recorder.step(loss=1.0 / (1 + step))
    return path


def test_check_says_what_is_damaged_and_exits_with_one(recorded, capsys):
    code, out, _ = run(capsys, "check", recorded, "--full")
    assert (code, out.splitlines()[0]) == (0, f"{recorded}  sound")
    segment = recorded / "segments" / "00000000.h5"
    data = bytearray(segment.read_bytes())
    at = rs.open(recorded)._catalog.batches[0].parts["outputs", "1"][0].part.block
    data[at] ^= 1
    segment.write_bytes(data)
    code, out, _ = run(capsys, "check", recorded, "--full")
    assert (code, out.splitlines()[0]) == (1, f"{recorded}  DAMAGED")
    assert "outputs of layer '1' at steps 0" in out
    code, out, _ = run(capsys, "check", recorded, "--full", "--format", "json")
    assert code == 1
    (found,) = json.loads(out)
    assert found["damaged"]
    assert {"item", "state", "detail"} == set(found["findings"][0])


def test_check_repairs_a_deleted_manifest(recorded, capsys):
    before = rs.open(recorded).read("1").tolist()
    (recorded / "MANIFEST").unlink()
    code, out, _ = run(capsys, "check", recorded)
    assert code == 1
    assert "--repair" in out
    code, out, _ = run(capsys, "check", "--repair", recorded)
    assert code == 0
    assert "restored 1" in out
    assert rs.open(recorded).read("1").tolist() == before
    code, out, _ = run(capsys, "check", "--repair", "--format", "json", recorded)
    assert json.loads(out)[0]["repaired"] == {}


@pytest.fixture
def streamed(tmp_path):
    """A store that has moments and no rows."""
    path = tmp_path / "streamed"
    writer = store.create(path, meta={})
    for step in range(3):
        moments = rs.Moments().update(torch.randn(40, 3)).to_tensor()
        writer.append(Snapshot(step, {("moments", "fc"): moments}))
    writer.close()
    return path


def test_moments_alone_are_shown_measured_and_drawn(streamed, tmp_path, capsys):
    code, out, _ = run(capsys, "info", streamed)
    assert code == 0
    assert "3 x 3" in out
    code, out, _ = run(capsys, "metrics", streamed, "--metric", "effective_rank")
    assert code == 0
    assert "moments" in out
    for kind in ("spectrum", "rank_over_time"):
        for layer in ((), ("--layer", "fc")):
            file = tmp_path / f"{kind}.svg"
            code, _, err = run(capsys, "plot", kind, streamed, *layer, "--out", file)
            assert code == 0
            assert "fc" in err
            assert "since the record before" in " ".join(err.split())
    code, _, err = run(capsys, "plot", "alignment", streamed, "--out", file)
    assert (code, "no recorded activations" in err) == (2, True)


def test_pack_makes_a_file_that_every_command_reads(recorded, tmp_path, capsys):
    out = tmp_path / "out.h5"
    code, text, err = run(capsys, "pack", recorded, out, "--compression", "gzip")
    assert (code, text.strip()) == (0, str(out))
    assert "is as it was" in err
    for command in (["info"], ["check", "--untrusted"], ["metrics"]):
        code, text, _ = run(capsys, *command, out)
        assert code == 0
        assert "out.h5" in text
    code, _, err = run(capsys, "pack", recorded, out)
    assert code == 3
    assert "exists already" in err
    code, _, err = run(capsys, "pack", recorded, tmp_path / "out.hdf5")
    assert code == 2
    assert "NAME.h5" in err


def test_pack_finishes_a_run_that_was_killed(recorded, tmp_path, capsys):
    recorded.rename(tmp_path / "x.h5.rscope")
    code, text, err = run(capsys, "pack", tmp_path / "x.h5.rscope", tmp_path / "x.h5")
    assert (code, text.strip()) == (0, str(tmp_path / "x.h5"))
    assert "is this file now" in err
    assert [f.name for f in tmp_path.iterdir()] == ["x.h5"]


def test_argparse_errors_exit_with_two(capsys):
    for arguments in ([], ["nonsense"], ["plot", "spectrum"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom repscope.cli import main\n"
        "try: main(['plot', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'h5py', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "examples:" in done.stdout
