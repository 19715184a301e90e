# make run | test | check: each makes the environment in .venv first, if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help run test check format clean

help:
	@echo "make run    train FedPM in Flower's simulation; ARGS='algorithm=localnewton alpha=1.0' for settings"
	@echo "make test   the test suite"
	@echo "make check  format, lint, types, then the test suite"
	@echo "make format reformat the code"
	@echo "make clean  remove the environment"

run: $(VENV)/.app
	@$(BIN)/python scripts/simulate.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedpm-flwr needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "no virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

$(VENV)/.app: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV); PyTorch is large, so this takes a few minutes"
	$(BIN)/python -m pip install --quiet --editable '.[app]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.app
	$(BIN)/python -m pip install --quiet --editable '.[app,dev]'
	@touch $@
