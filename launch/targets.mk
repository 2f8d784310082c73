# Launching on rented machines. Settings are variables: BUCKET=… RUN=… CONFIG=… MAX_USD=…, or any of a task's envs.
# GPUS=NAME:COUNT, NODES=NUMBER and INFRA=CLOUD choose other machines than the task's. NO_CHECK=1 skips the checks that
# cost nothing. MANAGED=1 makes a managed job of any task, which continues by itself after a preemption.
# Each target prints the sky command that it runs. SkyPilot has an environment of its own, because it shares few versions
# with training, and the tests of training must not need it.
LAUNCH_VENV ?= .venv-launch
# A command that runs each program, such as one that enters another network. Empty: none.
LAUNCH_PREFIX ?=
LAUNCH_PYTHON := $(LAUNCH_PREFIX) $(LAUNCH_VENV)/bin/python
MACHINES = $(if $(value GPUS),--gpus $(call typed,GPUS)) $(if $(value NODES),--num-nodes $(call typed,NODES)) \
  $(if $(value INFRA),--infra $(call typed,INFRA))
OPTIONS := $(if $(value NO_CHECK),--no-check)
LAUNCH_STAMP := $(LAUNCH_VENV)/$(call stamp,launch)
TASK ?= pretrain-8xa100

##@ Before the first launch

setup-launch: $(LAUNCH_STAMP) ## install SkyPilot and what launching needs into .venv-launch

$(LAUNCH_STAMP): requirements/launch.txt requirements/setup.sh
	@echo "setting up $(LAUNCH_VENV) (once; about a minute)"
	@$(SETUP) launch "$(LAUNCH_VENV)"
	@rm -f $(LAUNCH_VENV)/.installed-*; touch $@

role: $(LAUNCH_STAMP) ## an IAM role for the nodes on AWS, limited to BUCKET's runs and data, so that they need no key (UNDO=1)
	@$(LAUNCH_PYTHON) -m launch.role $(if $(UNDO),--undo)

# A plan needs no SkyPilot, only the prices that SkyPilot keeps on this machine.
PLAN_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),$(LAUNCH_STAMP))

CONSTRAINTS = $(if $(value GPUS),--gpus=$(call typed,GPUS)) $(if $(value DEADLINE),--deadline=$(call typed,DEADLINE)) \
  $(if $(value ON_DEMAND),--on-demand) $(if $(value SIZE),--size=$(call typed,SIZE))

##@ What a sum of dollars buys

plan: $(PLAN_STAMP) ## the best model for USD=20, all in: machine, size, tokens, and what to type (GPUS=…, SIZE=350M, DEADLINE=6h)
	@$(dir $(PLAN_STAMP))bin/python cost_report.py plan --usd=$(call typed,USD) $(CONSTRAINTS)

prices: $(LAUNCH_STAMP) ## renew the price snapshot from the catalogs that SkyPilot keeps here, and show what changed (DRY_RUN=1)
	@$(LAUNCH_PYTHON) -m launch.prices $(if $(value DRY_RUN),--dry-run)

run: $(LAUNCH_STAMP) ## the best plan for USD=20, under one cap: tokens, training, evaluation, export (ADD_USD=10 RUN=…: more)
	@$(LAUNCH_PYTHON) -m launch.run $(if $(value ADD_USD),--add-usd=$(call typed,ADD_USD),--usd=$(call typed,USD)) \
	  $(CONSTRAINTS) $(OPTIONS)

##@ Train on rented machines: BUCKET=… RUN=… GPUS=NAME:COUNT INFRA=CLOUD NODES=… CONFIG=… MAX_USD=…

check: $(LAUNCH_STAMP) ## before anything costs money: credentials, quotas, bucket, image, config, prices (TASK=…)
	@$(LAUNCH_PYTHON) -m launch.check sky/$(call typed,TASK).yaml $(MACHINES)

# SOURCE= says that the data is prepared on this computer.
ifneq ($(value SOURCE),)
prep-data: $(STAMP)
	@$(BIN)/python -m launch.here prep

fetch-data: $(STAMP)
	@$(BIN)/python -m launch.here fetch
else
prep-data: $(LAUNCH_STAMP) ## FineWeb-Edu 10BT to token shards in BUCKET, on cheap CPU nodes (NODES=1); SOURCE=file.txt: here
	@$(LAUNCH_PYTHON) -m launch.submit sky/prep-data.yaml $(OPTIONS) $(MACHINES)

fetch-data: $(LAUNCH_STAMP) ## the same text as shards that others have tokenized; SOURCE=FILES.bin: here
	@$(LAUNCH_PYTHON) -m launch.submit sky/fetch-data.yaml $(OPTIONS) $(MACHINES)
endif

train: $(STAMP) ## CONFIG on all GPUs of this computer, or on its CPU (DATA=, RUN=, USD_PER_HOUR=0.40, TRAIN_ARGS=)
	@$(BIN)/python -m launch.here train

pretrain: $(LAUNCH_STAMP) ## GPT-2 124M on 8 A100 on demand, or on GPUS=A100:2, NODES=2, …
	@$(LAUNCH_PYTHON) -m launch.submit sky/$(call typed,TASK).yaml $(OPTIONS) $(MACHINES)

pretrain-spot: $(LAUNCH_STAMP) ## the same on spot machines, as a managed job that recovers from preemptions
	@$(LAUNCH_PYTHON) -m launch.submit sky/pretrain-8xa100-spot.yaml $(OPTIONS) $(MACHINES)

