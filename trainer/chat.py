"""Chats with a trained model. A base model continues the text, and a fine-tuned model answers it.

    python -m trainer.chat s3://bucket/runs/first

The argument is a run (its newest checkpoint is used), a checkpoint, or a public model. /help lists the commands. If
input comes from a pipe, each line gets one answer. `python -m trainer.serve` offers the same chat on a web page.
"""

import os
import sys
from dataclasses import dataclass

from core import urls
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.exit_codes import FAILED, OK
from core.settings import loader
from core.settings.inference import InferenceOptions, Sampling
from core.settings.loader import setting
from trainer.inference import sampling as generation

USAGE = "python -m trainer.chat RUN_OR_CHECKPOINT [--name=value ...]"


@dataclass(frozen=True)
class ChatConfig(InferenceOptions, Sampling):
    """Settings of `trainer.chat`."""

    compare: str = setting(
        "", "a second run or checkpoint that also answers, as with /compare", check=urls.mistake_in_model
    )


def main(arguments: list[str]) -> int:
    if "--serve" in arguments:
        raise ConfigError("--serve: is a separate program; run python -m trainer.serve RUN_OR_CHECKPOINT")
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(ChatConfig, USAGE))
        return OK
    where, flags = generation.split_arguments(arguments, USAGE)
    settings = generation.load(ChatConfig, flags, os.environ)
    set_up_logging(speaks=False)
    # Importing torch takes seconds. Errors in the settings are reported before the import.
    from trainer.inference.chat import Chat
    from trainer.inference.chat_model import open_chat_model
    from trainer.inference.terminal import Terminal

    terminal = Terminal()
    with terminal.waiting(f"opening {where}"):
        model = open_chat_model(where, settings)
    chat = Chat(model, generation.sampling_of(settings), settings, terminal)
    engine = model.engine
    manner = "answers in turns" if model.tuned else "continues text"
    size = f"{engine.model.parameter_count():,} parameters, context {engine.context}, {engine.device}"
    terminal.note(f"{model.name}: {size}")
    terminal.note(f"it {manner}; /help lists commands")
    if settings.compare:
        chat.handle(f"/compare {settings.compare}")
    for line in terminal.lines(list(Chat.commands())):
        if not chat.handle(line):
            break
    return FAILED if chat.failed and not sys.stdin.isatty() else OK


if __name__ == "__main__":
    run_entry(main)
