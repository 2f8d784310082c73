"""Trains a model: pretraining, fine-tuning, preference optimisation or distillation, as the config's `stage` says.

    torchrun --nproc-per-node=8 -m trainer.train trainer/configs/gpt2-124m.yaml --run.url=s3://bucket/runs/first
    python -m trainer.train trainer/configs/tuning/finetune-chat.yaml --start.weights=RUN --run.url=s3://bucket/runs/chat
    python -m trainer.train trainer/configs/tuning/dpo.yaml --start.weights=RUN --run.url=s3://bucket/runs/dpo

The program reads the data of the stage: token shards, or rows with conversations or preferences. It writes run.json,
checkpoints, metrics and the ledger below run.url. The same command continues a run from its newest complete checkpoint,
on any number of ranks. The exit code is 0 if the run has reached its last step, 33 if it was asked to stop and has
saved, 34 if it has reached its cap on dollars, else 1.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # called before the imports that take seconds

import importlib
import os

from core.console import run_entry, set_up_logging
from core.exit_codes import OK
from core.settings import loader
from core.settings.stages import training_schema, written_out
from trainer.checkpoint import early

USAGE = """torchrun --nproc-per-node=N -m trainer.train CONFIG.yaml [--section.key=value ...]

--stage=NAME --help lists the settings of another stage: finetune, dpo or distil."""


def main(arguments: list[str]) -> int:
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    arguments = written_out(arguments)
    schema = training_schema(arguments)
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(schema, USAGE))
        return OK
    settings = loader.load(schema, arguments, os.environ)
    # Importing torch takes seconds. Wrong settings are refused before this import, and the checkpoint is fetched
    # meanwhile.
    fetched = early.start(settings.run.url, os.environ)
    from trainer.loop.segment import run_segment

    # Import only this stage, because each stage imports other libraries.
    stage = importlib.import_module(f"trainer.stages.{settings.stage}")
    return run_segment(getattr(stage, settings.stage.capitalize()), settings, fetched)


if __name__ == "__main__":
    run_entry(main)