smoke: TASK := $(if $(filter command,$(origin TASK)),$(value TASK),smoke-cpu)
smoke: $(LAUNCH_STAMP) ## the cheapest end-to-end test (TASK=smoke-gpu: on a GPU)
	@$(LAUNCH_PYTHON) -m launch.submit sky/$(call typed,TASK).yaml $(OPTIONS) $(MACHINES)

anneal: $(LAUNCH_STAMP) ## begin the cooldown of RUN now (optimizer.schedule=wsd); its trunk stays, to go on from
	@$(LAUNCH_PYTHON) -m launch.anneal sky/$(call typed,TASK).yaml

##@ After training

finetune: $(LAUNCH_STAMP) ## tune START=run on the conversations stored beside DATA, on one small GPU, as the run RUN=chat
	@$(LAUNCH_PYTHON) -m launch.submit sky/finetune.yaml $(OPTIONS) $(MACHINES)

dpo: $(LAUNCH_STAMP) ## align START=run with the pairs of answers stored beside DATA, on one small GPU, as the run RUN=dpo
	@$(LAUNCH_PYTHON) -m launch.submit sky/dpo.yaml $(OPTIONS) $(MACHINES)

synthesize: $(LAUNCH_STAMP) ## rows for finetune from an endpoint: PROMPTS=url ENDPOINT_MODEL=name LICENCE=terms SYNTH_ARGS=…
	@$(LAUNCH_PYTHON) -m launch.submit sky/synthesize.yaml $(OPTIONS) $(MACHINES)

distil: $(LAUNCH_STAMP) ## train a small model on the distribution of TEACHER=gpt2-medium, as the run RUN=distilled
	@$(LAUNCH_PYTHON) -m launch.submit sky/distil.yaml $(OPTIONS) $(MACHINES)

evaluate: $(LAUNCH_STAMP) ## perplexity and HellaSwag of RUN's newest checkpoint, on one small GPU (EVAL_ARGS=…)
	@$(LAUNCH_PYTHON) -m launch.submit sky/evaluate.yaml $(OPTIONS) $(MACHINES)

export: $(LAUNCH_STAMP) ## RUN as a folder for other programs, below its own (EXPORT_ARGS=--format=gguf, --publish=hf:OWNER/NAME)
	@$(LAUNCH_PYTHON) -m launch.submit sky/export.yaml $(OPTIONS) $(MACHINES)

serve: $(LAUNCH_STAMP) ## RUN behind SERVE_API_KEY, OpenAI-compatible, on one small GPU, until it is idle or MAX_USD is spent
	@$(LAUNCH_PYTHON) -m launch.submit sky/serve.yaml $(OPTIONS) $(MACHINES)

chat: $(STAMP) ## talk to RUN's newest checkpoint in BUCKET, or to MODEL=…, on this computer (CHAT_ARGS=…)
	@$(BIN)/python -m launch.chat

##@ See what runs, and end it

status: $(LAUNCH_STAMP) ## clusters, managed jobs, machines that the clouds list, dollars of RUN
	@$(LAUNCH_PYTHON) -m launch.runs status sky/$(call typed,TASK).yaml

logs: $(LAUNCH_STAMP) ## output of what was launched last, or of TASK; FROM=bucket: all output of RUN, preempted machines included
	@$(LAUNCH_PYTHON) -m launch.runs logs $(if $(filter bucket,$(value FROM)),--stored sky/$(call typed,TASK).yaml,\
	  $(if $(filter file,$(origin TASK)),,sky/$(call typed,TASK).yaml))

pull: $(LAUNCH_STAMP) ## metrics, samples, ledger, logs and newest checkpoint of RUN to pulled/
	@$(LAUNCH_PYTHON) -m launch.runs pull sky/$(call typed,TASK).yaml

# `down` is an emergency: any version of SkyPilot will do.
$(LAUNCH_VENV)/bin/sky:
	@$(MAKE) --no-print-directory setup-launch

down: | $(LAUNCH_VENV)/bin/sky ## end what you have up of this project, and ask the clouds whether anything is left (YES=1, ALL=1)
	@$(LAUNCH_PYTHON) -m launch.down --down

watch: $(LAUNCH_STAMP) ## until Ctrl-C: end machines of yours whose launch died before they had autostop (SWITCH_MINUTES=30)
	@$(LAUNCH_PYTHON) -m launch.watch

##@ Images

image: $(LAUNCH_STAMP) ## build the images for both platforms on cheap nodes and push them to IMAGE=registry/name:tag
	@$(LAUNCH_PYTHON) -m launch.submit sky/build-image.yaml $(OPTIONS)
	@$(LAUNCH_PYTHON) -m launch.submit sky/build-image.yaml $(OPTIONS) --cluster build-image-arm64 --instance-type c7g.4xlarge

##@ Tests of launching, for work on the code

test-sky: $(LAUNCH_STAMP) $(STAMP) ## the task files against SkyPilot's own loader and optimizer
	@SKY_PYTHON=$(LAUNCH_VENV)/bin/python $(BIN)/python -m pytest tests/test_sky.py tests/test_sky_loader.py

test-launch: $(LAUNCH_STAMP) $(STAMP) ## launch the tasks for real on an emulated cloud (LAB_DIR=…; skipped without one)
	@$(BIN)/python -m pytest -m lab -s tests/test_launch_lab.py tests/test_run_lab.py

test-image: $(STAMP) ## lint the Dockerfile, build both images (CPU build of torch) and run their self-tests (needs root)
	@$(BIN)/python -m pytest -m image -s tests/test_image.py
