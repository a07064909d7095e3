# Every command of the project. `make demo` and `make test` set up whatever they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test lint bench soak clean

help:
	@echo "make demo    run test_input.json on the embedded emulator; the picture lands in output/"
	@echo "make test    lint, type check and run all tests"
	@echo "make lint    ruff, mypy, shellcheck, hadolint"
	@echo "make bench   measure everything that docs/benchmarks.md tells of, about ten minutes"
	@echo "make soak    2,000 jobs while everything goes wrong, then gateways and a fleet, about 20 minutes; output/ gets the figures"
	@echo "make setup   only install (into $(VENV))"

# A Debian or Ubuntu Python may come without venv: install it where that is allowed, say so where it is not.
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	  echo "python3 has no venv module: installing python3-venv"; \
	  $$([ "$$(id -u)" = 0 ] || echo sudo) sh -c 'apt-get update -qq && apt-get install -y -qq python3-venv' >/dev/null \
	    && $(PYTHON) -m venv $(VENV); } \
	  || { rm -rf $(VENV); echo "Install python3-venv (apt-get install python3-venv) and try again" >&2; exit 1; }

$(VENV)/.run-ready: $(BIN)/python pyproject.toml requirements.txt
	@echo "Installing the worker and its emulator into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[emulator]'
	@touch $@

$(VENV)/.dev-ready: $(BIN)/python pyproject.toml requirements.txt
	@echo "Installing the worker, its emulator and what its tests need into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.run-ready

# RunPod's JavaScript SDK, which its tests play as it is; without Node they are skipped.
$(VENV)/.clients-ready: $(BIN)/python tests/data/clients/package.json tests/data/clients/package-lock.json
	@mkdir -p $(VENV)/clients
	@cp tests/data/clients/package.json tests/data/clients/package-lock.json $(VENV)/clients/
	@if command -v node >/dev/null && command -v npm >/dev/null; then \
	    npm ci --prefix $(VENV)/clients --ignore-scripts --no-audit --no-fund --silent; \
	  else echo "Without Node and npm the tests of RunPod's JavaScript SDK are skipped"; fi
	@touch $@

setup: $(VENV)/.dev-ready $(VENV)/.clients-ready

demo: $(VENV)/.run-ready
	@port=$$($(BIN)/python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'); \
	  COMFY_EMULATOR=true COMFYUI_PORT=$$port WORKER_PYTHON=$(BIN)/python ./start.sh

lint: $(VENV)/.dev-ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck start.sh .ci/run
	@$(BIN)/hadolint Dockerfile

# One real ComfyUI has one queue: its tests take turns.
test: lint $(VENV)/.clients-ready
	@$(BIN)/python -m pytest -n $(if $(COMFYUI_URL),0,3) --dist loadfile

bench: $(VENV)/.dev-ready
	@for name in overhead throughput cold_start staging delivery gateway scale; do \
	  echo; echo "== $$name"; $(BIN)/python -m benchmarks.$$name || failed=1; done; exit $${failed:-0}

soak: $(VENV)/.dev-ready
	@$(BIN)/python -m benchmarks.soak
	@$(BIN)/python -m benchmarks.gateway_kill
	@$(BIN)/python -m benchmarks.fleet_chaos

clean:
	rm -rf $(VENV) output .pytest_cache .mypy_cache .ruff_cache .hypothesis
