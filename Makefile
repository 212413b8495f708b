# Every task of fxprune. A task makes its environment, .venv, when it is missing or older than pyproject.toml:
# with uv when that is installed, otherwise with python -m venv and pip.

PYTHON ?= python3
JOBS ?= 2

BIN := .venv/bin
DEMO_ENV := .venv/ready-demo
ENV := .venv/ready-demo,test
BENCH_ENV := .venv/ready-bench
DOCS_ENV := .venv/ready-docs
# One torch thread a worker: the tests are small, and the workers already fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-slow test-all lint format lines docs bench bench-full clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' Makefile

setup: $(ENV) ## make the environment for the tests in .venv

demo: $(DEMO_ENV) ## train a network that shrinks while it trains, under 5 minutes
	$(BIN)/python examples/quickstart.py

test: $(ENV) ## the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(ENV) ## only the slow tests: the torchvision zoo, the examples
	$(PYTEST) -m slow

test-all: $(ENV) ## every test
	$(PYTEST)

lint: $(ENV) ## ruff, its formatter and mypy --strict; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(ENV) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lines: ## lines of Python by room
	@$(PYTHON) .ci/count_lines.py

docs: $(DOCS_ENV) ## build the documentation into site/; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(ENV) $(BENCH_ENV) ## the benchmarks beside Torch-Pruning and the dense model, half an hour; writes the tables of the docs
	$(BIN)/python benchmarks/run_all.py

bench-full: $(ENV) $(BENCH_ENV) ## all benchmarks, hours; DATA=folder of CIFAR-10 for those that train
	$(BIN)/python benchmarks/run_all.py --full $(if $(DATA),--data "$(DATA)")

clean: ## remove caches, builds and outputs; .venv stays
	rm -rf build dist out site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fxprune passes tests examples benchmarks docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# .venv/ready-a,b says that fxprune[a,b] is installed, editable.
.venv/ready-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'fxprune needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ...'; exit 1; }
	@echo 'installing fxprune[$*] into .venv: minutes the first time, most of them for torch'
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --seed --python "$(PYTHON)" .venv && \
		uv pip install --python $(BIN)/python --editable '.[$*]'; \
	else \
		$(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --editable '.[$*]'; \
	fi
	@touch $@
