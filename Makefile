# Two commands on a fresh machine: `make run` and `make test`. Each sets up what it needs in `.venv`.
#
#   PYTHON=python3.12     the interpreter to build the environment with (3.11 or newer)
#   TORCH_INDEX=URL       a package index of your own to take torch from
#   MODEL=folder-or-hub-id   what `make run` serves
#   HTTP_PORT=9100           port of its status page, instead of any that is free

PYTHON ?= python3
MODEL ?= smollm2
HTTP_PORT ?= -1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# What is tested with tools that are no Python packages brings them into the environment itself.
TOOLS := $(VENV)/protos/.ready $(VENV)/helm-bin/helm $(VENV)/chromium/chromium $(VENV)/prometheus/promtool

.DEFAULT_GOAL := help
.PHONY: help run test soak check format protos protos-baseline pictures setup tools clean

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

run: $(VENV)/.ready  ## Start everything here, stream a sample answer, serve until Ctrl-C
	@$(BIN)/paceline serve $(MODEL) --demo --http-port $(HTTP_PORT)

# One process more than there are cores, as many tests wait for others; each with one model thread, because threads
# that spin at barriers would starve the rest.
test: $(VENV)/.ready-dev $(TOOLS)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $$($(BIN)/python -c 'import os; print(min(8, os.cpu_count() + 1))') --dist worksteal

soak: $(VENV)/.ready-dev  ## Break everything for minutes while clients read; SOAK="--requests 5000 --seed 7" says how
	PACELINE_CHAOS_LONG=1 $(BIN)/python -m pytest tests/chaos --deselect tests/chaos/test_soak.py
	$(BIN)/python -m tests.chaos.soak $(SOAK)

check: $(VENV)/.ready-dev  ## Lint, format check, types, import directions, protos against the last release
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/baseline/*.binpb
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_import_directions.py

format: $(VENV)/.ready-dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/protos/.ready  ## Generate the stubs from protos/
	$(VENV)/protos/bin/python protos/generate.py client

protos-baseline: $(VENV)/.ready-dev  ## Hold later protos to these ones: when a release is tagged (protos/buf.yaml)
	rm -f protos/baseline/*.binpb
	version=$$($(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])'); \
		$(BIN)/buf build protos --exclude-source-info -o protos/baseline/$$version.binpb

pictures: $(VENV)/.ready-dev $(VENV)/chromium/chromium  ## Take the pictures of a running service in docs/images again
	PYTHONPATH=. $(BIN)/python docs/images/take_pictures.py

setup: $(VENV)/.ready-dev  ## Only set up the environment

tools: $(TOOLS)

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

$(VENV)/.ready-dev: $(VENV)/constraints.txt pyproject.toml client/pyproject.toml
	@$(PIP) -c $(VENV)/constraints.txt -e client -e '.[all,dev]'
	@touch $(VENV)/.ready $@

$(VENV)/protos/.ready: requirements-protos.txt $(VENV)/constraints.txt
	@$(BIN)/python -m venv $(VENV)/protos
	@$(VENV)/protos/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-protos.txt
	@touch $@

# Where it cannot be had, that is said, and the tests of the chart are skipped.
$(VENV)/helm-bin/helm: tests/deploy/get_helm.py
	@$(PYTHON) tests/deploy/get_helm.py $@ || true

# Likewise, for the tests of the status page.
$(VENV)/chromium/chromium: tests/browser/get_chromium.py
	@$(PYTHON) tests/browser/get_chromium.py $(VENV)/chromium || true

# The same: Debian's Prometheus, unpacked and not installed, for the tests of rules and dashboards.
$(VENV)/prometheus/promtool: tests/observability/get_prometheus.py
	@$(PYTHON) tests/observability/get_prometheus.py $(VENV)/prometheus || true
