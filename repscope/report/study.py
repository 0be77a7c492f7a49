"""From a folder of study stores to tables, figures, a CSV file and the report page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repscope import __version__, plots, store
from repscope.analysis import measure
from repscope.errors import DataError, UsageError
from repscope.plots import display_name
from repscope.report.figures import Drawn, draw, run_order
from repscope.report.page import Figure, Page, Table, Verdict, write
from repscope.store import Run
from repscope.studies import STUDIES
from repscope.studies.claims import (
    SEEDS_FOR_A_VERDICT,
    Judgement,
    claims_hash,
    judge,
)
from repscope.studies.summary import (
    FURTHER,
    HEADLINE,
    Quantity,
    difference_table,
    final_values,
    headline_table,
)
from repscope.studies.sweep import TUNING_SEED, is_finished

if TYPE_CHECKING:
    import pandas as pd

TableText = tuple[str, tuple[list[str], list[list[str]]], str]

# Which figures answer the question of which study, in the report's order.
FIGURES_OF: Mapping[str, tuple[str, ...]] = {
    "permuted": ("accuracy", "spectrum", "rank_over_time"),
    "pairs": ("alignment", "forgetting"),
    "sparsity": ("weight_histogram", "sparsity"),
}


@dataclass(frozen=True)
class Outcome:
    """What was written, and the tables to print.

    Attributes:
        report: The page.
        csv: All measurements.
        tables: ``(title, (header, rows), note)``, in reading order.
        judgements: The verdicts.
    """

    report: Path
    csv: Path
    tables: tuple[TableText, ...]
    judgements: tuple[Judgement, ...]


def build(
    folder: str | Path,
    *,
    stores: Sequence[str | Path] | None = None,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Measure the finished runs below ``folder`` and write their report.

    Args:
        folder: Has the stores in ``stores/``; gets ``results.csv``, ``figures/`` and
            ``report.html``.
        stores: Only these; by default all finished ones.
        jobs: Worker processes for the measurements.
        progress: Called with a line of text now and then.

    Returns:
        What was written and what to print.

    Raises:
        DataError: If there is no finished run of a study.
    """
    folder = Path(folder)
    studies = _by_study(_finished(folder, stores))
    if not studies:
        raise DataError(
            f"{folder} has no finished runs of a study in {folder / 'stores'}; "
            f"`repscope demo --out {folder}` makes them"
        )
    runs = [run for group in studies.values() for run in group]
    progress(f"measuring {len(runs)} runs")
    frame = measure(runs, jobs=jobs)
    csv = folder / "results.csv"
    frame.to_csv(csv, index=False)
    final = final_values(frame)
    figures, missing = _draw_all(studies, folder / "figures", progress)
    judgements = tuple(judge(final))
    shown = _tables(final, studies, compact=False)
    printed = _tables(final, studies, compact=True)
    page = Page(
        title="What kind of solution did training find?",
        lead=[*_lead(studies, judgements), *missing],
        verdicts=[_verdict(judgement) for judgement in judgements],
        tables=[
            Table(title, header, rows, note) for title, (header, rows), note in shown
        ],
        figures=figures,
        provenance=_provenance(studies, csv),
    )
    report = write(page, folder / "report.html")
    return Outcome(report, csv, (*printed, _verdict_table(judgements)), judgements)


def _finished(folder: Path, stores: Sequence[str | Path] | None) -> list[Run]:
    paths = stores
    if paths is None:
        paths = sorted(path.parent for path in folder.glob("stores/*/MANIFEST"))
    return [store.open(path) for path in paths if is_finished(Path(path))]


