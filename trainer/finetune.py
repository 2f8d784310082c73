"""Fine-tune on conversations: all weights or low-rank adapters, with the loop, resume and ledger of pretraining.

    python -m trainer.finetune trainer/configs/finetune-chat.yaml --finetune.start=RUN --run.url=s3://bucket/runs/chat
    torchrun --nproc-per-node=8 -m trainer.finetune CONFIG.yaml --finetune.start=gpt2 --data.examples=rows.jsonl ...

Reads the start's weights and instruction rows: a set stored by data_prep.sets, or a .jsonl file. Writes below run.url
what trainer.train writes. A run with adapters keeps the adapters only, and its start must stay where it is; opened by
any other program it is a plain model.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # before the imports that take seconds

from core.console import run_entry
from core.settings.tuning import FinetuneConfig
from trainer import entry

USAGE = "torchrun --nproc-per-node=N -m trainer.finetune CONFIG.yaml --finetune.start=RUN [--section.key=value ...]"


def main(arguments: list[str]) -> int:
    return entry.train(arguments, FinetuneConfig, USAGE, _stage)


def _stage():
    from trainer.stages.finetune import Finetune

    return Finetune


if __name__ == "__main__":
    run_entry(main)
