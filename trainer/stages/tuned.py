"""What fine-tuning and preference optimisation have in common: a start, examples, adapters, a turn template."""

import abc
import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from core.errors import CheckpointError, ConfigError
from core.figures import quantity
from core.settings import loader as settings_of
from core.settings.model import ModelConfig, flops_per_token
from core.settings.training import DataConfig, TrainConfig
from core.settings.tuning import DpoConfig, FinetuneConfig
from trainer.checkpoint.load import Restored
from trainer.data import chat_template
from trainer.data.examples import Examples
from trainer.distributed.process_group import Ranks, on_main
from trainer.model import lora
from trainer.model.gpt import GPT
from trainer.stages import overfit
from trainer.stages.stage import Stage, lasting_name, stored_config, with_batch
from trainer.weights import folder as public
from trainer.weights.open import encoding_at, look_up, open_weights

log = logging.getLogger("train")


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with: a name that will mean the same later, the model, and the data it was trained on."""

    where: str
    model: ModelConfig
    data_url: str


class Tuned(Stage):
    """`own` is the configuration as given; its section `self.name` has `start` and `epochs`."""

    measures_start = True
    sequences_per_item = 1  # an item is what an epoch is counted in

    def __init__(self, own: FinetuneConfig | DpoConfig, ranks: Ranks):
        section = getattr(own, self.name)
        start = on_main(lambda: _start_of(own, self.name), ranks)
        length = own.data.length or start.model.context
        if length > start.model.context:
            raise ConfigError(
                f"data.length is {length}, but {start.where} has a context of {start.model.context} tokens; "
                "set data.length to at most that, or 0"
            )
        url = own.data.url or start.data_url
        own = dataclasses.replace(own, data=dataclasses.replace(own.data, url=url))
        self.start, self.length = start, length
        self._encoding = functools.partial(_encoding, start.where, url)
        self.examples: Examples = on_main(lambda: self.read(own, length), ranks)
        self.items = self.count_items()
        # What loop, report and looks read: sequences of this length.
        view = TrainConfig(
            run=own.run,
            data=DataConfig(url=url or start.where),
            model=dataclasses.replace(start.model, context=length),
            batch=own.batch,
            optimizer=own.optimizer,
            train=dataclasses.replace(own.train, steps=self._steps(own, section.epochs)),
            checkpoint=own.checkpoint,
        )
        super().__init__(view, ranks)
        self.model_config = dataclasses.replace(start.model, dropout=self.settings.model.dropout)
        own = with_batch(own, self.settings)
        self.own = dataclasses.replace(own, **{self.name: dataclasses.replace(section, start=start.where)})
        self.digest = ""  # of the weights that adapters belong to

    @abc.abstractmethod
    def read(self, own: Any, length: int) -> Examples: ...

    @abc.abstractmethod
    def count_items(self) -> int: ...

    @property
    def items_per_step(self) -> int:
        return self.settings.batch.tokens_per_step // self.length // self.sequences_per_item

    @property
    def config(self) -> Mapping[str, Any]:
        return {**settings_of.to_dict(self.own), "model": settings_of.to_dict(self.model_config)}

    @property
    def identity(self) -> Mapping[str, Any]:
        return settings_of.identity(self.own)

    @property
    def fingerprint(self) -> str:
        return self.examples.fingerprint

    @property
    def flops_per_token(self) -> float | None:
        return None if self.own.lora.rank else flops_per_token(self.settings.model)

    @property
    def data_url(self) -> str:
        return self.own.data.url

    @functools.cached_property
    def encoding(self):
        return self._encoding()

    def as_prompt(self, text: str) -> str:
        prompt = chat_template.render([{"role": "user", "content": text}], self.encoding, add_generation_prompt=True)
        return self.encoding.decode(prompt.tokens[1:])

    def build(self) -> GPT:
        with torch.device("meta"):
            model = GPT(self.model_config, self.settings.train.activation_checkpointing)
            if self.own.lora.rank:
                lora.attach(model, **self._lora())
        return model

    def fill(self, model: GPT, restored: Restored | None) -> None:
        adapted = bool(self.own.lora.rank)
        if restored and not adapted:
            return
        self.digest = on_main(functools.partial(self._take_start, model, restored), self.ranks)
        if self.ranks.world > 1:
            for parameter in lora.base(model).values():
                dist.broadcast(parameter.data, 0)
        if adapted and not restored:
            lora.initialise(model, self.settings.train.seed)

    def _take_start(self, model: GPT, restored: Restored | None) -> str:
        """Rank 0: all weights but adapters, from the start."""
        weights = dict(open_weights(self.start.where, self.ranks.device).model.named_parameters())
        with torch.no_grad():
            for name, parameter in lora.base(model).items():
                parameter.copy_(weights[name])
        if not self.own.lora.rank:
            return ""
        digest = lora.digest(weights)
        wanted = restored.state["start_digest"] if restored else digest
        if wanted != digest:
            raise CheckpointError(
                f"{self.settings.run.url}: its adapters belong to weights with the checksum {wanted}, those of "
                f"{self.start.where} have {digest}; put back the weights that it was trained from"
            )
        return digest

    def state(self) -> Mapping[str, Any]:
        said = {chat_template.STATE_KEY: chat_template.NAME, "stage": self.name, "start": self.start.where}
        return said | ({"lora": self._lora(), "start_digest": self.digest} if self.own.lora.rank else {})

    def describe(self, model: GPT) -> str:
        settings = self.settings
        training = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return "\n".join(
            [
                "settings:\n" + settings_of.to_yaml(self.own).rstrip(),
                f"model: {model.parameter_count():,} parameters of {self.start.where}, of which {training:,} train",
                self.examples.report,
                *(overfit.describe(settings, self.ranks) if settings.train.overfit else self._batch_and_length()),
            ]
        )

    def _batch_and_length(self) -> list[str]:
        settings = self.settings
        steps, per_step = settings.train.steps, self.items_per_step
        return [
            f"batch: {settings.batch.tokens_per_step:,} tokens = {settings.batch.micro_batch_size} sequences "
            f"x {self.length} tokens x {self.accumulation} micro-batches x {self.ranks.world} ranks "
            f"on {self.ranks.device.type}",
            f"length: {steps:,} steps = {quantity(settings.batch.tokens_per_step * steps)} tokens, padding counted, "
            f"= {steps * per_step / self.items:.2f} epochs of {self.items:,} {self.describe_items()}",
        ]

    @abc.abstractmethod
    def describe_items(self) -> str: ...

    def _lora(self) -> dict[str, Any]:
        return {"rank": self.own.lora.rank, "alpha": self.own.lora.alpha, "targets": list(self.own.lora.targets)}

    def _steps(self, own: Any, epochs: float) -> int:
        per_step = own.batch.tokens_per_step // self.length // self.sequences_per_item
        return max(1, math.ceil(epochs * self.items / max(1, per_step))) if epochs else own.train.steps


def _start_of(own: Any, name: str) -> Start:
    """Rank 0. A run that was begun knows its model and data: without adapters it can do without its start."""
    where = lasting_name(getattr(own, name).start, own.run.url, name, "start")
    earlier = stored_config(own.run.url)
    if earlier and earlier.get(name, {}).get("start") == where:
        state: Mapping[str, Any] = {"config": earlier}
    else:
        state = look_up(where)[1]
        chat_template.is_tuned(state, where)
    model = settings_of.from_dict(ModelConfig, state["config"]["model"], where)
    return Start(where, model, state["config"].get("data", {}).get("url", ""))


def _encoding(start: str, data_url: str):
    is_folder = public.is_public(start) or public.is_folder(start)
    return encoding_at(start, data_url or None, public.resolve(start) if is_folder else None)
