"""The page on integrations: its snippets run as printed, its names are documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest
from test_examples import DOCS, blocks

import repscope.integrations

PAGE = DOCS / "how-to" / "integrations.md"
PACKAGES = ("lightning", "transformers", "accelerate", "tensorboard", "wandb")


@pytest.mark.integrations
# Of Lightning about a small example, of torch about DataLoaders on a CPU.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_snippets_run_as_printed(tmp_path, monkeypatch):
    for package in PACKAGES:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    code = "\n".join(blocks(PAGE, "python"))
    exec(compile(code, PAGE.name, "exec"), {"__name__": "__main__"})
    importlib.import_module("wandb").teardown()
    for name in ("net", "bert"):
        run = repscope.open(tmp_path / "runs" / name)
        assert run.closed
        assert len(run.steps) > 1


def test_the_api_page_lists_the_public_names():
    section = (DOCS / "reference" / "api.md").read_text().split("## Integrations")[1]
    listed = set(re.findall(r"^   (\w+\.\w+)$", section.split("\n## ")[0], re.M))
    found = set()
    for module in pkgutil.iter_modules(repscope.integrations.__path__):
        if module.name in ("lightning", "transformers"):  # may not be installed
            found.add(f"{module.name}.RecorderCallback")
        elif module.name not in ("extras", "recording"):  # not for users
            path = f"repscope.integrations.{module.name}"
            found |= {
                f"{module.name}.{name}"
                for name, value in vars(importlib.import_module(path)).items()
                if inspect.isclass(value) or inspect.isfunction(value)
                if value.__module__ == path and not name.startswith("_")
            }
    assert listed == found
