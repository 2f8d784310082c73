"""Starts trainer.chat on this computer with the newest checkpoint of the run that BUCKET and RUN name.

    BUCKET=my-bucket RUN=gpt2-124m python -m launch.chat [--temperature=0.7 ...]

The weights are read from the bucket. If MODEL is set, it names another model: a checkpoint, a folder, or a public
model. CHAT_ARGS holds more settings of trainer.chat.
"""

import os
import sys

from core import bucket, environment
from core.console import run_entry
from core.task import MORE, with_more


def main(arguments: list[str]) -> None:
    environment.adopt()
    model = os.environ.get("MODEL") or bucket.url(os.environ, "RUN")
    words = with_more([*arguments, f"{MORE}{os.environ.get('CHAT_ARGS', '')}"])
    command = [sys.executable, "-m", "trainer.chat", model, *words]
    os.execv(sys.executable, command)  # trainer.chat gets the terminal, and this program exits with its code


if __name__ == "__main__":
    run_entry(main, shows=True)
