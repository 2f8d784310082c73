# Bare `make` lists the targets. Everything runs from .venv, which `make setup` fills once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell cat requirements/torch.constraint)
# The stamp names what was installed: a changed pin re-installs, anything else does not.
STAMP := $(VENV)/.installed-$(shell cat requirements/dev.txt requirements/torch.constraint | cksum | cut -d' ' -f1)

.PHONY: help setup demo test test-all chaos lint bench-prep clean

help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## install everything that demo and tests need into .venv (CPU build of torch, no CUDA)

# dev.txt names all there is to install but torch, so nothing is resolved. torch's CPU wheel comes from pip's own
# sources where these hold one, else from PyTorch's CPU index, which uv knows by name.
$(STAMP): requirements/dev.txt requirements/torch.constraint
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s; set PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	@echo "setting up $(VENV) (once; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)+cpu" 2>/dev/null \
	  || { $(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend=cpu "$(TORCH)"; }
	@rm -f $(VENV)/.installed-*; touch $@

demo: $(STAMP) ## the whole pipeline on this machine: prepare, train, kill, resume, report (about 4 minutes)
	@$(BIN)/python -m demo.run

test: $(STAMP) ## the fast tests
	@$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu and not image and not lab'

test-all: $(STAMP) ## all tests that need no GPU
	@$(BIN)/python -m pytest -n 2 -m 'not gpu and not image and not lab'

chaos: $(STAMP) ## one training run under 100 random kills, compared bit by bit with a quiet one (KILLS=100)
	@$(BIN)/python -m tests.chaos --kills=$(or $(KILLS),100)

lint: $(STAMP) ## ruff and shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/shellcheck .ci/run requirements/compile.sh launch/container.sh

include launch/targets.mk

bench-prep: $(STAMP) ## data preparation against the usual scripts, end to end (fetches 140 MB of text; 10 minutes)
	@mkdir -p .bench && $(BIN)/python -m bench.prep --scratch=.bench --encode --larger --out=bench/results/$$(date +%F)-prep.json

clean: ## remove the virtual environment and what demo and benchmarks left
	rm -rf $(VENV) .demo .bench
