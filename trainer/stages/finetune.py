"""Fine-tunes on the answers of conversations. A row packs several conversations, none of which attends to another.

The loss of a step is the mean over all answer tokens of the step. Each token has the same weight, independent of its
micro-batch and of the number of ranks.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from core.data.chat_template import NO_TARGET
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.settings.tuning import FinetuneConfig
from trainer.data.examples import Examples, NumberedBatches, Texts, pack, read_conversations
from trainer.distributed.process_group import StopCheck, divide_over_ranks
from trainer.model.gpt import GPT
from trainer.model.precision import autocast
from trainer.stages.stage import Validation
from trainer.stages.tuning import Tuning, to_device


class Packed(NamedTuple):
    """A micro-batch. Its loss is `weight` times the mean over its answer tokens.

    The mean of these losses over all micro-batches of a step is the mean over all answer tokens of the step.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    weight: float


class Rows:
    """Texts packed into rows. End-of-text tokens fill the rest of a row. Each of them is a text without targets."""

    def __init__(self, texts: Texts, length: int):
        self._texts = texts
        self._length = length
        self._rows = pack(texts.lengths, length)
        answers = texts.answers()
        self.answers = np.array([answers[row].sum() for row in self._rows], np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def tensors(self, numbers: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets of these rows, int32 (len(numbers), length)."""
        tokens = np.full((len(numbers), self._length), GPT2_END_OF_TEXT, np.int32)
        targets = np.full((len(numbers), self._length), NO_TARGET, np.int32)
        for place, number in enumerate(numbers):
            end = 0
            for text in self._rows[number]:
                end = self._texts.put(text, tokens[place], targets[place], end)
        return to_device(tokens, device), to_device(targets, device)


class AnswerLoss(nn.Module):
    def __init__(self, model: GPT, share: float):
        super().__init__()
        self.model = model
        self.share = share

    def forward(self, packed: Packed) -> torch.Tensor:
        share = self.share * packed.weight
        return self.model(packed.tokens_BT, packed.targets_BT, packed=True, share=share) * packed.weight


class Finetune(Tuning):
    name = "finetune"

    def read(self, settings: FinetuneConfig, encoding, length: int) -> Examples:
        return read_conversations(settings.data, encoding, length)

    @functools.cached_property
    def rows(self) -> Rows:
        return Rows(self.examples.train, self.context)

    def count_items(self) -> int:
        return len(self.rows)

    def describe_items(self) -> str:
        filled = len(self.examples.train.tokens) / (len(self.rows) * self.context)
        return f"rows, {100 * filled:.1f} % filled"

    def objective(self, model: GPT, share: float) -> nn.Module:
        return AnswerLoss(model, share)

    def batches(self, first_step: int) -> NumberedBatches:
        train, batch = self.settings.train, self.settings.batch
        return NumberedBatches(
            len(self.rows),
            train.seed,
            0 if train.overfit else first_step,
            batch=self.items_per_step,
            micro_batch_size=batch.micro_batch_size,
            rank=self.share_rank,
            world=self.share_world,
            make=self._micro_batch,
            skip=train.skip_steps,
        )

    def _micro_batch(self, of_step: np.ndarray, mine: np.ndarray) -> Packed:
        micro_batches = self.accumulation * self.share_world
        share = self.rows.answers[mine].sum() / self.rows.answers[of_step].sum()
        return Packed(*self.rows.tensors(mine, self.ranks.device), float(share * micro_batches))

    def validation(self) -> Validation | None:
        if not len(self.examples.val):
            return None
        rows = Rows(self.examples.val, self.context)
        size = self.settings.batch.micro_batch_size
        count = min(len(rows), max(1, self.settings.train.eval_tokens // self.context))
        groups = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]

        @torch.no_grad()
        def measure(model: GPT, check_stop: StopCheck | None = None) -> Mapping[str, float]:
            def loss(index: int) -> list[float]:
                tokens_BT, targets_BT = rows.tensors(groups[index], self.ranks.device)
                with autocast(self.ranks.device, self.precision):
                    return [float(model(tokens_BT, targets_BT, packed=True))]

            model.eval()
            answers = [int(rows.answers[group].sum()) for group in groups]
            losses = divide_over_ranks(len(groups), loss, self.ranks, check_stop)
            model.train()
            total = sum(answers[index] * losses[index][0] for index in range(len(groups)))
            return {"val_loss": total / sum(answers), "eval_tokens": sum(answers)}

        return measure
