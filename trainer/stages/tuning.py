"""Implements the common part of fine-tuning and preference optimisation: start, examples, adapters, chat template."""

import abc
import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from core import storage
from core.data import chat_template
from core.data.vocabulary import Vocabulary
from core.errors import CheckpointError, ConfigError
from core.settings import loader
from core.settings.model import ModelConfig
from core.settings.tuning import FinetuneConfig, StartConfig
from trainer.checkpoint import layout
from trainer.checkpoint.load import Restored
from trainer.data.examples import Examples
from trainer.distributed.process_group import Ranks, on_main
from trainer.model import lora
from trainer.model.gpt import GPT
from trainer.stages.stage import Stage, lasting_name, stored_config
from trainer.weights import folder as public
from trainer.weights.open import TrainedModel, look_up, open_weights, vocabulary_at

log = logging.getLogger("train")


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a run begins with: their name, their model, and the dataset that they were trained on."""

    where: str  # a name that refers to the same weights in every segment
    model: ModelConfig
    data_url: str


class Tuning(Stage):
    """A stage that trains on examples. It counts epochs in items: packed rows, or pairs of answers."""

    settings: FinetuneConfig
    measures_start = True
    sequences_per_item = 1

    def __init__(self, settings: FinetuneConfig, ranks: Ranks):
        start = on_main(lambda: _start_of(settings), ranks)
        length = settings.data.length or start.model.context
        if length > start.model.context:
            raise ConfigError(
                f"data.length is {length}, but {start.where} has a context of {start.model.context} tokens; "
                "set data.length to at most that, or 0"
            )
        data = dataclasses.replace(settings.data, url=storage.lasting(settings.data.url or start.data_url))
        settings = dataclasses.replace(settings, data=data, start=StartConfig(start.where))
        self.start = start
        self.examples: Examples = on_main(
            lambda: self.read(settings, _vocabulary(start.where, data.url).encoding(), length), ranks
        )
        self.context = length  # count_items needs it
        self.items = self.count_items()
        if settings.train.epochs:
            per_step = settings.batch.tokens_per_step // length // self.sequences_per_item
            steps = max(1, math.ceil(settings.train.epochs * self.items / max(1, per_step)))
            settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=steps))
        super().__init__(settings, start.model, length, ranks)
        self.digest = ""  # hash of the weights that the adapters are trained on
        self._opened: TrainedModel | None = None  # the starting model, until `fill` has copied it

    @abc.abstractmethod
    def read(self, settings: Any, encoding, length: int) -> Examples:
        """On rank 0: the examples as token ids, none longer than `length`."""

    @abc.abstractmethod
    def count_items(self) -> int: ...

    @property
    def items_per_step(self) -> int:
        return self.settings.batch.tokens_per_step // self.context // self.sequences_per_item

    @property
    def fingerprint(self) -> str:
        return self.examples.fingerprint

    @property
    def flops_per_token(self) -> float | None:
        return None if self.settings.lora.rank else super().flops_per_token

    @property
    def data_url(self) -> str:
        return self.settings.data.url

    def read_vocabulary(self) -> Vocabulary:
        return _vocabulary(self.start.where, self.settings.data.url)

    def check_stored(self) -> None:
        """The starting weights may be damaged, so they are opened here, before anything is written.

        `fill` copies them later.
        """
        if self.settings.lora.rank or not layout.complete_steps(self.settings.run.url):
            self._opened = open_weights(self.start.where, self.ranks.device)

    def as_prompt(self, text: str) -> str:
        prompt = chat_template.render([{"role": "user", "content": text}], self.encoding, add_generation_prompt=True)
        return self.encoding.decode(prompt.tokens[1:])

    def build(self) -> GPT:
        model = super().build()
        if self.settings.lora.rank:
            with torch.device("meta"):
                lora.attach(model, **self._lora())
        return model

    def fill(self, model: GPT, restored: Restored | None) -> None:
        adapted = bool(self.settings.lora.rank)
        if restored and not adapted:
            return
        self.digest = on_main(functools.partial(self._take_start, model, restored), self.ranks)
        if self.ranks.world > 1:
            for parameter in lora.base(model).values():
                dist.broadcast(parameter.data, 0)
        if adapted and not restored:
            lora.initialise(model, self.settings.train.seed)

    def _take_start(self, model: GPT, restored: Restored | None) -> str:
        """On rank 0: copy all weights except adapters from the starting model.

        If there are adapters, returns the checksum of these weights.
        """
        start, self._opened = self._opened or open_weights(self.start.where, self.ranks.device), None
        weights = dict(start.model.named_parameters())
        with torch.no_grad():
            for name, parameter in lora.base(model).items():
                parameter.copy_(weights[name])
        if not self.settings.lora.rank:
            return ""
        digest = lora.digest(weights)
        wanted = restored.state["start_digest"] if restored else digest
        if wanted != digest:
            raise CheckpointError(
                f"{self.settings.run.url}: its adapters belong to weights with the checksum {wanted}, but "
                f"{self.start.where} has {digest}; restore the weights that the adapters were trained on"
            )
        return digest

    def state(self) -> Mapping[str, Any]:
        said = {chat_template.STATE_KEY: chat_template.NAME, "stage": self.name, "start": self.start.where}
        return said | ({"lora": self._lora(), "start_digest": self.digest} if self.settings.lora.rank else {})

    def describe_data(self, model: GPT) -> list[str]:
        training = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return [
            f"model: {model.parameter_count():,} parameters of {self.start.where}, of which {training:,} are trained",
            self.examples.report,
        ]

    def describe_epochs(self) -> str:
        epochs = self.steps * self.items_per_step / self.items
        return f" with padding = {epochs:.2f} epochs of {self.items:,} {self.describe_items()}"

    @abc.abstractmethod
    def describe_items(self) -> str: ...

    def _lora(self) -> dict[str, Any]:
        return loader.to_dict(self.settings.lora)


def _start_of(settings: FinetuneConfig) -> Start:
    """On rank 0: the weights that the run starts from. A continued run reads model and data from its stored config."""
    where = lasting_name(settings.start.weights, settings.run.url, "start")
    earlier = stored_config(settings.run.url)
    if earlier and earlier.get("start", {}).get("weights") == where:
        state: Mapping[str, Any] = {"config": earlier}
    else:
        state = look_up(where)[1]
        chat_template.is_tuned(state, where)
    model = loader.from_dict(ModelConfig, state["config"]["model"], where)
    return Start(where, model, state["config"].get("data", {}).get("url", ""))


def _vocabulary(start: str, data_url: str) -> Vocabulary:
    is_folder = public.is_public(start) or public.is_folder(start)
    if is_folder:
        return vocabulary_at(start, [data_url], public.resolve(start))
    return vocabulary_at(start, [data_url, start.rpartition("/checkpoints/")[0]])


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies the values to the device, without waiting for a GPU."""
    found = torch.from_numpy(values)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
