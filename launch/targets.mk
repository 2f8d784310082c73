# Launching on rented machines. Settings are variables: BUCKET=… RUN=… CONFIG=… MAX_USD=…, or any of a task's envs.
# GPUS=NAME:COUNT, NODES=NUMBER and INFRA=CLOUD replace the machines of the task. NO_CHECK=1 skips the free checks before a
# launch. MANAGED=1 launches any task as a managed job, which continues automatically after a preemption.
# Each target prints the sky command that it runs. SkyPilot is in a separate environment: it needs other versions of many
# packages than training, and the tests of training must work without SkyPilot.
LAUNCH_VENV ?= .venv-launch
# A command put before each program, for example to enter another network. Empty: none.
LAUNCH_PREFIX ?=
LAUNCH_PYTHON := $(LAUNCH_PREFIX) $(LAUNCH_VENV)/bin/python
MACHINES = $(if $(value GPUS),--gpus $(call typed,GPUS)) $(if $(value NODES),--num-nodes $(call typed,NODES)) \
  $(if $(value INFRA),--infra $(call typed,INFRA))
OPTIONS := $(if $(value NO_CHECK),--no-check)
LAUNCH_STAMP := $(LAUNCH_VENV)/$(call stamp,launch)
TASK ?= pretrain-8xa100

##@ Before the first launch

setup-launch: $(LAUNCH_STAMP) ## install SkyPilot and the other packages for launching into .venv-launch

$(LAUNCH_STAMP): requirements/launch.txt requirements/setup.sh
	@echo "setting up $(LAUNCH_VENV) (once; about a minute)"
	@$(SETUP) launch "$(LAUNCH_VENV)"
	@rm -f $(LAUNCH_VENV)/.installed-*; touch $@

role: $(LAUNCH_STAMP) ## create an AWS role with which machines open BUCKET without a key (UNDO=1 deletes the role)
	@$(LAUNCH_PYTHON) -m launch.role $(if $(UNDO),--undo)

# A plan needs prices, but not SkyPilot, so the environment of training is enough.
PLAN_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),$(LAUNCH_STAMP))

CONSTRAINTS = $(if $(value GPUS),--gpus=$(call typed,GPUS)) $(if $(value DEADLINE),--deadline=$(call typed,DEADLINE)) \
  $(if $(value ON_DEMAND),--on-demand) $(if $(value SIZE),--size=$(call typed,SIZE)) \
  $(if $(value CLOUD),--cloud=$(call typed,CLOUD))

##@ Spend a sum of dollars

plan: $(PLAN_STAMP) ## show the best model, machine and tokens for USD=20; rents nothing (GPUS=…, SIZE=350M, CLOUD=lambda, DEADLINE=6h)
	@$(dir $(PLAN_STAMP))bin/python cost_report.py plan --usd=$(call typed,USD) $(CONSTRAINTS)

prices: $(LAUNCH_STAMP) ## update the price snapshot from SkyPilot's catalogs, and show the changes (DRY_RUN=1: show only)
	@$(LAUNCH_PYTHON) -m launch.prices $(if $(value DRY_RUN),--dry-run)

run: $(LAUNCH_STAMP) ## carry out the best plan for USD=20: prepare, train, evaluate, export (ADD_USD=10 RUN=… adds money)
	@$(LAUNCH_PYTHON) -m launch.run $(if $(value ADD_USD),--add-usd=$(call typed,ADD_USD),--usd=$(call typed,USD)) \
	  $(CONSTRAINTS) $(OPTIONS)

##@ Train on rented machines: BUCKET=… RUN=… GPUS=NAME:COUNT INFRA=CLOUD NODES=… CONFIG=… MAX_USD=…

check: $(LAUNCH_STAMP) ## check credentials, quotas, bucket, image, config and prices for a launch; rents nothing (TASK=…)
	@$(LAUNCH_PYTHON) -m launch.check sky/$(call typed,TASK).yaml $(MACHINES)

# SOURCE= says that the data is prepared on this computer.
ifneq ($(value SOURCE),)
prep-data: $(STAMP)
	@$(BIN)/python -m launch.here prep

fetch-data: $(STAMP)
	@$(BIN)/python -m launch.here fetch
else
prep-data: $(LAUNCH_STAMP) ## tokenize FineWeb-Edu 10BT into BUCKET on a rented CPU machine, or SOURCE=file.txt on this computer
	@$(LAUNCH_PYTHON) -m launch.submit sky/prep-data.yaml $(OPTIONS) $(MACHINES)

fetch-data: $(LAUNCH_STAMP) ## copy published shards of FineWeb-Edu into BUCKET, or import SOURCE=FILES.bin on this computer
	@$(LAUNCH_PYTHON) -m launch.submit sky/fetch-data.yaml $(OPTIONS) $(MACHINES)
endif

train: $(STAMP) ## train CONFIG on the GPUs or the CPU of this computer (DATA=, RUN=, USD_PER_HOUR=0.40, TRAIN_ARGS=)
	@$(BIN)/python -m launch.here train

pretrain: $(LAUNCH_STAMP) ## train GPT-2 124M on 8 A100 on demand, or on other machines (GPUS=A100:2, NODES=2, …)
	@$(LAUNCH_PYTHON) -m launch.submit sky/$(call typed,TASK).yaml $(OPTIONS) $(MACHINES)

pretrain-spot: $(LAUNCH_STAMP) ## train GPT-2 124M on 8 A100 spot, as a managed job that continues after preemptions
	@$(LAUNCH_PYTHON) -m launch.submit sky/pretrain-8xa100-spot.yaml $(OPTIONS) $(MACHINES)

