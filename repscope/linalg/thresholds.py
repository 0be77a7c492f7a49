"""Thresholds that `repscope doctor --tune` measured: a file in the user's cache.

``choice`` asks for those that hold on a device. A file that is damaged, newer, or was
measured elsewhere or with other versions gives none, and a reason, never an error.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

FORMAT = 1
ANY = 2**63
"""Larger than every matrix: the last of some steps."""

OFF = "REPSCOPE_THRESHOLDS=off"
"""The environment that keeps to the built-in thresholds."""

Steps = Mapping[int, str]
"""Up to which size which route is the fastest; sizes ascend and end with ``ANY``."""


class Place(NamedTuple):
    """What thresholds are measured on, and hold for."""

    device: str
    name: str
    # A CUDA device does not care.
    threads: int | None

    def __str__(self) -> str:
        if self.threads is None:
            return self.name
        return (
            f"{self.name} with {self.threads} thread{'' if self.threads == 1 else 's'}"
        )


@dataclass(frozen=True)
class Measurement:
    """Thresholds of one place, by name of the dtype."""

    place: Place
    versions: dict[str, str]
    date: str
    up_to: dict[str, Steps]


def place_of(device: torch.device) -> Place:
    """Return what thresholds are measured on, for a device as it is used now.

    Args:
        device: The CPU or a CUDA device.

    Returns:
        Its kind, the name of the model, and how many threads torch takes on a CPU.
    """
    if device.type == "cuda":
        return Place("cuda", torch.cuda.get_device_name(device), None)
    return Place(device.type, processor(), torch.get_num_threads())


def processor() -> str:
    """Return the name of the processor's model, as far as it can be read.

    Returns:
        For example ``"AMD EPYC 7B13"``; on systems that do not say, the architecture.
    """
    fields = _first_processor()
    if "model name" in fields:
        return fields["model name"]
    # Linux on ARM gives numbers of the maker and the model in place of a name.
    codes = [fields[key] for key in ("CPU implementer", "CPU part") if key in fields]
    # Elsewhere platform.processor() would start a process.
    known = platform.processor() if sys.platform == "win32" else platform.machine()
    return " ".join([known, *codes])


def _first_processor() -> dict[str, str]:
    fields = {}
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                key, _, value = line.partition(":")
                fields[key.strip()] = value.strip()
    except OSError:
        pass
    return fields


def versions() -> dict[str, str]:
    """Return the versions whose LAPACKs the thresholds compare.

    Returns:
        Package to version.
    """
    import scipy

    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def path() -> Path:
    """Return the file that holds what was measured, whether or not it exists.

    Returns:
        ``repscope/thresholds.json`` below ``$XDG_CACHE_HOME``, or else below the
        folder of the system for caches.

    Raises:
        OSError: If neither is known.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given)
    if not folder.is_absolute():  # as the XDG specification has it
        try:
            folder = _system_cache(Path.home())
        except RuntimeError as error:
            raise OSError(
                "there is no home folder for a cache: set XDG_CACHE_HOME to a folder"
            ) from error
    return folder / "repscope" / "thresholds.json"


def _system_cache(home: Path) -> Path:
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home / ".cache"


def switched_off() -> bool:
    """Return whether the user wants the built-in thresholds.

    Returns:
        By the environment.
    """
    return os.environ.get("REPSCOPE_THRESHOLDS") == "off"


def find(
    place: Place, *, routes: Collection[str]
) -> tuple[Measurement | None, str | None]:
    """Return the thresholds that hold for a place, or why there are none.

    Args:
        place: Where eigenvalues are to be computed.
        routes: The known ones.

    Returns:
        A measurement or None, and why there is none although there is a file.
    """
    if switched_off():
        return None, OFF
    known, why = _load()
    found = next((one for one in known if one.place == place), None)
    if found is None:
        if known:
            others = ", ".join(str(one.place) for one in known)
            why = f"the file holds nothing for {place}, but for {others}"
        return None, why
    for package, version in versions().items():
        if found.versions.get(package) != version:
            return None, (
                f"they were measured with {package} {found.versions.get(package)}, and "
                f"this is {package} {version}"
            )
    for name in {name for steps in found.up_to.values() for name in steps.values()}:
        if name not in routes:
            return None, f"they name the route {name!r}, which this RepScope lacks"
    return found, None


def _load() -> tuple[list[Measurement], str | None]:
    try:
        data = json.loads(path().read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            return [], (
                f"the format of the file is {data['format']!r}, and this RepScope "
                f"reads {FORMAT}"
            )
        return [_measurement(**entry) for entry in data["measurements"]], None
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"the file cannot be read: {error.strerror or error}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [], "the file is damaged"


def _measurement(
    *, place: Sequence[Any], versions: Any, date: Any, up_to: Any
) -> Measurement:
    tables = {dtype: _steps(pairs) for dtype, pairs in up_to.items()}
    return Measurement(Place(*place), dict(versions), str(date), tables)


def _steps(pairs: Sequence[tuple[int | None, str]]) -> Steps:
    steps = {ANY if n is None else n: str(route) for n, route in pairs}
    if [*steps] != sorted(steps) or max(steps) != ANY:
        raise ValueError(f"sizes do not ascend to the end: {pairs}")
    return steps


def check_writable() -> None:
    """Create the folder of the file, and see that files can be made in it.

    Raises:
        OSError: If not; the message says what to do.
    """
    folder = path().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"nothing can be written to {folder} ({error.strerror}): set "
            f"XDG_CACHE_HOME to a folder where thresholds can be kept"
        ) from error


def save(measured: Sequence[Measurement]) -> Path:
    """Keep measurements, in place of earlier ones of the same places.

    The file is replaced at once or not at all. One that cannot be read is replaced too.

    Args:
        measured: One for each place.

    Returns:
        The file.
    """
    file = path()
    places = {one.place for one in measured}
    others = [one for one in _load()[0] if one.place not in places]
    entries = [asdict(one) for one in (*others, *measured)]
    for entry in entries:
        entry["up_to"] = {
            dtype: [[None if n == ANY else n, route] for n, route in steps.items()]
            for dtype, steps in entry["up_to"].items()
        }
    text = json.dumps({"format": FORMAT, "measurements": entries}, indent=1)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}-", delete=False
    ) as new:
        try:
            new.write(text + "\n")
            new.close()  # before it is renamed, which Windows asks for
            Path(new.name).replace(file)
        except BaseException:
            new.close()
            Path(new.name).unlink()
            raise
    return file
