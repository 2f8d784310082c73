"""Pretrain: stream token shards, train with DDP, keep checkpoints, metrics and the ledger in object storage.

    torchrun --nproc-per-node=8 -m trainer.train trainer/configs/gpt2-124m.yaml --run.url=s3://bucket/runs/first

Reads data.url (manifest and shards, by data_prep). Writes below run.url: run.json, checkpoints/, metrics/, ledger/.
Started again with the same settings it continues from the newest complete checkpoint, on any number of ranks.
Exit codes: 0 only when the run reached its last step, 33 when it was asked to stop and saved, else 1.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # before the imports that take seconds

from core.console import run_entry
from core.settings.training import TrainConfig
from trainer import entry

USAGE = "torchrun --nproc-per-node=N -m trainer.train CONFIG.yaml [--section.key=value ...]"


def main(arguments: list[str]) -> int:
    arguments = ["--train.overfit=true" if each == "--overfit" else each for each in arguments]
    return entry.train(arguments, TrainConfig, USAGE, _stage)


def _stage():
    from trainer.stages.pretrain import Pretrain

    return Pretrain


if __name__ == "__main__":
    run_entry(main)
