"""A checkpoint ready to answer: its engine, and how it wants to be spoken to."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from core.errors import ConfigError
from trainer.data import chat_template
from trainer.inference.engine import Engine
from trainer.inference.sampling import Machine, Sampling
from trainer.weights.open import open_weights


@dataclass(frozen=True)
class Speaker:
    """`tuned`: it knows turns (trainer.data.chat_template); else it only continues text."""

    name: str
    engine: Engine
    tuned: bool
    opened_seconds: float

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids up to where the answer begins. Raises DataError for a message that is none."""
        return chat_template.render(messages, self.engine.encoding, add_generation_prompt=True).tokens

    def recent(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> tuple[list[int], int]:
        """The conversation so that an answer fits behind it, and how many of its oldest messages were left out.

        The system's message and the newest one stay. An answer fits if the new tokens do, or a quarter of the context.
        """
        room = self.engine.context - min(sampling.tokens, self.engine.context // 4)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        # A conversation goes on from a question, not from an answer.
        starts = [index for index, message in enumerate(turns) if message["role"] == "user"]
        for start in starts:
            tokens = self.conversation([*system, *turns[start:]])
            if len(tokens) <= room:
                return tokens, start
        raise ConfigError(
            f"the newest message makes {len(tokens)} tokens with its headings, {room} fit before an answer within the "
            f"context of {self.engine.context}; shorten it"
        )


def open_speaker(where: str, machine: Machine) -> Speaker:
    """Raises what `open_weights` raises, and ConfigError for a device that is not there."""
    start = time.monotonic()
    device = device_of(machine.device)
    opened = open_weights(where, device)
    engine = Engine(opened.model, opened.encoding, device, machine.precision, machine.rows)
    return Speaker(opened.name, engine, chat_template.is_tuned(opened.state, where), time.monotonic() - start)


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU; check nvidia-smi and the driver, or set cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
