"""Preference optimisation on pairs of answers, with the loop, resume and ledger of pretraining.

    python -m trainer.dpo trainer/configs/dpo.yaml --dpo.start=RUN --data.rows=pairs.jsonl --run.url=s3://bucket/runs/dpo

Reads the start's weights and rows with `prompt`, `chosen` and `rejected`. Writes below run.url what trainer.train
writes, and reference.safetensors: log-probabilities of all answers by the start.
"""

import functools
import os

from core import config
from core.console import OK, run_entry, set_up_logging
from core.schema_tuning import DpoConfig
from trainer.checkpoint import early

USAGE = "torchrun --nproc-per-node=N -m trainer.dpo CONFIG.yaml --dpo.start=RUN [--section.key=value ...]"


def main(arguments: list[str]) -> int:
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    if {"-h", "--help"} & set(arguments):
        print(config.help_text(DpoConfig, USAGE))
        return OK
    settings = config.load(DpoConfig, arguments, os.environ)
    fetched = early.start(settings.run.url, os.environ)
    from trainer.segment import run_stage
    from trainer.stages.dpo import Dpo

    return run_stage(functools.partial(Dpo, settings), settings, fetched)


if __name__ == "__main__":
    run_entry(main)
