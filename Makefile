# `make demo` and `make test` each work alone on a fresh machine that has Python >= 3.11 and make.
#
#   PYTHON=python3.12       the interpreter that builds the environment
#   VENV=.venv              where the environment stands
#   TORCH_INDEX=ADDRESS     take torch from this package index (see "Size" in README.md)
#   WORKERS=logical         test processes: a number, or one per logical core (never more than four)
#   ARGS="..."              handed to pytest, `devec demo` or the benchmarks

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= logical
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test faults test-slow check bench bench-peers docs wheel clean

help:
	@echo "make demo       the main job on real data, results in ./devec-demo/"
	@echo "make test       the tests (under ten minutes on two cores)"
	@echo "make faults     hundreds of kills, and an error at every write: is anything lost?"
	@echo "make test-slow  the tests that take longer"
	@echo "make check      ruff, mypy, import contract"
	@echo "make bench      seconds and memory against the literal recipe (and, once set up, against mergekit)"
	@echo "make bench-peers  against mergekit and a plain copy alone: sets mergekit up on the first call"
	@echo "make docs       docs/equations.md, docs/methods/ and the pictures in docs/img/"
	@echo "make wheel      dist/devec-*.whl"
	@echo "make clean      remove the environment and everything that was built"

# One environment, two sizes: .ready-demo means that it holds what the demo needs, .ready-dev everything.
$(VENV)/.ready-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"devec needs Python 3.11 or newer, $(PYTHON) is {v}. Use make PYTHON=...")'
	@echo "== setting up $(VENV) ($*): once, a few minutes, most of it the download of torch"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(PIP) install --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch
endif
	$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@ $(if $(filter dev,$*),$(VENV)/.ready-demo)
	@echo "== $(VENV) is ready"

demo: $(VENV)/.ready-demo
	@$(BIN)/devec demo --overwrite $(ARGS)

test: $(VENV)/.ready-dev
	@$(PYTEST) -n $(WORKERS) --maxprocesses 4 -m "not slow and not faults" $(ARGS)

faults: $(VENV)/.ready-dev
	@$(PYTEST) -n $(WORKERS) --maxprocesses 4 --dist loadgroup -m faults tests/faults $(ARGS)

test-slow: $(VENV)/.ready-dev
	@$(PYTEST) -n $(WORKERS) --maxprocesses 4 -m slow $(ARGS)

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready-dev
	@$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(VENV)/.ready-dev
	@$(BIN)/python -m benchmarks.peers.setup $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	@$(BIN)/python -m benchmarks.peers $(ARGS)

docs: $(VENV)/.ready-dev
	$(BIN)/python docs/make_equations.py
	$(BIN)/python docs/make_methods.py
	$(BIN)/python docs/make_pictures.py

wheel: $(VENV)/.ready-dev
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests benchmarks experiments examples docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