def _by_study(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {
        name: group
        for name in STUDIES
        if (group := [run for run in runs if run.meta.get("study") == name])
    }


def _draw_all(
    studies: Mapping[str, Sequence[Run]], out: Path, progress: Callable[[str], None]
) -> tuple[list[Figure], list[str]]:
    """Return the figures, and in words those that the runs give nothing to draw for."""
    out.mkdir(parents=True, exist_ok=True)
    figures, missing = [], []
    for name, runs in studies.items():
        for kind in FIGURES_OF[name]:
            progress(f"drawing {kind}")
            try:
                drawn = draw(kind, runs)
            except UsageError as error:
                missing.append(f"Not drawn for study {name}: {kind} ({error}).")
                progress(missing[-1])
                continue
            figures.append(_saved(drawn, name, out))
    return figures, missing


def _saved(drawn: Drawn, study: str, out: Path) -> Figure:
    with plots.settled(drawn.figure):
        plots.save(drawn.figure, out / f"{drawn.kind}.svg")
        plots.save(drawn.figure, out / f"{drawn.kind}.png")
        svg = plots.to_svg(drawn.figure, title=drawn.title)
    drawn.table.to_csv(out / f"{drawn.kind}.csv", index=False)
    return Figure(
        id=drawn.kind,
        title=f"{STUDIES[study].title}: {drawn.title[0].lower()}{drawn.title[1:]}",
        caption=drawn.caption,
        svg=svg,
        csv=f"figures/{drawn.kind}.csv",
        code=f"repscope plot {drawn.kind} stores/{study}-* --out {drawn.kind}.svg",
    )


# -- tables ---------------------------------------------------------------------
def _named(rows: list[list[str]]) -> list[list[str]]:
    def title(cell: str) -> str:
        return " − ".join(display_name(part) for part in cell.split(" - "))

    return [[title(row[0]), *row[1:]] for row in rows]


def _about(quantities: Sequence[Quantity], studies: Mapping[str, object]) -> str:
    return "\n".join(
        f"{q.title}: study {q.study}; {q.about}."
        for q in quantities
        if q.study in studies
    )


def _tables(
    final: pd.DataFrame,
    studies: Mapping[str, Sequence[Run]],
    *,
    compact: bool,
) -> tuple[TableText, ...]:
    header, rows = headline_table(final, HEADLINE, compact=compact)
    more_header, more = headline_table(final, FURTHER, compact=compact)
    gap_header, gaps = difference_table(final, HEADLINE, compact=compact)
    interval = "± half-width" if compact else "[low, high]"
    return (
        (
            f"What each optimizer left behind: mean, {interval} of the 95 % t interval "
            f"over seeds",
            (header, _named(rows)),
            "\n".join(
                filter(
                    None, [_about(HEADLINE, studies), _capped(studies), _dead(final)]
                )
            ),
        ),
        (
            "The same runs, further readings",
            (more_header, _named(more)),
            _about(FURTHER, studies),
        ),
        (
            "Paired differences over seeds (exploratory: intervals, no p values)",
            (gap_header, _named(gaps)),
            "Equal seeds share initial weights, order of rows and permutations.",
        ),
    )


def _verdict_table(judgements: Sequence[Judgement]) -> TableText:
    rows = [
        [
            j.label,
            j.claim.quantity.show(j.interval, signed=True),
            _margin(j),
            f"{j.claim.text} ({j.claim.source})",
        ]
        for j in judgements
    ]
    return (
        "Claims of arXiv 2507.12224, each by the paired difference of one metric",
        (["verdict", "difference", "margin", "claim"], rows),
        "Margins were fixed before the run. holds: the interval lies wholly beyond the "
        "margin; opposite sign:\nwholly beyond it on the other side; no difference: "
        "wholly within it; not decided: anything else.",
    )


def _dead(final: pd.DataFrame) -> str:
    """Return which numbers come from a layer that no longer answers to its input."""
    rows = final[
        (final["metric"] == "effective_rank")
        & final["layer"].str.startswith("hidden")
        & final["note"].str.contains("degenerate")
    ]
    if rows.empty:
        return ""
    named = ", ".join(sorted(f"{row.run} {row.layer}" for row in rows.itertuples()))
    return (
        f"Constant hidden layers (a dead network has rank 0, no class cosine, and "
        f"nothing to forget): {named}."
    )


def _capped(studies: Mapping[str, Sequence[Run]]) -> str:
    """Return how often an early-stopped task ran out of epochs instead."""
    counts: dict[str, list[int]] = {}
    for run in sorted(studies.get("permuted", ()), key=run_order):
        table = run.scalars()
        flags = [table[c].dropna() for c in table if str(c).startswith("capped/")]
        values = [float(flag.iloc[-1]) for flag in flags]
        total = counts.setdefault(display_name(str(run.meta["optimizer"])), [0, 0])
        total[0] += int(sum(values))
        total[1] += len(values)
    parts = [f"{name} {hit} of {all_}" for name, (hit, all_) in counts.items() if hit]
    if not parts:
        return ""
    return (
        "Tasks that ran out of epochs before they stopped improving (not converged): "
        + ", ".join(parts)
        + "."
    )


def _margin(judgement: Judgement) -> str:
    quantity, margin = judgement.claim.quantity, judgement.claim.margin
    sign = "> +" if judgement.claim.direction == "greater" else "< −"
    return f"{sign}{100 * margin:g}" if quantity.percent else f"{sign}{margin:g}"


# -- the page -------------------------------------------------------------------
def _lead(
    studies: Mapping[str, Sequence[Run]], judgements: Sequence[Judgement]
) -> list[str]:
    runs = [run for group in studies.values() for run in group]
    data = sorted({str(run.meta["config"]["data"]) for run in runs})
    words = ("holds", "opposite sign", "no difference", "not decided", "not reported")
    counts = {word: sum(j.verdict == word for j in judgements) for word in words}
    told = ", ".join(f"{word} {count}" for word, count in counts.items() if count)
    preview = min((j.n for j in judgements if j.n), default=0) < SEEDS_FOR_A_VERDICT
    hedge = (
        f" Fewer than {SEEDS_FOR_A_VERDICT} seeds: every verdict is a preview."
        if preview
        else ""
    )
    return [
        f"{len(runs)} recorded runs on {' and '.join(data)}, small ReLU networks, the "
        f"same initial weights and the same order of rows for every optimizer of a "
        f"seed. {' '.join(STUDIES[name].question for name in studies)}",
        f"Of {len(judgements)} claims of arXiv 2507.12224: {told}.{hedge} Intervals "
        f"cover initial weights, row order and permutations; they do not cover the "
        f"data set, the test images or the choice of learning rates.",
    ]


def _verdict(judgement: Judgement) -> Verdict:
    claim, quantity = judgement.claim, judgement.claim.quantity
    found = judgement.interval
    p = ""
    if found is not None and found.p_value is not None and found.p_min is not None:
        p = (
            f", exact sign-flip p = {found.p_value:.3g} (smallest possible "
            f"{found.p_min:.3g})"
        )
    names = f"{display_name(claim.first)} − {display_name(claim.second)}"
    return Verdict(
        claim=claim.text,
        source=f"arXiv 2507.12224, {claim.source}",
        metric=f"{quantity.title} ({quantity.about}), {names}",
        estimate=quantity.show(found, signed=True) + p,
        margin=_margin(judgement),
        verdict=judgement.verdict,
        n=judgement.n,
        preview=judgement.n < SEEDS_FOR_A_VERDICT,
    )


def _provenance(studies: Mapping[str, Sequence[Run]], csv: Path) -> dict[str, str]:
    facts = {"RepScope": __version__, "measurements": csv.name}
    for name, runs in studies.items():
        first = runs[0].meta
        config, versions = first["config"], first["recorder"]["versions"]
        facts |= {library: str(version) for library, version in versions.items()}
        sizes = "-".join(map(str, config["sizes"]))
        stop = (
            f", stopped by the task's test accuracy every {config['eval_every']} "
            f"updates with patience {config['patience']} (as in the paper)"
            if config["patience"]
            else ""
        )
        facts[f"study {name}"] = (
            f"{config['data']}, {sizes}, batch {config['batch_size']}, at most "
            f"{config['epochs']} epochs a task{stop}"
        )
        tuned = {run.meta["optimizer"]: run.meta["config"]["hyper"] for run in runs}
        facts[f"{name}: optimizers"] = "; ".join(
            f"{display_name(o)} " + ", ".join(f"{k} {v:g}" for k, v in hyper.items())
            for o, hyper in tuned.items()
        )
        seeds = sorted({int(run.meta["seed"]) for run in runs})
        facts[f"{name}: seeds"] = ", ".join(map(str, seeds))
        probes = sorted({str(r.meta["recorder"]["probe"]["sha256"])[:12] for r in runs})
        facts[f"{name}: probe sha256"] = ", ".join(probes)
    facts["learning rates"] = (
        f"fixed before these runs; where they were scanned, on seed {TUNING_SEED}, "
        f"which no plan accepts"
    )
    facts["claims table"] = claims_hash()
    return facts
