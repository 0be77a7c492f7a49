# `make demo` and `make test` need only Python >= 3.11 with pip and venv, and make.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
JOBS ?= 2
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-faults test-integrations test-kernels test-crosschecks lint docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## compare SGD, AdamW and Shampoo on real data: runs/demo/report.html
	@$(BIN)/repscope demo --out runs/demo --jobs $(JOBS)

test: $(VENV)/.dev ## the fast test suite (under 3 minutes on 2 cores)
	@$(BIN)/pytest -q -n $(JOBS) --dist loadfile -m "not slow and not faults and not kernels and not crosschecks"

test-slow: $(VENV)/.dev ## the slow tests
	@$(BIN)/pytest -q -m slow

test-faults: $(VENV)/.dev ## kills, power cuts, full disks, damage: prints the figures
	@$(BIN)/pytest -q -m faults tests/faults

test-integrations: $(VENV)/.integrations ## callbacks and sinks with Lightning, Transformers, TensorBoard, W&B
	@$(BIN)/pytest -q -m integrations tests/integrations

test-kernels: $(VENV)/.kernels ## the Triton kernels in Triton's interpreter
	@$(BIN)/pytest -q -m kernels tests/linalg

test-crosschecks: $(VENV)/.crosschecks ## our numbers against those of published packages
	@$(BIN)/pytest -q -m crosschecks tests/crosschecks

lint: $(VENV)/.dev ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.docs ## build the documentation into docs/_build/html
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.run ## print every performance claim as a ratio against named alternatives
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove the environment and everything built (runs/ stays)
	rm -rf $(VENV) docs/_build docs/gallery docs/reference/generated build dist *.egg-info

# One sentence and exit 2 when this machine cannot make an environment.
define CHECK_PYTHON
command -v $(PYTHON) >/dev/null 2>&1 || { \
  echo "RepScope needs Python 3.11 or newer, and there is no $(PYTHON) here: install it, or name one with 'make PYTHON=/path/to/python3.11'." >&2; exit 2; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "RepScope needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'): name a newer one with 'make PYTHON=/path/to/python3.11'." >&2; exit 2; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
  echo "RepScope needs the venv and pip modules of $(PYTHON): install them (on Debian: apt install python3-venv)." >&2; exit 2; }
endef

# Marked when complete: an interrupted creation is made again.
$(VENV)/.made:
	@$(CHECK_PYTHON)
	@echo "creating $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# A stamp is stale when the dependencies change; the package itself is editable.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing RepScope into $(VENV) (the first time takes a minute or two)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing RepScope and its test tools into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@ $(VENV)/.run

$(VENV)/.integrations: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing RepScope and what it integrates with into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,integrations]"
	@touch $@ $(VENV)/.run

$(VENV)/.kernels: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing RepScope and Triton into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,kernels]"
	@touch $@ $(VENV)/.run

# Those installed without their dependencies ask for another torch, and do without.
$(VENV)/.crosschecks: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing RepScope and the packages it is compared with into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,crosschecks]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps ckatorch safetensors pyyaml pytorch-cka torch-cka weightwatcher powerlaw
	@touch $@ $(VENV)/.run

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing RepScope and its documentation tools into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@ $(VENV)/.run
