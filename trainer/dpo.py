"""Preference optimisation on pairs of answers, with the loop, resume and ledger of pretraining.

    python -m trainer.dpo trainer/configs/dpo.yaml --dpo.start=RUN --data.examples=pairs.jsonl --run.url=s3://bucket/runs/dpo

Reads the start's weights and rows with `prompt`, `chosen` and `rejected`. Writes below run.url what trainer.train
writes, and reference.safetensors: log-probabilities of all answers by the start.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # before the imports that take seconds

from core.console import run_entry
from core.settings.tuning import DpoConfig
from trainer import entry

USAGE = "torchrun --nproc-per-node=N -m trainer.dpo CONFIG.yaml --dpo.start=RUN [--section.key=value ...]"


def main(arguments: list[str]) -> int:
    return entry.train(arguments, DpoConfig, USAGE, _stage)


def _stage():
    from trainer.stages.dpo import Dpo

    return Dpo


if __name__ == "__main__":
    run_entry(main)
