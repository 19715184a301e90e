# make run | test | check: each makes the environment in .venv first, if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# The suite on the newest Flower, beside the pinned one that the application needs for gRPC.
NEWEST := .venv-newest-flwr

# The site is made from the sources: a small environment, without PyTorch and Flower.
DOCS := .venv-docs

.PHONY: help run deploy-demo compare results test test-examples test-faults test-newest-flwr check docs dist format clean

help:
	@echo "make run      train FedPM in Flower's simulation; ARGS='algorithm=localnewton alpha=1.0' for settings"
	@echo "make deploy-demo  a SuperLink and three SuperNodes over gRPC, with TLS and keys, on this machine"
	@echo "make compare  FedAvg, LocalNewton and FedPM side by side; ARGS='algorithms=fedavg,fedpm seeds=3' for others"
	@echo "make results  tables and pictures of docs/results.md and README.md, from benchmarks/results"
	@echo "make test     the test suite"
	@echo "make test-examples  the apps in examples/, with Lightning, transformers and PEFT"
	@echo "make test-faults  processes killed, stalled and brought back, disks full, large models on Ray: a quarter of an hour"
	@echo "make test-newest-flwr  the test suite on the newest Flower"
	@echo "make check    format, lint, types, then the test suite"
	@echo "make docs     the documentation as a site, in site/"
	@echo "make dist     the sdist and the wheel in dist/, checked"
	@echo "make format   reformat the code"
	@echo "make clean    remove the environments and the site"

run: $(VENV)/.app
	@$(BIN)/python -m scripts.simulate $(ARGS)

deploy-demo: $(VENV)/.app
	@$(BIN)/python -m scripts.deploy_demo $(ARGS)

compare: $(VENV)/.app
	@$(BIN)/python -m benchmarks.compare $(ARGS)

results: $(VENV)/.app
	@$(BIN)/python -m benchmarks.results $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-examples: $(VENV)/.examples
	$(BIN)/python -m pytest tests/test_examples.py tests/test_lightning.py $(ARGS)

test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m faults -n 2 --dist load -v --durations=0 \
		tests/deployment tests/test_simulation.py tests/test_convex.py $(ARGS)

test-newest-flwr: $(NEWEST)/.dev
	@$(NEWEST)/bin/python -c 'import flwr; print("Flower", flwr.__version__)'
	$(NEWEST)/bin/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

# Without Material's notice that it is looked after until May 2027.
docs: $(DOCS)/.docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(NEWEST) $(DOCS) site

# A virtual environment, in whichever folder.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedpm-flwr needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $* || \
	  { rm -rf $*; echo "no virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@echo "installing into $*$(if $(filter $(DOCS),$*),,; PyTorch is large, so this takes a few minutes)"

$(VENV)/.app: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[app]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.app
	$(BIN)/python -m pip install --quiet --editable '.[app,dev]'
	@touch $@

$(VENV)/.examples: pyproject.toml | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	@touch $@

$(NEWEST)/.dev: pyproject.toml | $(NEWEST)/bin/python
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[app,dev]'
	$(NEWEST)/bin/python -m pip install --quiet --upgrade 'flwr[simulation]<2'
	@touch $@

# The extra's packages alone: with the library they would bring PyTorch.
$(DOCS)/.docs: pyproject.toml | $(DOCS)/bin/python
	$(DOCS)/bin/python -c 'import tomllib; \
	  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  print(*extras["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --requirement $(DOCS)/requirements.txt
	@touch $@
