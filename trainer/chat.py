"""Talk to a trained model: a base model continues your text, a fine-tuned one answers you.

    python -m trainer.chat s3://bucket/runs/first
    python -m trainer.chat s3://bucket/runs/first --serve

Reads a run's newest checkpoint, one checkpoint, or a public model. /help lists what else it can do. Works in a pipe:
one line, one answer. `--serve` is `python -m trainer.serve`.
"""

import os
import sys
from dataclasses import dataclass

from core import urls
from core.console import run_entry, set_up_logging
from core.exit_codes import FAILED, OK
from core.settings import loader
from core.settings.loader import setting
from trainer.inference import sampling as generation
from trainer.inference.sampling import Machine, Sampling

USAGE = "python -m trainer.chat RUN_OR_CHECKPOINT [--name=value ...] [--serve ...]"


@dataclass(frozen=True)
class ChatConfig(Machine, Sampling):
    """What `trainer.chat` takes."""

    compare: str = setting(
        "", "another run or checkpoint that answers beside this one, as /compare", check=urls.mistake_in_model
    )

    def __post_init__(self):
        Sampling.__post_init__(self)
        Machine.__post_init__(self)


def main(arguments: list[str]) -> int:
    if "--serve" in arguments:
        from trainer.inference.start import serve

        return serve([argument for argument in arguments if argument != "--serve"])
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(ChatConfig, USAGE))
        return OK
    where, flags = generation.split_arguments(arguments, USAGE)
    settings = generation.load(ChatConfig, flags, os.environ)
    set_up_logging(speaks=False)
    # torch takes seconds to import: a wrong setting should not have to wait for it.
    from trainer.inference.chat import Chat
    from trainer.inference.chat_model import open_speaker
    from trainer.inference.terminal import Face

    face = Face()
    with face.waiting(f"opening {where}"):
        speaker = open_speaker(where, settings)
    chat = Chat(speaker, generation.sampling_of(settings), settings, face)
    engine, model = speaker.engine, speaker.engine.model
    manner = "answers in turns" if speaker.tuned else "continues text"
    size = f"{model.parameter_count():,} parameters, context {engine.context}, {engine.device}"
    face.note(f"{speaker.name}: {size}")
    face.note(f"it {manner}; /help lists commands")
    if settings.compare:
        chat.handle(f"/compare {settings.compare}")
    for line in face.lines(list(Chat.commands())):
        if not chat.handle(line):
            break
    return FAILED if chat.failed and not sys.stdin.isatty() else OK


if __name__ == "__main__":
    run_entry(main)
