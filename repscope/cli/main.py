"""The parser and the way from an error to an exit code.

Heavy imports happen inside the commands: ``repscope --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repscope import __version__
from repscope.errors import DataError, RepScopeError

PLOT_KINDS = (
    "spectrum",
    "alignment",
    "rank_over_time",
    "weight_histogram",
    "sparsity",
    "forgetting",
    "accuracy",
)

_EPILOG = """exit codes:
  0 done    1 check found damage    2 wrong usage    3 input missing or unreadable
  130 interrupted
"""


def _examples(*lines: str) -> dict[str, Any]:
    return {
        "epilog": "examples:\n" + "\n".join(f"  {line}" for line in lines),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="seeds 0..N-1 (default 5)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="worker processes (default 2)"
    )
    parser.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help="digits (embedded, default), mnist, fashion-mnist or kmnist",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of the IDX files; default $REPSCOPE_DATA",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help="only these, for example: sgd adamw shampoo",
    )


def _add_tables(commands: Any) -> None:
    metrics = commands.add_parser(
        "metrics",
        help="metrics of stores as a table",
        **_examples(
            "repscope metrics runs/demo/stores/permuted-* --metric effective_rank",
            "repscope metrics STORE --layers 'hidden*' --all-steps --format csv",
        ),
    )
    metrics.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    metrics.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        help="only these; an unknown name lists all",
    )
    metrics.add_argument(
        "--layers", default="*", metavar="GLOB", help="layers to measure (default *)"
    )
    metrics.add_argument(
        "--all-steps",
        action="store_true",
        help="every captured step, not only the last",
    )
    metrics.add_argument("--format", choices=("table", "csv", "json"), default="table")

    compare = commands.add_parser(
        "compare",
        help="how alike networks are between optimizers, beside seeds of one",
        **_examples(
            "repscope compare runs/demo/stores/pairs-*",
            "repscope compare runs/* --layers 'hidden*' --metric linear_cka_debiased",
        ),
    )
    compare.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    compare.add_argument(
        "--metric",
        default="procrustes_distance",
        metavar="NAME",
        help="procrustes_distance (default), linear_cka or linear_cka_debiased",
    )
    compare.add_argument(
        "--layers", default="*", metavar="GLOB", help="layers to compare (default *)"
    )
    compare.add_argument(
        "--step", type=int, default=-1, metavar="N", help="recorded step (default last)"
    )
    compare.add_argument("--format", choices=("table", "csv", "json"), default="table")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repscope",
        description="What kind of solution did training find?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="all studies on the embedded digits, tables and a report",
        **_examples("repscope demo", "repscope demo --seeds 10 --out runs/ten"),
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    _add_run_options(demo)

    study = commands.add_parser(
        "study",
        help="one study: permuted, pairs or sparsity",
        **_examples(
            "repscope study permuted",
            "repscope study pairs --seeds 10 --optimizers sgd shampoo",
        ),
    )
    study.add_argument("name", metavar="NAME", help="permuted, pairs or sparsity")
    study.add_argument("--out", type=Path, metavar="DIR", help="default runs/NAME-DATA")
    _add_run_options(study)

    info = commands.add_parser(
        "info",
        help="what a store holds: layers, captures, scalars, configuration",
        **_examples(
            "repscope info runs/demo/stores/permuted-sgd-s0-*",
            "repscope info STORE --format json",
        ),
    )
    info.add_argument("store", type=Path, metavar="STORE")
    info.add_argument("--format", choices=("table", "json"), default="table")

    _add_tables(commands)

    plot = commands.add_parser(
        "plot",
        help="one figure from stores",
        **_examples(
            "repscope plot spectrum runs/demo/stores/permuted-* --out spectrum.svg",
            "repscope plot alignment runs/demo/stores/pairs-* --out cosine.png",
        ),
    )
    plot.add_argument("kind", metavar="KIND", help="one of: " + ", ".join(PLOT_KINDS))
    plot.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    plot.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".svg, .png or .pdf"
    )
    plot.add_argument("--layer", metavar="NAME", help="default: the last recorded one")

    check = commands.add_parser(
        "check",
        help="look for damage in stores; exit code 1 if there is any",
        **_examples(
            "repscope check runs/*",
            "repscope check --full STORE    # every byte against its checksum",
            "repscope check --repair STORE  # after a kill, or a damaged manifest",
        ),
    )
    check.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    check.add_argument(
        "--full",
        action="store_true",
        help="compare every byte, and the HDF5 structure, not only sizes",
    )
    check.add_argument(
        "--repair",
        action="store_true",
        help="put right what can be put right first; what it moves aside is kept in "
        "quarantine/",
    )
    check.add_argument(
        "--untrusted",
        action="store_true",
        help="a stranger's store: look at its files in a child process with limits",
    )
    check.add_argument("--format", choices=("table", "json"), default="table")

    pack = commands.add_parser(
        "pack",
        help="make one portable HDF5 file of a store",
        **_examples(
            "repscope pack runs/adamw-0 adamw-0.h5",
            "repscope pack runs/adamw-0 adamw-0.h5 --compression gzip --layout series",
        ),
    )
    pack.add_argument("store", type=Path, metavar="STORE")
    pack.add_argument("out", type=Path, metavar="OUT.h5")
    pack.add_argument(
        "--compression",
        choices=("none", "gzip", "zstd"),
        default="none",
        help="gzip opens everywhere; zstd needs the compression extra (default none)",
    )
    pack.add_argument(
        "--layout",
        choices=("step", "series"),
        default="step",
        help="what lies together: a step, or a unit's values over all steps",
    )

    report = commands.add_parser(
        "report",
        help="draw the tables, figures and report.html of a folder of stores again",
        **_examples("repscope report runs/demo", "repscope report runs/pairs-mnist"),
    )
    report.add_argument("folder", type=Path, metavar="DIR")

    doctor = commands.add_parser(
        "doctor",
        help="this machine as RepScope sees it: versions, threads, devices, routes",
        **_examples(
            "repscope doctor                # for a bug report",
            "repscope doctor --tune         # measure the fastest routes, a minute",
        ),
    )
    doctor.add_argument(
        "--tune",
        action="store_true",
        help="measure which route to eigenvalues is the fastest at which size, and "
        "take it from now on",
    )
    doctor.add_argument("--format", choices=("table", "json"), default="table")
    return parser


# Command -> module of its function.
_MODULES = {
    "demo": "studies",
    "study": "studies",
    "report": "studies",
    "doctor": "machine",
}


def _dispatch(arguments: argparse.Namespace) -> int | None:
    # Imported here: torch alone takes a second that --help should not cost.
    module = _MODULES.get(arguments.command, "stores")
    commands = importlib.import_module(f"repscope.cli.{module}")
    code: int | None = getattr(commands, arguments.command)(arguments)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments after the program's name; ``None`` takes those of the process.

    Returns:
        0 done; 1 `check` found damage; 2 wrong usage; 3 input missing or unreadable;
        130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _dispatch(arguments) or 0
    except BrokenPipeError:
        # `repscope metrics ... | head` closed its end; leave without a second fault.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"repscope: {error}", file=sys.stderr)
        return 3
    except RepScopeError as error:
        print(f"repscope: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nrepscope: interrupted; finished runs are kept, and the same command "
            "goes on from there",
            file=sys.stderr,
        )
        return 130
    return 0
