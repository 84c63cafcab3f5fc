# What people and CI run; `make` alone lists it. A fresh clone needs Python 3.11 or newer, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
WIRE := src/hanse/cell/wire.proto
# The default suite runs on all cores, a file's tests on one of them.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
# The files of slow tests that `make faults` runs; by default all.
FAULTS :=

# Stamps: an environment is made once, and again when what it is made from has changed.
RUN := $(VENV)/.installed-run
DEVELOP := $(VENV)/.installed-develop

# Some machines forbid Python its bytecode files; without them every process would compile all it imports, each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test check faults faults-long docs bench wire format clean
.DELETE_ON_ERROR:

help:  ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUN)  ## Three organisations train a model together, here, in half a minute once installed
	$(BIN)/python -m examples.demo

test: $(DEVELOP)  ## Run the tests (all but the slow ones)
	$(PYTEST)

check: $(DEVELOP)  ## Everything that a change must pass: format, lint, types, layers, tests, coverage
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/coverage erase
	$(PYTEST) --cov --cov-report=
	$(BIN)/coverage report --include='src/hanse/coordination/*,src/hanse/learning/*' --fail-under=95
	$(BIN)/coverage report --fail-under=85

faults: $(DEVELOP)  ## Run the slow tests: processes killed and paused, servers lost, disks full, networks cut
	$(BIN)/python -m pytest -m 'slow and not long' $(FAULTS)

faults-long: $(DEVELOP)  ## The same, each process at each step of each workflow, and 200 random pairs; takes hours
	$(BIN)/python -m pytest -m slow

docs: $(DEVELOP)  ## Build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

bench: $(DEVELOP)  ## Measure, one JSON line a figure
	$(BIN)/python -m benchmarks

wire: $(DEVELOP)  ## Generate the code of the wire's protobuf messages again
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=src --python_out=src --mypy_out=src $(WIRE)

format: $(DEVELOP)  ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

venv: $(DEVELOP)  ## Make the environment for development in .venv

clean:  ## Delete what these commands made, but not the environment
	rm -rf docs/_build build dist .demo .bench .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find src tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

# pip 25.1 is the first that installs dependency groups; the pip that venv puts there may be older.
$(RUN): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Hanse needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]} (choose another: make PYTHON=python3.12 ...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	@touch $@

$(DEVELOP): $(RUN)
	$(BIN)/python -m pip install --quiet --group test --group lint --group docs --group wire
	@touch $@
