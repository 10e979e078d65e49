# The front door: `make demo` shows Shoal at work, `make test` runs everything that CI runs.
# Both do all set-up on a machine that has Python >= 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python
ARGS ?=

.PHONY: help demo test check unit tests-alone scenarios size bench golden models requirements docs clean

help:
	@echo "make demo [ARGS=--once]  three unequal nodes on this machine answer through one pipeline"
	@echo "make test                everything CI runs: style, types, architecture, tests"
	@echo "make unit [ARGS=...]     tests only, one after another, or those that ARGS names"
	@echo "make check               style, types and architecture only"
	@echo "make bench [ARGS=...]    the benchmarks (see bench/README.md)"
	@echo "make docs                regenerate docs/reference"
	@echo "make golden              regenerate recorded references (own environment with torch)"
	@echo "make size                the table of file and function sizes"

# The virtual environment is made without ensurepip, which Debian splits off: the system's pip fills it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Shoal needs Python 3.11 or newer, this is %d.%d: set PYTHON=python3.x" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { echo "pip is missing: install it (Debian: apt-get install python3-pip) or set PYTHON=... to a Python that has it"; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/run.stamp: requirements/run.txt pyproject.toml | $(BIN)/python
	@echo "installing Shoal into $(VENV) (once)"
	$(PIP) install --quiet --require-hashes -r requirements/run.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/test.stamp: requirements/test.txt $(VENV)/run.stamp
	$(PIP) install --quiet --require-hashes -r requirements/test.txt
	@touch $@

demo: $(VENV)/run.stamp
	@SHOAL_PIP_PYTHON="$(PYTHON)" $(BIN)/shoal demo $(ARGS)

models: $(VENV)/run.stamp
	@SHOAL_PIP_PYTHON="$(PYTHON)" $(BIN)/python tools/fetch_models.py .models

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/test.stamp models
	$(BIN)/python -m pytest -q $(ARGS)

# Scenarios mostly wait for nodes of their own: beside the other tests they cost little time.  Each half prints when it is done.
test: check models
	@echo "tests and scenarios, side by side (some minutes)"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target tests-alone scenarios

tests-alone:
	@$(BIN)/python -m pytest -q --ignore=tests/scenarios --ignore=tests/rehearsals

scenarios:
	@$(BIN)/python -m pytest -q tests/scenarios tests/rehearsals

size: $(VENV)/test.stamp
	@$(BIN)/python tools/size.py

bench: $(VENV)/test.stamp models
	$(BIN)/python -m bench $(ARGS)

docs: $(VENV)/run.stamp
	@for script in tools/docs/*.py; do $(BIN)/python $$script; done

golden:
	@$(PYTHON) tools/golden/run.py

# Needs uv; writes no addresses into the files.
requirements:
	uv pip compile pyproject.toml requirements/build.in --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q -o requirements/run.txt
	uv pip compile pyproject.toml requirements/build.in requirements/test.in --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q -o requirements/test.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
