# Every command of the project. `make demo` and `make test` set up whatever they need.
SHELL := /bin/bash
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v if v >= (3, 10) else "")')
$(if $(VERSION),,$(error PYTHON=$(PYTHON) is no Python 3.10 or newer))
# Each Python but the default has an environment of its own: PYTHON=python3.12 has .venv-3.12.
VENV := .venv$(if $(filter-out file,$(origin PYTHON)),-$(VERSION))
BIN := $(VENV)/bin

.PHONY: help install setup demo serve test test-fast test-real test-newest test-unlocked coverage lint format lock bench soak clean

help:
	@echo "make demo         run test_input.json on the emulator; saves an image in output/"
	@echo "make serve        serve the HTTP API on the emulator until Ctrl-C; API_PORT=8001 selects another port than 8000"
	@echo "make install      install worker, gateway and emulator into $(VENV)"
	@echo "make setup        install what the tests need, too"
	@echo "make format       format the code and apply safe fixes"
	@echo "make lint         ruff, mypy, import-linter, shellcheck, hadolint"
	@echo "make test-fast    run the unit tests: no processes, no network"
	@echo "make test         lint, type check and run all tests; PYTHON=python3.12 selects another Python, in .venv-3.12"
	@echo "make test-newest  run all tests with the newest versions within the bounds, not those of locks/"
	@echo "make test-real    run the tests that can use a real ComfyUI on the one at COMFYUI_URL"
	@echo "make coverage     run the unit tests and report coverage; TESTS=tests runs all tests"
	@echo "make bench        the measurements of docs/development/benchmarks.md except many streams; about ten minutes"
	@echo "make soak         break worker, gateways and a fleet at random; about 20 minutes; figures in output/"
	@echo "make lock         update locks/ after a change of requirements; UPGRADE=1 selects the newest versions"
	@echo "make clean        remove environments, caches and output/"

# A Debian or Ubuntu Python may come without venv: install it where that is allowed, say so where it is not.
$(BIN)/python:
	@echo "Making $(VENV) …"
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	  echo "python3 has no venv module: installing python3-venv"; \
	  $$([ "$$(id -u)" = 0 ] || echo sudo) sh -c 'apt-get update -qq && apt-get install -y -qq python3-venv' >/dev/null \
	    && $(PYTHON) -m venv $(VENV); } \
	  || { rm -rf $(VENV); echo "Install python3-venv (apt-get install python3-venv) and try again" >&2; exit 1; }

# pip installs uv, and uv all the rest, several packages at a time.
$(BIN)/uv: $(BIN)/python locks/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement locks/uv.txt
	@touch $@

# Every package comes from a lock, with its hash checked; setuptools, too, which builds this one.
# As pip does, uv trusts whom the machine trusts: a company's own proxy, say.
export UV_SYSTEM_CERTS ?= true
INSTALL = $(BIN)/uv pip install --python $(BIN)/python
define install
@$(INSTALL) --require-hashes --requirement $(1)
@$(INSTALL) --no-deps --no-build-isolation --editable .
endef

$(VENV)/.run-ready: $(BIN)/uv pyproject.toml requirements.txt locks/emulator.txt
	@echo "Installing worker, gateway and emulator into $(VENV) …"
	$(call install,locks/emulator.txt)
	@touch $@

$(VENV)/.dev-ready: $(BIN)/uv pyproject.toml requirements.txt locks/dev.txt
	@echo "Installing worker, gateway, emulator and what the tests need into $(VENV) …"
	$(call install,locks/dev.txt)
	@touch $@ $(VENV)/.run-ready

# RunPod's JavaScript SDK, which its tests play as it is; without Node they are skipped.
$(VENV)/.clients-ready: $(BIN)/python tests/data/clients/package.json tests/data/clients/package-lock.json
	@mkdir -p $(VENV)/clients
	@cp tests/data/clients/package.json tests/data/clients/package-lock.json $(VENV)/clients/
	@if command -v node >/dev/null && command -v npm >/dev/null; then \
	    npm ci --prefix $(VENV)/clients --ignore-scripts --no-audit --no-fund --silent; \
	  else echo "Without Node and npm the tests of RunPod's JavaScript SDK are skipped"; fi
	@touch $@

install: $(VENV)/.run-ready

setup: $(VENV)/.dev-ready $(VENV)/.clients-ready

# The emulator takes any free port.
ON_EMULATOR = COMFY_EMULATOR=true WORKER_PYTHON=$(BIN)/python COMFYUI_PORT=$$($(BIN)/python -c \
  'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')

demo: $(VENV)/.run-ready
	@$(ON_EMULATOR) ./start.sh

# Only this machine reaches it, so that it needs no key.
serve: $(VENV)/.run-ready
	@$(ON_EMULATOR) SERVE_API_LOCALLY=true API_HOST=$${API_HOST:-127.0.0.1} ./start.sh

# On Python 3.10 several libraries are older versions, with other types.
lint: $(VENV)/.dev-ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(if $(filter 3.10,$(VERSION)),echo "Types are checked on Python 3.11 or newer",$(BIN)/mypy)
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/shellcheck start.sh .ci/run
	@$(BIN)/hadolint Dockerfile

# One real ComfyUI has one queue: its tests take turns.
# The files run in the order of their folders: those with processes, which take longest, come first.
PYTEST = $(BIN)/python -m pytest -n $(if $(COMFYUI_URL),0,3) --dist loadfile --no-loadscope-reorder

test: lint $(VENV)/.clients-ready
	@$(PYTEST)

test-fast: $(VENV)/.dev-ready
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit

test-real:
	@test -n "$(COMFYUI_URL)" || { echo "Set COMFYUI_URL to the address of a running ComfyUI" >&2; exit 1; }
	@$(MAKE) --no-print-directory setup
	@$(PYTEST) -m real

coverage: $(VENV)/.dev-ready
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --cov --cov-report=term:skip-covered $(or $(TESTS),tests/unit)

format: $(VENV)/.dev-ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test-newest:
	@$(MAKE) --no-print-directory VENV=$(VENV)-newest test-unlocked

test-unlocked: $(BIN)/uv $(VENV)/.clients-ready
	@$(INSTALL) --upgrade --editable '.[dev]'
	@$(PYTEST)

# Universal locks: each serves every Python from 3.10 on. All have the versions of dev's.
COMPILE = UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip compile --quiet --python $(BIN)/python --universal --python-version 3.10 \
  --generate-hashes --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)
PART = $(COMPILE) --no-annotate --constraint locks/dev.txt --group build pyproject.toml

lock: $(BIN)/uv
	@$(COMPILE) --group uv --output-file locks/uv.txt
	@$(COMPILE) --group build pyproject.toml --extra dev --output-file locks/dev.txt
	@$(PART) --extra emulator --output-file locks/emulator.txt
	@$(PART) --extra fleet --output-file locks/fleet.txt
	@$(PART) --output-file locks/worker.txt

bench: $(VENV)/.dev-ready
	@for name in overhead throughput cold_start staging delivery gateway scale; do \
	  echo; echo "== $$name"; $(BIN)/python -m benchmarks.$$name || failed=1; done; exit $${failed:-0}

soak: $(VENV)/.dev-ready
	@$(BIN)/python -m benchmarks.soak
	@$(BIN)/python -m benchmarks.gateway_kill
	@$(BIN)/python -m benchmarks.fleet_chaos

clean:
	rm -rf .venv .venv-* output .pytest_cache .mypy_cache .ruff_cache .hypothesis
