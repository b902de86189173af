# make tutorial   install what is needed, start the local API, run the five scripts, show the result
# make test       run the tests (make test-slow: the long ones; make test-all: those of every fault, too)
# make lint       check style and types
# make docs       make anew what docs/ takes from the code and from docs/run/
# make figures    make docs/run/ anew: nine trainings, about two hours on two cores
#
# On Linux the default PyTorch comes with CUDA; TORCH_INDEX names an index that has the small CPU build:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu tutorial

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: tutorial test test-slow test-all lint format docs figures clean

tutorial: .venv/.installed
	@$(BIN)/python examples/run_tutorial.py

test: .venv/.installed-tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: .venv/.installed-tests
	$(BIN)/python -m pytest -m "slow and not exhaustive"

test-all: .venv/.installed-tests
	$(BIN)/python -m pytest

lint: .venv/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed
	$(BIN)/python docs/make.py

figures: .venv/.installed
	$(BIN)/python docs/make_figures.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name it with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Making a virtual environment in .venv ..."
	@$(PYTHON) -m venv .venv

.venv/.installed: requirements.txt local_api/requirements.txt | .venv/bin/python
	@echo "Installing requirements.txt and local_api/requirements.txt (a few minutes, once) ..."
ifneq ($(TORCH_INDEX),)
	@$(PIP) --index-url $(TORCH_INDEX) "$$(grep '^torch==' local_api/requirements.txt)"
else ifeq ($(shell uname -s),Linux)
	@echo "Note: on Linux the default PyTorch is a large download (526 MB, and CUDA packages of several GB)."
	@echo "      The small CPU build: make TORCH_INDEX=https://download.pytorch.org/whl/cpu $(MAKECMDGOALS)"
endif
	@$(PIP) -r requirements.txt -r local_api/requirements.txt
	@touch $@

.venv/.installed-tests: tests/requirements.txt .venv/.installed
	@echo "Installing tests/requirements.txt ..."
	@$(PIP) -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv .tutorial .figures .local_api .pytest_cache .ruff_cache .mypy_cache .hypothesis
