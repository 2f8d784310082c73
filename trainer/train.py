"""Trains a model: pretraining, fine-tuning, preference optimisation or distillation, as the config's `stage` says.

    torchrun --nproc-per-node=8 -m trainer.train trainer/configs/gpt2-124m.yaml --run.url=s3://bucket/runs/first
    python -m trainer.train trainer/configs/tuning/finetune-chat.yaml --start.weights=RUN --run.url=s3://bucket/runs/chat
    python -m trainer.train trainer/configs/tuning/dpo.yaml --start.weights=RUN --run.url=s3://bucket/runs/dpo

Reads the data of the stage: token shards, or conversations or preferences as rows. Writes run.json, checkpoints,
metrics and the ledger below run.url. The same command continues a run from its newest complete checkpoint, on any
number of ranks. Exit codes: 0 when the run has reached its last step, 33 when it was asked to stop and saved, 34 when
it has reached its cap on dollars, else 1.
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

--stage=finetune --help, dpo and distil list the settings of the other stages."""


def main(arguments: list[str]) -> int:
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    arguments = written_out(arguments)
    schema = training_schema(arguments)
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(schema, USAGE))
        return OK
    settings = loader.load(schema, arguments, os.environ)
    # Importing torch takes seconds. Wrong settings are refused before the import, and a checkpoint is fetched during
    # it.
    fetched = early.start(settings.run.url, os.environ)
    from trainer.loop.segment import run_segment

    # Import only this stage, because each stage imports other libraries.
    stage = importlib.import_module(f"trainer.stages.{settings.stage}")
    return run_segment(getattr(stage, settings.stage.capitalize()), settings, fetched)


if __name__ == "__main__":
    run_entry(main)
