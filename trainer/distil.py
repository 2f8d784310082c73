"""Learn from a larger model: from the text that it writes, or from its distribution at each token.

    python -m trainer.distil make trainer/configs/distil-make.yaml --make.prompts=prompts.txt --run.url=...
    python -m trainer.distil trainer/configs/distil-logits.yaml --distil.teacher=RUN --run.url=s3://bucket/runs/small

`make` asks a model behind an OpenAI-compatible endpoint and stores a set that trainer.finetune reads; it needs no
torch. The other form trains as trainer.train does, on the same token shards, with a teacher beside the student.
"""

import functools
import os

from core import config
from core.console import OK, run_entry, set_up_logging
from core.schema_tuning import DistilConfig, MakeConfig

USAGE = """torchrun --nproc-per-node=N -m trainer.distil CONFIG.yaml --distil.teacher=RUN [--section.key=value ...]

python -m trainer.distil make --help has the settings for text from an endpoint."""
MAKE_USAGE = """python -m trainer.distil make CONFIG.yaml [--section.key=value ...]

The endpoint's key comes from the environment: OPENAI_API_KEY."""


def main(arguments: list[str]) -> int:
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    makes = arguments[:1] == ["make"]
    if {"-h", "--help"} & set(arguments):
        print(config.help_text(MakeConfig, MAKE_USAGE) if makes else config.help_text(DistilConfig, USAGE))
        return OK
    if makes:
        from trainer.synthesis import make

        return make.run(config.load(MakeConfig, arguments[1:], os.environ), os.environ)
    settings = config.load(DistilConfig, arguments, os.environ)
    from trainer.checkpoint import early

    fetched = early.start(settings.run.url, os.environ)
    from trainer.segment import run_stage
    from trainer.stages.distil import Distil

    return run_stage(functools.partial(Distil, settings), settings, fetched)


if __name__ == "__main__":
    run_entry(main)
