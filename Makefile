# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
#
# `make demo` and `make test` each set up all that they need, into .venv.
# `make PYTHON=/path/to/python3.13 ...` picks the Python that .venv is made of.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

STAMP := .venv/.gemma_ext-ready
RUN := .venv/bin/python -m
PYTHON ?=
# Extra arguments for pytest, for example PYTEST_ARGS='-k recipe -x'.
PYTEST_ARGS ?=
# A line of progress is worth more than the warnings of TensorFlow, which
# arrives as a dependency of a dependency.
export TF_CPP_MIN_LOG_LEVEL ?= 3
# Images of containers often set this. Every process that tests start would
# compile thousands of modules anew, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

SOURCES := gemma_ext tests tools examples

.PHONY: help
help:  ## Lists the targets.
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' \
	  | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(STAMP)  ## The real Gemma 3 270M, compressed and measured.
	$(RUN) tools.demo

# A process for each core, up to four: each of them holds JAX and TensorFlow.
# A file's tests stay together, for the fixtures that they share; the order of
# files is that of tests/conftest.py, the longest first.
#
# Types are checked beside the first tests, which leave a core idle while they
# start. What they find comes after the tests; if nothing, pytest's closing
# lines come last.
#
# `test` leaves out what tests/slow.txt lists.
.PHONY: test test-all
test: MARKS := -m 'not slow'
test: $(STAMP)  ## Lint, types, tests but the slow ones, coverage.
test-all: $(STAMP)  ## Lint, types, every test, coverage.
test test-all:
	@$(MAKE) --no-print-directory lint
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; status=0; \
	$(RUN) mypy > "$$log" 2>&1 & types=$$!; \
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(RUN) pytest -q --durations=15 \
	  -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder \
	  --cov=gemma_ext --cov-report=term --cov-fail-under=85 $(MARKS) $(PYTEST_ARGS) \
	  || status=$$?; \
	wait $$types || { cat "$$log"; status=1; }; \
	exit $$status

.PHONY: lint
lint: $(STAMP)  ## Style, without changing anything.
	$(RUN) ruff check $(wildcard $(SOURCES))
	$(RUN) ruff format --check $(wildcard $(SOURCES))

.PHONY: format
format: $(STAMP)  ## Rewrites the sources in the house style.
	$(RUN) ruff check --fix $(wildcard $(SOURCES))
	$(RUN) ruff format $(wildcard $(SOURCES))

.PHONY: types
types: $(STAMP)  ## Checks the type hints of gemma_ext.
	$(RUN) mypy

.PHONY: notebook
notebook: $(STAMP)  ## Executes the quickstart on the real model.
	mkdir -p out
	$(RUN) tools.run_notebook examples/enhancements/quickstart.ipynb \
	  out/quickstart.ipynb

.PHONY: wheel
wheel: $(STAMP)  ## Builds the wheel into dist/.
	$(RUN) uv build --python .venv/bin/python --wheel --out-dir dist .

.PHONY: lock
lock: $(STAMP)  ## Renews the tested versions in tools/constraints.txt.
	$(RUN) uv pip compile --universal --python-version 3.12 --upgrade -q \
	  --all-extras --no-emit-package gemma-ext --no-annotate --no-header \
	  pyproject.toml -o tools/constraints.txt

.PHONY: setup
setup: $(STAMP)  ## Only the set-up.

$(STAMP): pyproject.toml tools/constraints.txt tools/setup_env.sh
	@bash tools/setup_env.sh "$(PYTHON)"

.PHONY: clean
clean:  ## Removes .venv, caches and results.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .coverage htmlcov build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
