"""Learn from a larger model: from the text that it writes, or from its distribution at each token.

    python -m trainer.distil make trainer/configs/distil-make.yaml --make.prompts=prompts.txt --run.url=...
    python -m trainer.distil trainer/configs/distil-logits.yaml --distil.teacher=RUN --run.url=s3://bucket/runs/small

`make` asks a model behind an OpenAI-compatible endpoint and stores a set that trainer.finetune reads; it needs no
torch. The other form trains as trainer.train does, on the same token shards, with a teacher beside the student.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # before the imports that take seconds

import os

from core.console import run_entry, set_up_logging
from core.exit_codes import OK
from core.settings import loader
from core.settings.tuning import DistilConfig, MakeConfig
from trainer import entry

USAGE = """torchrun --nproc-per-node=N -m trainer.distil CONFIG.yaml --distil.teacher=RUN [--section.key=value ...]

python -m trainer.distil make --help has the settings for text from an endpoint."""
MAKE_USAGE = """python -m trainer.distil make CONFIG.yaml [--section.key=value ...]

The endpoint's key comes from the environment: OPENAI_API_KEY."""


def main(arguments: list[str]) -> int:
    return _make(arguments[1:]) if arguments[:1] == ["make"] else entry.train(arguments, DistilConfig, USAGE, _stage)


def _make(arguments: list[str]) -> int:
    set_up_logging()
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(MakeConfig, MAKE_USAGE))
        return OK
    from trainer.synthesis import make

    return make.run(loader.load(MakeConfig, arguments, os.environ), os.environ)


def _stage():
    from trainer.stages.distil import Distil

    return Distil


if __name__ == "__main__":
    run_entry(main)
