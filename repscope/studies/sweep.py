"""Many runs: which ones, in parallel, each finished once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from repscope import parallel, store
from repscope.errors import DataError, NotAStore, UnknownName, UsageError, suggest
from repscope.studies.catalog import STUDIES
from repscope.studies.config import RunConfig
from repscope.studies.data import Data, load
from repscope.studies.training import Diverged, Session

# The seed that learning rates are scanned on; never reported.
TUNING_SEED = 100


@dataclass(frozen=True)
class Finished:
    """A run that is on disk.

    Attributes:
        config: What it was.
        path: Its store.
        reused: Whether it was there before.
    """

    config: RunConfig
    path: Path
    reused: bool


def plan(
    studies: Sequence[str],
    *,
    data: str = "digits",
    seeds: Sequence[int] = range(5),
    optimizers: Sequence[str] | None = None,
) -> list[RunConfig]:
    """Return the runs of some studies: every optimizer with every seed.

    Args:
        studies: Rows of ``STUDIES``.
        data: Data set, a key of the study's protocols.
        seeds: Seeds; equal seeds are paired across optimizers.
        optimizers: Only these; ``None`` takes all that a study has.

    Returns:
        Configurations, slowest studies first.

    Raises:
        UnknownName: If a study, data set or optimizer is not known.
        UsageError: If there is no seed, a seed is repeated, or it is the tuning seed.
    """
    if TUNING_SEED in seeds:
        raise UsageError(
            f"seed {TUNING_SEED} is the one learning rates were chosen on; take others"
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds must be distinct and at least one, got {list(seeds)}")
    configs = []
    known: set[str] = set()
    for name in studies:
        if name not in STUDIES:
            raise UnknownName(
                f"unknown study {name!r}{suggest(name, STUDIES)} "
                f"(known: {', '.join(STUDIES)})"
            )
        protocols = STUDIES[name].protocols
        if data not in protocols:
            raise UnknownName(
                f"study {name!r} has no protocol for {data!r} "
                f"(known: {', '.join(protocols)})"
            )
        protocol = protocols[data]
        known |= set(protocol.optimizers)
        fields = {k: v for k, v in vars(protocol).items() if k != "optimizers"}
        configs += [
            RunConfig(name, data, optimizer, dict(hyper), seed, **fields)
            for optimizer, hyper in protocol.optimizers.items()
            if optimizers is None or optimizer in optimizers
            for seed in seeds
        ]
    for optimizer in optimizers or ():
        if optimizer not in known:
            raise UnknownName(
                f"no chosen study runs optimizer {optimizer!r}"
                f"{suggest(optimizer, known)} (known: {', '.join(sorted(known))})"
            )
    # Long runs first, so that the last minutes are not one worker's alone.
    return sorted(configs, key=lambda config: config.optimizer != "shampoo")


def is_finished(path: Path) -> bool:
    """Return whether ``path`` is a store whose run came to its end."""
    try:
        run = store.open(path)
    except NotAStore:
        return False
    return run.closed and "interrupted" not in run.meta


def _check_data(path: Path, data: Data) -> None:
    made_from = store.open(path).meta.get("data_sha256")
    if made_from != data.sha256:
        raise DataError(
            f"{path} was made from other {data.name} files than those given now; "
            f"choose another --out, or give the same files"
        )


def run_one(config: RunConfig, *, out: Path, data: Mapping[str, Data]) -> Finished:
    """Do one run unless its store is already complete.

    Args:
        config: What to run.
        out: Folder of the stores.
        data: The data sets by name.

    Returns:
        Where the store is, and whether it was there before.
    """
    path, source = out / config.name, data[config.data]
    if is_finished(path):
        _check_data(path, source)
        return Finished(config, path, reused=True)
    if path.exists():
        store.remove(path)  # ours, by its key, and interrupted
    tasks = STUDIES[config.study].tasks(source, seed=config.seed)
    session = Session(config, tasks, path, data_sha256=source.sha256)
    with session.recorder as recorder:
        try:
            STUDIES[config.study].train(session)
        except Diverged:
            recorder.capture_now("diverged", diverged=1.0)
    return Finished(config, path, reused=False)


def sweep(
    configs: Sequence[RunConfig],
    out: str | Path,
    *,
    jobs: int = 1,
    data_dir: str | Path | None = None,
) -> Iterator[Finished]:
    """Run what is not yet on disk; yield each run as it is ready, in order.

    Args:
        configs: From `plan`.
        out: Folder of the stores.
        jobs: Worker processes, one torch thread each.
        data_dir: Where IDX files are.

    Yields:
        One `Finished` per configuration.
    """
    out = Path(out)
    # Read once, here: a worker need not import what reads it.
    names = {config.data for config in configs}
    data = {name: load(name, data_dir=data_dir) for name in names}
    work = partial(run_one, out=out, data=data)
    waiting = [config for config in configs if not is_finished(out / config.name)]
    for config in configs:
        if config not in waiting:
            _check_data(out / config.name, data[config.data])
            yield Finished(config, out / config.name, reused=True)
    yield from parallel.run(work, waiting, jobs=jobs)
