# Every target makes and uses its own .venv; nothing else on the machine is touched.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart notebooks docs test bench check format clean

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

notebooks: $(STAMP)  ## Open the notebooks in JupyterLab
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[notebooks]"
	$(BIN)/jupyter lab notebooks

docs: $(STAMP)  ## Write docs/api.md and build the API reference, build/docs/routesae_lens.html
	$(BIN)/python docs/make_api.py
	$(BIN)/python -W "ignore:Error parsing type annotation" -m pdoc --docformat google --no-show-source \
		--output-directory build/docs routesae_lens '!routesae_lens[.]'  # without its modules: public names only

test: $(STAMP)  ## Run the tests (no model hub is asked)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

bench: $(STAMP)  ## Measure speed and memory against SAELens and others (recipes/benchmarks/README.md)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pytest -o addopts=--benchmark-quiet -v recipes/benchmarks $(ARGS)

check: $(STAMP)  ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code, sort the imports, strip the notebooks
	$(BIN)/nbstripout --extra-keys metadata.language_info notebooks/*.ipynb
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what builds and tools leave behind (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
