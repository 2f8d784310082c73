# `make` without a target lists the targets. requirements/setup.sh fills the environments once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# A variable's value as one word of the shell, as it was typed: neither make nor the shell runs anything in it.
typed = '$(subst ','\'',$(value $1))'
# What stands on make's command line shows in the list of processes.
secret = $(filter %PASSWORD %SECRET %_TOKEN %_KEY %_KEY_ID MLFLOW_TRACKING_URI,$(.VARIABLES))
$(foreach name,$(secret),$(if $(filter command,$(origin $(name))),$(error \
  $(name) on make's command line shows in the list of processes; put it into .env, or into the environment)))

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := PYTHON="$(PYTHON)" requirements/setup.sh
# A stamp identifies the installed pins, so that only a changed pin installs again.
stamp = .installed-$(shell cat requirements/$1.txt requirements/torch* requirements/uv.txt | cksum | cut -d' ' -f1)
# `make setup GPU=1` takes torch's CUDA build. Later calls keep it, `make setup GPU=` goes back.
GPU ?= $(if $(wildcard $(VENV)/.gpu),1)
STAMP := $(VENV)/$(call stamp,dev)$(if $(GPU),-$(call stamp,train-cuda))
# The demo needs a tenth of the packages. It uses the complete environment if that exists.
DEMO_VENV := $(if $(wildcard $(STAMP)),$(VENV),.venv-demo)
DEMO_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO_VENV)/$(call stamp,demo))

# Every target with a help text is a command, whatever files are here.
.PHONY: help $(shell sed -nE 's/^([a-z][a-z-]*):.* \#\# .*/\1/p' Makefile launch/targets.mk)

# A line `##@ TITLE` begins a group of targets. Those for work on the code are listed last.
help:
	@awk -F ':.*## ' '/^##@ / {late = /code$$/; line = "\n" substr($$0, 5) "\n"} \
	  /^[a-z][a-z-]*:.*## / {line = sprintf("  make %-14s %s\n", $$1, $$2)} \
	  {if (late) last = last line; else printf "%s", line; line = ""} END {printf "%s", last}' Makefile launch/targets.mk

##@ On this computer

setup: $(STAMP) ## install everything that demo and tests need into .venv (CPU build of torch; GPU=1: with CUDA)

$(STAMP): requirements/dev.txt requirements/torch-cpu.txt requirements/train-cuda.txt requirements/setup.sh
	@echo "setting up $(VENV) (once; about a minute)"
	@$(SETUP) dev "$(VENV)" $(if $(GPU),cuda,torch)
	@rm -f $(VENV)/.installed-* $(VENV)/.gpu; touch $@ $(if $(GPU),$(VENV)/.gpu)

.venv-demo/%: requirements/demo.txt requirements/torch-cpu.txt requirements/setup.sh
	@echo "setting up .venv-demo (once; about a minute)"
	@$(SETUP) demo .venv-demo torch
	@PYTHONDONTWRITEBYTECODE= .venv-demo/bin/python -c "import torch" # writes bytecode, so that no rank compiles it
	@rm -f .venv-demo/.installed-*; touch $@

demo: $(DEMO_STAMP) ## the whole pipeline on this machine: prepare, train, kill, resume, report (2 to 3 minutes)
	@$(DEMO_VENV)/bin/python -m demo.run

##@ To work on the code

# Three workers for two cores, since tests wait for programs; a file goes to one worker, the longest files first.
WORKERS := -n 3 --dist=loadfile --no-loadscope-reorder
# Bytecode is written, so that not every worker and every program that a test starts compiles our code.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(WORKERS)

test: $(STAMP) ## the fast tests
	@$(PYTEST) -m 'not slow and not gpu and not image and not lab'

test-all: $(STAMP) ## all tests that need no GPU
	@$(PYTEST) -m 'not gpu and not image and not lab'

test-slow: $(STAMP) ## the tests that `make test` leaves out, without those that need a GPU
	@$(PYTEST) -m 'slow and not gpu and not image and not lab'

COVERAGE_STAMP := .venv-coverage/$(call stamp,coverage)

$(COVERAGE_STAMP): requirements/coverage.txt requirements/setup.sh
	@$(SETUP) coverage .venv-coverage
	@rm -f .venv-coverage/.installed-*; touch $@

coverage: $(STAMP) $(COVERAGE_STAMP) ## lines that the fast tests reach, per package, in all processes
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m tests.covered "$$(.venv-coverage/bin/python -c 'import site; print(site.getsitepackages()[0])')" \
	  $(WORKERS) -m 'not slow and not gpu and not image and not lab'

chaos: $(STAMP) ## one training run under 100 random kills, compared bit by bit with a quiet one (KILLS=100)
	@$(BIN)/python -m tests.chaos --kills=$(if $(value KILLS),$(call typed,KILLS),100)

lint: $(STAMP) ## ruff and shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/shellcheck .ci/run requirements/*.sh launch/node/container.sh tests/conditions.sh

DOCS_STAMP := .venv-docs/$(call stamp,docs)

$(DOCS_STAMP): requirements/docs.txt requirements/setup.sh
	@$(SETUP) docs .venv-docs
	@rm -f .venv-docs/.installed-*; touch $@

docs: $(DOCS_STAMP) ## the documents as a site in site/; a broken link is an error
	@NO_COLOR=1 .venv-docs/bin/zensical build --strict

include launch/targets.mk

bench-prep: $(STAMP) ## data preparation against the usual scripts, end to end (fetches 140 MB of text; 10 minutes)
	@mkdir -p .bench && $(BIN)/python -m bench.prep --scratch=.bench --encode --larger --out=bench/results/$$(date +%F)-prep.json

clean: ## remove the virtual environments and what demo and benchmarks left
	rm -rf $(call typed,VENV) .venv-coverage .venv-demo .venv-docs .venv-launch .demo .bench .azurite site
