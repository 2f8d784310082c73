"""Makes training rows: asks a large model behind an OpenAI-compatible endpoint and stores its answers as a set.

    python -m trainer.synthesize trainer/configs/tuning/synthesize.yaml --make.prompts=prompts.txt --run.url=...

The program reads a file of prompts. It writes calls, answers and the ledger below run.url. It writes the rows beside
the token shards at make.url, where fine-tuning finds them. If the program is started again, it asks only for the
answers that are missing. It needs no torch.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()

import os

from core.console import run_entry, set_up_logging
from core.exit_codes import OK
from core.settings import loader
from core.settings.tuning import SynthesisConfig

USAGE = """python -m trainer.synthesize CONFIG.yaml [--section.key=value ...]

The endpoint's key comes from the environment: OPENAI_API_KEY."""


def main(arguments: list[str]) -> int:
    set_up_logging()
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(SynthesisConfig, USAGE))
        return OK
    from trainer.synthesis import make

    return make.run(loader.load(SynthesisConfig, arguments, os.environ), os.environ)


if __name__ == "__main__":
    run_entry(main)
