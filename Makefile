# `make` without a target lists the targets. requirements/setup.sh fills the environments once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The value of a variable as one quoted word: neither make nor the shell executes anything in it.
typed = '$(subst ','\'',$(value $1))'
# Values on make's command line are visible in the list of processes.
secret = $(filter %PASSWORD %SECRET %_TOKEN %_KEY %_KEY_ID MLFLOW_TRACKING_URI,$(.VARIABLES))
$(foreach name,$(secret),$(if $(filter command,$(origin $(name))),$(error \
  $(name) on make's command line shows in the list of processes; put it into .env, or into the environment)))

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := PYTHON="$(PYTHON)" requirements/setup.sh
# A stamp identifies the installed pins, so that only a changed pin installs again.
stamp = .installed-$(shell cat requirements/$1.txt requirements/torch* requirements/uv.txt | cksum | cut -d' ' -f1)
# `make setup GPU=1` installs torch with CUDA. Later calls keep that build; `make setup GPU=` returns to the CPU build.
GPU ?= $(if $(wildcard $(VENV)/.gpu),1)
STAMP := $(VENV)/$(call stamp,dev)$(if $(GPU),-$(call stamp,train-cuda))
# The demo needs a tenth of the packages. It uses the complete environment if it exists.
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

setup: $(STAMP) ## install everything for demo, training and tests into .venv (GPU=1: with torch for CUDA)

$(STAMP): requirements/dev.txt requirements/torch-cpu.txt requirements/train-cuda.txt requirements/setup.sh
	@echo "setting up $(VENV) (once; about a minute)"
	@$(SETUP) dev "$(VENV)" $(if $(GPU),cuda,torch)
	@rm -f $(VENV)/.installed-* $(VENV)/.gpu; touch $@ $(if $(GPU),$(VENV)/.gpu)

.venv-demo/%: requirements/demo.txt requirements/torch-cpu.txt requirements/setup.sh
	@echo "setting up .venv-demo (once; about a minute)"
	@$(SETUP) demo .venv-demo torch
	@PYTHONDONTWRITEBYTECODE= .venv-demo/bin/python -c "import torch" # writes bytecode, so that no rank compiles it
	@rm -f .venv-demo/.installed-*; touch $@

demo: $(DEMO_STAMP) ## prepare, train, kill, resume and report on this computer (2 to 3 minutes)
	@$(DEMO_VENV)/bin/python -m demo.run

##@ To work on the code

# Three workers use two cores, because tests wait for programs. Each file goes to one worker, the longest files first.
WORKERS := -n 3 --dist=loadfile --no-loadscope-reorder
# Python writes bytecode, so that workers and the programs of tests do not each compile our code.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(WORKERS)

test: $(STAMP) ## run the fast tests
	@$(PYTEST) -m 'not slow and not gpu and not image and not lab'

test-all: $(STAMP) ## run all tests that need no GPU
	@$(PYTEST) -m 'not gpu and not image and not lab'

test-slow: $(STAMP) ## run the slow tests, which `make test` leaves out (without those that need a GPU) (without those that need a GPU)
	@$(PYTEST) -m 'slow and not gpu and not image and not lab'

COVERAGE_STAMP := .venv-coverage/$(call stamp,coverage)

$(COVERAGE_STAMP): requirements/coverage.txt requirements/setup.sh
	@$(SETUP) coverage .venv-coverage
	@rm -f .venv-coverage/.installed-*; touch $@

coverage: $(STAMP) $(COVERAGE_STAMP) ## measure the lines that the fast tests reach, per package and in all processes
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m tests.covered "$$(.venv-coverage/bin/python -c 'import site; print(site.getsitepackages()[0])')" \
	  $(WORKERS) -m 'not slow and not gpu and not image and not lab'

chaos: $(STAMP) ## kill one training run 100 times (KILLS=100), and compare its weights with those of an undisturbed run
	@$(BIN)/python -m tests.chaos --kills=$(if $(value KILLS),$(call typed,KILLS),100)

lint: $(STAMP) ## run ruff and shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/shellcheck .ci/run requirements/*.sh launch/node/container.sh tests/conditions.sh

DOCS_STAMP := .venv-docs/$(call stamp,docs)

$(DOCS_STAMP): requirements/docs.txt requirements/setup.sh
	@$(SETUP) docs .venv-docs
	@rm -f .venv-docs/.installed-*; touch $@

docs: $(DOCS_STAMP) ## build the documents as a site in site/; a broken link is an error
	@NO_COLOR=1 .venv-docs/bin/zensical build --strict

include launch/targets.mk

bench-prep: $(STAMP) ## compare data preparation with commonly used scripts (downloads 140 MB of text; 10 minutes)
	@mkdir -p .bench && $(BIN)/python -m bench.prep --scratch=.bench --encode --larger --out=bench/results/$$(date +%F)-prep.json

clean: ## delete the virtual environments and the files of demo and benchmarks
	rm -rf $(call typed,VENV) .venv-coverage .venv-demo .venv-docs .venv-launch .demo .bench .azurite site
