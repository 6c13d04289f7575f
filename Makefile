# Every target makes and uses its own .venv; nothing else on the machine is touched.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test check format clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 14

venv: $(STAMP)  ## Make .venv with the package (editable) and the development tools

# torch goes first: what is already there satisfies the second command, so no other build is fetched.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(STAMP)  ## Run recipes/quickstart.py
	$(BIN)/python recipes/quickstart.py

test: $(STAMP)  ## Run the tests (no model hub is asked)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

check: $(STAMP)  ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what builds and tools leave behind (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
