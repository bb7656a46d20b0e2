# Two commands on a fresh machine: `make run` and `make test`. Each sets up what it needs in `.venv`.
#
#   PYTHON=python3.12     the interpreter to build the environment with (3.11 or newer)
#   TORCH_INDEX=URL       a package index of your own to take torch from
#   MODEL=folder-or-hub-id   what `make run` serves

PYTHON ?= python3
MODEL ?= smollm2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help run test check format protos setup clean

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

run: $(VENV)/.ready  ## Start everything here, stream a sample answer, serve until Ctrl-C
	@$(BIN)/paceline serve $(MODEL) --demo

test: $(VENV)/.ready-dev $(VENV)/protos/.ready  ## Run the tests
	$(BIN)/python -m pytest tests

check: $(VENV)/.ready-dev  ## Lint, format check, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_import_directions.py

format: $(VENV)/.ready-dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/protos/.ready  ## Generate the stubs from protos/
	$(VENV)/protos/bin/python protos/generate.py client

setup: $(VENV)/.ready-dev  ## Only set up the environment

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Torch first: without a GPU a plain install would bring gigabytes of CUDA packages, and so would any later package
# that asks for a newer torch. The constraints file holds what was installed.
$(VENV)/constraints.txt:
	@echo "Setting up $(VENV) (once, a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; set PYTHON=python3.11 or newer"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then torch='torch>=2.11,<2.16'; else torch='torch==2.13.0'; fi; \
		$(PIP) $${TORCH_INDEX:+--index-url "$$TORCH_INDEX"} "$$torch"
	@$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch").split("+")[0])' > $@

$(VENV)/.ready: $(VENV)/constraints.txt pyproject.toml client/pyproject.toml
	@$(PIP) -c $(VENV)/constraints.txt -e client -e '.[all]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PIP) -c $(VENV)/constraints.txt -e client -e '.[all,dev]'
	@touch $@

$(VENV)/protos/.ready: requirements-protos.txt $(VENV)/constraints.txt
	@$(BIN)/python -m venv $(VENV)/protos
	@$(VENV)/protos/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-protos.txt
	@touch $@
