"""The import table of the house, held by reading every import statement."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import repscope

PACKAGE = Path(repscope.__file__).parent

FLOORS = {
    "errors": 0, "_checks": 0, "results": 0, "snapshot": 0,
    "linalg": 1, "parallel": 1,
    "capture": 2, "store": 2, "metrics": 2, "landscape": 2, "optim": 2, "plots": 2,
    "recorder": 3, "analysis": 3,
    "studies": 4, "integrations": 4, "networks": 4,
    "report": 5,
    "cli": 6,
}  # fmt: skip

# third-party module -> the only places that may import it
WALLS = {
    "h5py": ("store",),
    "matplotlib": ("plots",),
    "seaborn": ("plots",),
    "argparse": ("cli",),
    "scipy.stats": ("metrics.comparison", "metrics.similarity"),
    "joblib": ("parallel",),
    "dask": ("parallel",),
    "jinja2": ("report",),
    "ctypes": ("linalg",),
    "cupy": ("linalg",),
    "triton": ("linalg",),
    "lightning": ("integrations",),
    "pytorch_lightning": ("integrations",),
    "transformers": ("integrations",),
    "accelerate": ("integrations",),
    "tensorboard": ("integrations",),
    "torch.utils.tensorboard": ("integrations",),
    "wandb": ("integrations",),
}

# Functions that import what their arguments name.
LOADERS = ("importlib.import_module", "load")

# A pure metric never learns about runs, files or devices.
FORBIDDEN = {
    "metrics": ("snapshot", "store", "capture", "plots", "landscape", "parallel"),
    "plots": ("linalg", "metrics", "store", "capture"),
    "results": ("linalg",),
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> list[str]:
    """Return the dotted names a file imports, in function bodies and by name too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS:
            values = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            found += [value for value in values if isinstance(value, str)]
    return found


def test_every_file_belongs_to_a_room_of_the_plan() -> None:
    rooms = {dotted(path).split(".")[0] for path in sources()} - {""}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_imports_only_go_down(path: Path) -> None:
    here = dotted(path)
    room = here.split(".")[0]
    for name in imports(path):
        if not name.startswith("repscope.") or not room:
            continue
        target = name.split(".")[1]
        if target not in FLOORS or target == room:
            continue  # `from repscope import __version__`, or the same room
        # The ground floor is one room of small values that may name each other.
        assert FLOORS[target] < FLOORS[room] or FLOORS[room] == 0, (
            f"{here} imports {name}"
        )
        assert target not in FORBIDDEN.get(room, ()), f"{here} imports {name}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "metrics").rglob("*.py")), ids=dotted
)
def test_metric_families_do_not_know_each_other(path: Path) -> None:
    family = dotted(path).split(".")[1:2]
    for name in imports(path):
        if name.startswith("repscope.metrics."):
            assert name.split(".")[2:3] == family


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_third_party_walls(path: Path) -> None:
    here = dotted(path)
    for name in imports(path):
        for module, homes in WALLS.items():
            if name == module or name.startswith(f"{module}."):
                assert any(here == h or here.startswith(f"{h}.") for h in homes), (
                    f"{here} imports {name}: that belongs to {homes}"
                )


def test_import_repscope_loads_nothing_heavy() -> None:
    heavy = (
        "torch",
        "numpy",
        "h5py",
        "scipy",
        "pandas",
        "seaborn",
        "matplotlib",
        "sklearn",
    )
    code = f"import sys, repscope; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in repscope.__all__:
        assert getattr(repscope, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        repscope.nonsense  # noqa: B018
