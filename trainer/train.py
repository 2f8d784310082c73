"""Pretrain: stream token shards, train with DDP, keep checkpoints, metrics and the ledger in object storage.

    torchrun --nproc-per-node=8 -m trainer.train trainer/configs/gpt2-124m.yaml --run.url=s3://bucket/runs/first

Reads data.url (manifest and shards, by data_prep). Writes below run.url: run.json, checkpoints/, metrics/, ledger/.
Started again with the same settings it continues from the newest complete checkpoint, on any number of ranks.
Exit codes: 0 only when the run reached its last step, 33 when it was asked to stop and saved, else 1.
"""

import functools
import os

from core import config
from core.console import OK, run_entry, set_up_logging
from core.schema import TrainConfig
from trainer.checkpoint import early

USAGE = "torchrun --nproc-per-node=N -m trainer.train CONFIG.yaml [--section.key=value ...]"


def main(arguments: list[str]) -> int:
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    if {"-h", "--help"} & set(arguments):
        print(config.help_text(TrainConfig, USAGE))
        return OK
    arguments = ["--train.overfit=true" if each == "--overfit" else each for each in arguments]
    settings = config.load(TrainConfig, arguments, os.environ)
    # torch takes seconds to import: a wrong setting should not have to wait for it, and a checkpoint arrives meanwhile.
    fetched = early.start(settings.run.url, os.environ)
    from trainer.segment import run_stage
    from trainer.stages.pretrain import Pretrain

    return run_stage(functools.partial(Pretrain, settings), settings, fetched)


if __name__ == "__main__":
    run_entry(main)
