"""Distillation: the next token of a stream of shards, and the whole distribution of a teacher at each position.

    loss = weight T² KL(teacher, student) + (1 - weight) cross-entropy

with both distributions softened by the temperature T (Hinton et al. 2015, "Distilling the Knowledge in a Neural
Network"; T² keeps the gradients' size).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from core.errors import ConfigError
from core.settings import loader as settings_of
from core.settings.training import TrainConfig
from core.settings.tuning import DistilConfig
from trainer.checkpoint.load import Restored
from trainer.distributed.in_turn import Between
from trainer.distributed.process_group import Ranks, on_main
from trainer.model.gpt import GPT
from trainer.model.recomputed import divergence_and_cross_entropy
from trainer.stages.pretrain import Pretrain
from trainer.stages.stage import HeldOut, lasting_name, with_batch
from trainer.stages.teacher import FOREIGN, Teacher, open_teacher
from trainer.weights.open import look_up, open_weights


class Distillation(nn.Module):
    def __init__(self, model: GPT, teacher: Teacher, temperature: float, weight: float):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.weight = weight
        self._teacher = [teacher]  # in a list it is no part of the module: nobody synchronises or saves it

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        divergence, cross_entropy = self.parts(tokens, self.temperature)
        return self.weight * self.temperature**2 * divergence + (1 - self.weight) * cross_entropy

    def parts(self, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        """(2,): divergence and cross-entropy of a (B, T + 1) micro-batch."""
        (teacher,) = self._teacher
        inputs_BT = tokens[:, :-1]
        return divergence_and_cross_entropy(
            self.model.hidden(inputs_BT).flatten(0, 1),
            self.model.head,
            self.model.config.logit_softcap,
            teacher.hidden(inputs_BT).flatten(0, 1),
            teacher.head,
            teacher.softcap,
            tokens[:, 1:].flatten(),
            temperature,
        )


class Distil(Pretrain):
    name = "distil"
    measures_start = True
    flops_per_token = None  # the teacher's are not counted

    def __init__(self, own: DistilConfig, ranks: Ranks):
        view = TrainConfig(
            run=own.run,
            data=own.data,
            model=own.model,
            batch=own.batch,
            optimizer=own.optimizer,
            train=own.train,
            checkpoint=own.checkpoint,
        )
        super().__init__(view, ranks)
        teacher = own.distil.teacher
        if not teacher.startswith(FOREIGN):
            teacher = on_main(functools.partial(lasting_name, teacher, own.run.url, "distil", "teacher"), ranks)
        own = dataclasses.replace(own, distil=dataclasses.replace(own.distil, teacher=teacher))
        self.own = dataclasses.replace(with_batch(own, self.settings), model=self.settings.model)
        if own.distil.start:
            on_main(functools.partial(_check_same_model, own), ranks)
        self.teacher = open_teacher(teacher, self.encoding, ranks.device)
        if self.teacher.context < own.model.context:
            raise ConfigError(
                f"distil.teacher: {self.teacher.name} has a context of {self.teacher.context} tokens, the student's is "
                f"{own.model.context}; set model.context to at most that"
            )

    @property
    def config(self) -> Mapping[str, Any]:
        return settings_of.to_dict(self.own)

    @property
    def identity(self) -> Mapping[str, Any]:
        return settings_of.identity(self.own)

    def fill(self, model: GPT, restored: Restored | None) -> None:
        start = self.own.distil.start
        if restored or not start:
            super().fill(model, restored)
            return
        model.load_state_dict(open_weights(start, self.ranks.device).model.state_dict())

    def describe(self, model: GPT) -> str:
        return f"{super().describe(model)}\nteacher: {self.teacher.name}"

    def objective(self, model: GPT) -> Distillation:
        return Distillation(model, self.teacher, self.own.distil.temperature, self.own.distil.kl_weight)

    def held_out(self) -> HeldOut | None:
        validation = self.validation()
        if validation is None:
            return None

        def measure(model: GPT, between: Between | None = None) -> Mapping[str, float]:
            distillation = self.objective(model)
            divergence, loss = validation.means(model, lambda tokens: distillation.parts(tokens, 1.0), between)
            return {"val_loss": loss, "eval_tokens": validation.tokens, "val_divergence": divergence}

        return measure

    def state(self) -> Mapping[str, Any]:
        return {"stage": self.name, "teacher": self.teacher.name}


def _check_same_model(own: DistilConfig) -> None:
    where, state = look_up(own.distil.start)
    theirs, ours = state["config"]["model"], settings_of.to_dict(own.model)
    for key in ours:
        if theirs[key] != ours[key] and key != "init":
            raise ConfigError(
                f"distil.start: {where} has model.{key} = {theirs[key]}, this config has {ours[key]}; "
                "set the start's model, or leave distil.start empty"
            )