smoke: TASK := $(if $(filter command,$(origin TASK)),$(value TASK),smoke-cpu)
smoke: $(LAUNCH_STAMP) ## test preparation, training and report on one cheap CPU machine (TASK=smoke-gpu: on one GPU)
	@$(LAUNCH_PYTHON) -m launch.submit sky/$(call typed,TASK).yaml $(OPTIONS) $(MACHINES)

anneal: $(LAUNCH_STAMP) ## begin to lower the learning rate of RUN now (for optimizer.schedule=wsd)
	@$(LAUNCH_PYTHON) -m launch.anneal sky/$(call typed,TASK).yaml

##@ After training

finetune: $(LAUNCH_STAMP) ## fine-tune the model START on the conversations in DATA, on one small GPU, as run RUN=chat
	@$(LAUNCH_PYTHON) -m launch.submit sky/finetune.yaml $(OPTIONS) $(MACHINES)

dpo: $(LAUNCH_STAMP) ## tune the model START on the pairs of answers in DATA, on one small GPU, as run RUN=dpo
	@$(LAUNCH_PYTHON) -m launch.submit sky/dpo.yaml $(OPTIONS) $(MACHINES)

synthesize: $(LAUNCH_STAMP) ## buy training rows for finetune from a model at a paid endpoint (PROMPTS=url ENDPOINT_MODEL=name LICENCE=terms)
	@$(LAUNCH_PYTHON) -m launch.submit sky/synthesize.yaml $(OPTIONS) $(MACHINES)

distil: $(LAUNCH_STAMP) ## train a small model on the output probabilities of TEACHER=gpt2-medium, as run RUN=distilled
	@$(LAUNCH_PYTHON) -m launch.submit sky/distil.yaml $(OPTIONS) $(MACHINES)

evaluate: $(LAUNCH_STAMP) ## measure perplexity and HellaSwag of RUN's newest checkpoint, on one small GPU (EVAL_ARGS=…)
	@$(LAUNCH_PYTHON) -m launch.submit sky/evaluate.yaml $(OPTIONS) $(MACHINES)

export: $(LAUNCH_STAMP) ## export RUN for other programs (EXPORT_ARGS=--format=gguf, --publish=hf:OWNER/NAME)
	@$(LAUNCH_PYTHON) -m launch.submit sky/export.yaml $(OPTIONS) $(MACHINES)

serve: $(LAUNCH_STAMP) ## serve RUN with OpenAI's API on one small GPU, until MAX_USD is spent (needs SERVE_API_KEY)
	@$(LAUNCH_PYTHON) -m launch.submit sky/serve.yaml $(OPTIONS) $(MACHINES)

chat: $(STAMP) ## chat on this computer with RUN's newest checkpoint in BUCKET, or with MODEL=… (CHAT_ARGS=…)
	@$(BIN)/python -m launch.chat

##@ Show and end what is running

status: $(LAUNCH_STAMP) ## list your running clusters, jobs and machines, and the dollars of RUN
	@$(LAUNCH_PYTHON) -m launch.runs status sky/$(call typed,TASK).yaml

logs: $(LAUNCH_STAMP) ## follow the output of the newest job, or of TASK=…; FROM=bucket shows the stored output of RUN
	@$(LAUNCH_PYTHON) -m launch.runs logs $(if $(filter bucket,$(value FROM)),--stored sky/$(call typed,TASK).yaml,\
	  $(if $(filter file,$(origin TASK)),,sky/$(call typed,TASK).yaml))

pull: $(LAUNCH_STAMP) ## download metrics, samples, ledger, logs and newest checkpoint of RUN to pulled/
	@$(LAUNCH_PYTHON) -m launch.runs pull sky/$(call typed,TASK).yaml

# `down` is an emergency: any version of SkyPilot will do.
$(LAUNCH_VENV)/bin/sky:
	@$(MAKE) --no-print-directory setup-launch

down: | $(LAUNCH_VENV)/bin/sky ## end all your machines of this project, and show whether any is left (YES=1, ALL=1)
	@$(LAUNCH_PYTHON) -m launch.down --down

watch: $(LAUNCH_STAMP) ## end your machines that still have no autostop after SWITCH_MINUTES=30; runs until Ctrl-C
	@$(LAUNCH_PYTHON) -m launch.watch

##@ Images

image: $(LAUNCH_STAMP) ## build the images for amd64 and arm64 on rented machines, and push them to IMAGE=registry/name:tag
	@$(LAUNCH_PYTHON) -m launch.submit sky/build-image.yaml $(OPTIONS)
	@$(LAUNCH_PYTHON) -m launch.submit sky/build-image.yaml $(OPTIONS) --cluster build-image-arm64 --instance-type c7g.4xlarge

##@ Tests of launching, for work on the code

test-sky: $(LAUNCH_STAMP) $(STAMP) ## check the task files with SkyPilot's own loader and optimizer
	@SKY_PYTHON=$(LAUNCH_VENV)/bin/python $(BIN)/python -m pytest tests/test_sky.py tests/test_sky_loader.py

test-launch: $(LAUNCH_STAMP) $(STAMP) ## launch the tasks on an emulated cloud (skipped if LAB_DIR=… is not set)
	@$(BIN)/python -m pytest -m lab -s tests/test_launch_lab.py tests/test_run_lab.py

test-image: $(STAMP) ## lint the Dockerfile, build both images (torch for CPUs) and run their self-tests (needs root)
	@$(BIN)/python -m pytest -m image -s tests/test_image.py
