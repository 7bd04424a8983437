# Two commands for a new clone: `make demo` and `make test`. Each makes the environment it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
JOBS ?= 2

.PHONY: help demo test models lint types check bench faults fuzz clean

help:  ## List these commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## Fetch a small language model, load it and chat
	$(BIN)/pretrained demo

test: $(VENV)/.test models  ## Run the tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(JOBS) -m "not long" tests

models: $(VENV)/.test  ## Fetch the real models that tests use
	$(BIN)/python tools/fetch_models.py .cache/models

lint: $(VENV)/.test  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## Check types, strictly in the core
	$(BIN)/mypy

check: lint types test  ## Everything that CI runs

bench: $(VENV)/.test models  ## Measure speed and memory beside the peers
	$(BIN)/python benchmarks/run.py

fuzz: $(VENV)/.test  ## Feed 100,000 mutated files to the readers (minutes)
	$(BIN)/python tools/fuzz.py --record docs/fuzzing.json

faults: $(VENV)/.test  ## Run the fault suite beside transformers, into docs/FAULTS.md
	$(BIN)/python tools/faults/run.py

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pretrained needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[torch,text]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[torch,text,dev]'
	@touch $@
