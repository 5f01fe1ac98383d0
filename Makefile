# make demo   the whole path, small, on this machine
# make test   the tests that take seconds
# `make help` lists the rest. Everything runs in .venv, which is made when first needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests run in this many processes, those of a file in the same one, for they share what they set up.
# One that dies is not started again: xdist 3.8 then waits for tests that nobody runs.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0
CHECKED := streamdit pipeline training distillation evaluation jobs configs tests benchmarks docs/hooks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help demo test test-all test-slow test-gpu lint docs setup clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort \
		| while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: $(READY) ## Run the whole path into runs/demo (again: continue it)
	$(BIN)/streamdit demo --out runs/demo

test: $(READY) ## Run the tests that take seconds
	$(PYTEST) -m "not slow and not gpu"

test-all: lint docs ## Run the linters, build the documentation, run the tests that `make test` leaves out
	$(MAKE) test-slow

# Some take minutes: each is named as it ends.
test-slow: $(READY) ## Run the tests that `make test` leaves out
	$(PYTEST) -v -m "slow or gpu"

# One after the other: the memory of a GPU is measured by some, and shared by all.
test-gpu: $(READY) ## Run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

lint: $(READY) ## Check style, types and the direction of imports
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY) ## Build the documentation into site/, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

setup: $(READY) ## Make the environment in .venv

# The stamp is touched last: an interrupted installation is taken up again by the next make.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13:" \
			"install one and name it, as in make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the environment in $(VENV): several GB, a few minutes on a fast network ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@start=$$(date +%s); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e ".[dev]" && \
	echo "The environment is ready after $$(($$(date +%s) - start)) s."
	@touch $@

clean: ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist site *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
