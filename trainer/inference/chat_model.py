"""Opens a model for generation and chat."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from core.data import chat_template
from core.errors import ConfigError
from core.settings.inference import InferenceOptions, Sampling
from trainer.inference.engine import Engine
from trainer.weights.open import open_weights


@dataclass(frozen=True)
class ChatModel:
    """An opened model. If the model is `tuned`, it answers the messages of a conversation.

    Any other model continues text.
    """

    name: str
    engine: Engine
    tuned: bool
    opened_seconds: float

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation up to the answer. Raises DataError for a malformed message."""
        return chat_template.render(messages, self.engine.encoding, add_generation_prompt=True).tokens

    def recent(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> tuple[list[int], int]:
        """Shortens a conversation until an answer fits. Returns its tokens and the number of messages left out.

        The system's message and the newest message stay. An answer fits if the context has room for
        `sampling.max_tokens` or for a quarter of the context, whichever is less.
        """
        room = self.engine.context - min(sampling.max_tokens, self.engine.context // 4)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        # A shortened conversation must begin with a message of the user.
        starts = [index for index, message in enumerate(turns) if message["role"] == "user"]
        for start in starts:
            tokens = self.conversation([*system, *turns[start:]])
            if len(tokens) <= room:
                return tokens, start
        raise ConfigError(
            f"the newest message makes {len(tokens)} tokens with its headings, but only {room} fit before an answer "
            f"within the context of {self.engine.context}; shorten it"
        )


def open_chat_model(where: str, options: InferenceOptions) -> ChatModel:
    """Raises the errors of `open_weights`, and ConfigError for a missing device."""
    start = time.monotonic()
    device = device_of(options.device)
    trained = open_weights(where, device)
    engine = Engine(trained.model, trained.encoding, device, options.precision, options.max_batch_size)
    return ChatModel(trained.name, engine, chat_template.is_tuned(trained.state, where), time.monotonic() - start)


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU; check nvidia-smi and the driver, or set cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
