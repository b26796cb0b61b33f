# Two commands are all the set-up: `make run` and `make test`. Both create .venv on first use and install nothing again.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Ranks are processes; one thread each on a 2-core machine, or they fight for the cores.
export TOKENIZERS_PARALLELISM := false

.PHONY: run test test-all lint types imports check smoke bench-setup clean-runs

run: $(STAMP)
	$(BIN)/tracestill run embedded

test: $(STAMP)
	$(BIN)/python -m pytest -m "not long"

test-all: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright

imports: $(STAMP)
	$(BIN)/lint-imports

check: lint types imports

smoke: $(STAMP)
	$(BIN)/python -m pytest -m "long and smoke"

# Peers of the benchmarks, each in an environment of its own where pins clash.
bench-setup: $(STAMP)
	$(BIN)/python -m tests.bench.setup

$(STAMP): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable ".[dev]"
	touch $@
