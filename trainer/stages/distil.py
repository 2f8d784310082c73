"""Distils: trains on token shards with two losses, one on the next token and one on a teacher's distribution.

    loss = kl_weight T² KL(teacher, student) + (1 - kl_weight) cross-entropy

The temperature T divides the logits of both models. The factor T² makes the size of the gradients independent of T
(Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). The teacher is one of our models, a public GPT-2
or Llama, or any model that `transformers` runs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.data.vocabulary import GPT2_VOCAB_SIZE
from core.errors import ConfigError
from core.settings import loader
from core.settings.tuning import DistilConfig, TeacherConfig
from trainer.checkpoint import layout
from trainer.checkpoint.load import Restored
from trainer.distributed.process_group import Ranks, StopCheck, on_main
from trainer.model.gpt import GPT
from trainer.model.loss import divergence_and_cross_entropy, with_share
from trainer.stages.pretrain import Pretrain
from trainer.stages.stage import Validation, lasting_name
from trainer.weights.open import TrainedModel, look_up, open_weights

FOREIGN = "transformers:"
PROBE = "The president's speech, of 1865, was short: 700 words — and\n\n\tno more."


@dataclass(frozen=True)
class Teacher:
    """`hidden(tokens_BT)` is the input of the output layer, (B, T, E), and `head` the weights of that layer, (V, E)."""

    name: str
    context: int
    head: torch.Tensor
    softcap: float
    model: nn.Module
    foreign: bool

    @torch.no_grad()
    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        if not self.foreign:
            return self.model.hidden(tokens_BT)
        return self.model.base_model(input_ids=tokens_BT.long()).last_hidden_state


class Distillation(nn.Module):
    def __init__(self, model: GPT, share: float, teacher: Teacher, temperature: float, kl_weight: float):
        super().__init__()
        self.model = model
        self.share = share
        self.temperature = temperature
        self.kl_weight = kl_weight
        # nn.Module does not register modules in a list. So DDP ignores the teacher.
        self._teacher = [teacher]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        divergence, cross_entropy = self.parts(tokens, self.temperature)
        loss = self.kl_weight * self.temperature**2 * divergence + (1 - self.kl_weight) * cross_entropy
        return with_share(loss, self.share)

    def parts(self, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        """A tensor (2,) with the divergence and the cross-entropy of a (B, T + 1) micro-batch."""
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
    settings: DistilConfig
    measures_start = True
    flops_per_token = None  # the teacher's FLOPs are not counted

    def __init__(self, settings: DistilConfig, ranks: Ranks):
        teacher = settings.teacher.weights
        if not teacher.startswith(FOREIGN):
            teacher = on_main(functools.partial(lasting_name, teacher, settings.run.url, "teacher"), ranks)
        super().__init__(dataclasses.replace(settings, teacher=TeacherConfig(teacher)), ranks)
        if self.settings.start.weights:
            on_main(functools.partial(_check_same_model, self.settings), ranks)
        self._opened: TrainedModel | None = None  # on rank 0: the starting model, until `fill` has copied its weights
        self.teacher = open_teacher(teacher, self.encoding, ranks.device)
        if self.teacher.context < self.context:
            raise ConfigError(
                f"teacher.weights: {self.teacher.name} has a context of {self.teacher.context} tokens, the student's "
                f"is {self.context}; set model.context to at most that"
            )

    def check_stored(self) -> None:
        super().check_stored()
        start, run_url = self.settings.start.weights, self.settings.run.url
        if start and not layout.complete_steps(run_url):
            self._opened = open_weights(start, self.ranks.device)

    def fill(self, model: GPT, restored: Restored | None) -> None:
        where = self.settings.start.weights
        if restored or not where:
            super().fill(model, restored)
            return
        start, self._opened = self._opened or open_weights(where, self.ranks.device), None
        model.load_state_dict(start.model.state_dict())

    def describe_data(self, model: GPT) -> list[str]:
        return [*super().describe_data(model), f"teacher: {self.teacher.name}"]

    def objective(self, model: GPT, share: float = 1.0) -> Distillation:
        distil = self.settings.distil
        return Distillation(model, share, self.teacher, distil.temperature, distil.kl_weight)

    def validation(self) -> Validation | None:
        validation = self.validation_loss()
        if validation is None:
            return None

        def measure(model: GPT, check_stop: StopCheck | None = None) -> Mapping[str, float]:
            distillation = self.objective(model)
            divergence, loss = validation.means(model, lambda tokens: distillation.parts(tokens, 1.0), check_stop)
            return {"val_loss": loss, "eval_tokens": validation.tokens, "val_divergence": divergence}

        return measure

    def state(self) -> Mapping[str, Any]:
        return {"stage": self.name, "teacher": self.teacher.name}


def _check_same_model(settings: DistilConfig) -> None:
    where, state = look_up(settings.start.weights)
    theirs, ours = state["config"]["model"], loader.to_dict(settings.model)
    for key in ours:
        if theirs[key] != ours[key] and key != "init":
            raise ConfigError(
                f"start.weights: {where} has model.{key} = {theirs[key]}, this config has {ours[key]}; "
                "give the model settings of the start, or leave start.weights empty"
            )


def open_teacher(name: str, encoding, device: torch.device) -> Teacher:
    """Raises ConfigError for a teacher with another vocabulary, CheckpointError for a damaged teacher."""
    if name.startswith(FOREIGN):
        return _open_foreign(name.removeprefix(FOREIGN), encoding, device)
    model = open_weights(name, device).model.requires_grad_(False)
    return Teacher(name, model.config.context, model.head, model.config.logit_softcap, model, False)


def _open_foreign(name: str, encoding, device: torch.device) -> Teacher:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"teacher.weights is {FOREIGN}{name}, which needs: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Only safetensors are loaded, because a pickle may run code.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher.weights: {name} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    if ids != encoding.encode_ordinary(PROBE) or model.config.vocab_size < GPT2_VOCAB_SIZE:
        raise ConfigError(
            f"teacher.weights: {name} has another vocabulary than GPT-2's ({model.config.vocab_size} tokens, and a "
            "test text gets other ids), so its distributions do not fit our tokens; take a teacher with GPT-2's "
            "vocabulary, or let it write text: python -m trainer.synthesize"
        )
    model = model.to(device).eval().requires_grad_(False)
    _check_head(model, name, torch.tensor([ids], device=device))
    context: Any = getattr(model.config, "max_position_embeddings", None)
    head = model.get_output_embeddings().weight
    return Teacher(name, context or 1 << 30, head, 0.0, model, True)


@torch.no_grad()
def _check_head(model: nn.Module, name: str, tokens_BT: torch.Tensor) -> None:
    """Raises ConfigError unless the teacher's logits are the plain product that we compute, without bias or scaling."""
    layer = model.get_output_embeddings()
    whole = model(input_ids=tokens_BT).logits
    ours = model.base_model(input_ids=tokens_BT).last_hidden_state @ layer.weight.T if layer is not None else None
    if ours is None or not torch.allclose(ours, whole, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"teacher.weights: the logits of {name} are not a plain product of its last layer, which is not supported; "
            "take another teacher, or let it write text: python -m trainer.synthesize"
        )
