"""Trains by direct preference optimisation (Rafailov et al. 2023, "Direct Preference Optimization", equation 7).

The reference is the model that the run starts from. Its log-probabilities are computed once, before the first step, and
stored with the run. So only one model is in memory, and a resumed run uses the same numbers.

Shapes: P pairs, (P, 2) numbers of the chosen and the rejected answer, B = 2 P sequences, T positions.
"""

import functools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import nn

from core import storage, untrusted
from core.data.chat_template import NO_TARGET
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import CheckpointError, ObjectNotFound
from core.run.folder import RunFolder
from core.settings.tuning import DpoConfig
from trainer.data.examples import Examples, NumberedBatches, Texts, read_preferences
from trainer.distributed.process_group import Ranks, StopCheck, divide_over_ranks, on_main
from trainer.model.gpt import GPT
from trainer.model.loss import token_log_probs, with_share
from trainer.model.precision import autocast
from trainer.stages.stage import Validation
from trainer.stages.tuning import Tuning, to_device
from trainer.weights.open import open_weights

log = logging.getLogger("train")

MULTIPLE = 64  # padded lengths are multiples of this, because each new shape is compiled


class Pairs(NamedTuple):
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    reference_P2: torch.Tensor


def answer_log_probs(model: GPT, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """The sum of the log-probabilities of all targets of each sequence, float32 (B,)."""
    counts_BT = targets_BT != NO_TARGET
    x_ND = model.hidden(tokens_BT)[counts_BT]
    log_probs_N = token_log_probs(x_ND, model.head, targets_BT[counts_BT], model.config.logit_softcap)
    # Scatter the values, then sum each row. On a GPU, a sum by index would not give the same bits each time.
    return torch.zeros_like(targets_BT, dtype=torch.float32).masked_scatter(counts_BT, log_probs_N).sum(1)


def margins(policy_P2: torch.Tensor, reference_P2: torch.Tensor, beta: float) -> torch.Tensor:
    """The reward of the chosen answer minus the reward of the rejected one, (P,)."""
    rewards_P2 = beta * (policy_P2 - reference_P2)
    return rewards_P2[:, 0] - rewards_P2[:, 1]


def preference_losses(margins_P: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """The loss of each pair, (P,). Label smoothing gives the conservative form (Mitchell 2023)."""
    right, wrong = -F.logsigmoid(margins_P), -F.logsigmoid(-margins_P)
    return (1 - label_smoothing) * right + label_smoothing * wrong


class PreferenceLoss(nn.Module):
    def __init__(self, model: GPT, share: float, beta: float, label_smoothing: float):
        super().__init__()
        self.model = model
        self.share = share
        self.beta = beta
        self.label_smoothing = label_smoothing

    def forward(self, pairs: Pairs) -> torch.Tensor:
        policy_P2 = answer_log_probs(self.model, pairs.tokens_BT, pairs.targets_BT).view(-1, 2)
        losses_P = preference_losses(margins(policy_P2, pairs.reference_P2, self.beta), self.label_smoothing)
        return with_share(losses_P.mean(), self.share)


class Dpo(Tuning):
    name = "dpo"
    sequences_per_item = 2
    lengths_vary = True
    flops_per_token = None  # not counted, because the rows differ in length

    settings: DpoConfig

    def __init__(self, settings: DpoConfig, ranks: Ranks):
        super().__init__(settings, ranks)
        self._reference: dict[str, np.ndarray] = {}

    def read(self, settings: DpoConfig, encoding, length: int) -> Examples:
        return read_preferences(settings.data, encoding, length)

    def count_items(self) -> int:
        return len(self.examples.train) // 2

    def describe_items(self) -> str:
        return "pairs"

    def objective(self, model: GPT, share: float) -> nn.Module:
        return PreferenceLoss(model, share, self.settings.dpo.beta, self.settings.dpo.label_smoothing)

    def batches(self, first_step: int) -> NumberedBatches:
        self._reference = self._stored_reference() or self._new_reference()
        train = self.settings.train
        return NumberedBatches(
            self.count_items(),
            train.seed,
            0 if train.overfit else first_step,
            batch=self.items_per_step,
            micro_batch_size=self.settings.batch.micro_batch_size // 2,
            rank=self.share_rank,
            world=self.share_world,
            make=lambda _, mine: self._pairs("train", mine),
            skip=train.skip_steps,
        )

    def validation(self) -> Validation | None:
        texts = self.examples.val
        if not len(texts):
            return None
        count = min(len(texts), max(2, self.settings.train.eval_tokens // self.context)) // 2
        groups = self._groups(count)
        answers = int(texts.answers()[: 2 * count].sum())
        beta, smoothing = self.settings.dpo.beta, self.settings.dpo.label_smoothing

        @torch.no_grad()
        def measure(model: GPT, check_stop: StopCheck | None = None) -> Mapping[str, float]:
            def margins_of(index: int) -> list[float]:
                tokens_BT, targets_BT, reference_P2 = self._pairs("val", groups[index])
                policy_P2 = self._log_probs(model, tokens_BT, targets_BT)
                return margins(policy_P2, reference_P2, beta).tolist()

            model.eval()
            found = [
                margin for part in divide_over_ranks(len(groups), margins_of, self.ranks, check_stop) for margin in part
            ]
            model.train()
            losses = preference_losses(torch.tensor(found, dtype=torch.float64), smoothing)
            return {
                "val_loss": float(losses.mean()),
                "eval_tokens": answers,
                "val_reward_accuracy": sum(margin > 0 for margin in found) / len(found),
                "val_reward_margin": sum(found) / len(found),
            }

        return measure

    def _log_probs(self, model: GPT, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        # Lengths vary, and torch would compile the blocks again for each length, so compilation is off.
        with autocast(self.ranks.device, self.precision), torch.compiler.set_stance("force_eager"):
            return answer_log_probs(model, tokens_BT, targets_BT).view(-1, 2)

    def _groups(self, count: int) -> list[np.ndarray]:
        """The numbers of the pairs, grouped by forward pass, for passes outside of training."""
        size = self.settings.batch.micro_batch_size // 2
        return [np.arange(first, min(first + size, count)) for first in range(0, count, size)]

    def _pairs(self, split: str, numbers: np.ndarray) -> Pairs:
        tokens_BT, targets_BT = self._sequences(getattr(self.examples, split), numbers)
        reference_P2 = to_device(self._reference[split][numbers], self.ranks.device)
        return Pairs(tokens_BT, targets_BT, reference_P2)

    def _sequences(self, texts: Texts, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen and rejected sequences, alternating, (2 P, T), padded on the right. No token attends to padding."""
        of_pairs = np.stack([2 * numbers, 2 * numbers + 1], 1).ravel()
        longest = int((texts.starts[of_pairs + 1] - texts.starts[of_pairs]).max())
        width = min(self.context, -(-longest // MULTIPLE) * MULTIPLE)
        tokens = np.full((len(of_pairs), width), GPT2_END_OF_TEXT, np.int32)
        targets = np.full((len(of_pairs), width), NO_TARGET, np.int32)
        for place, number in enumerate(of_pairs):
            texts.put(int(number), tokens[place], targets[place], 0)
        return to_device(tokens, self.ranks.device), to_device(targets, self.ranks.device)

    def _stored_reference(self) -> dict[str, np.ndarray] | None:
        return on_main(functools.partial(_read_reference, RunFolder(self.settings.run.url).reference), self.ranks)

    @torch.no_grad()
    def _new_reference(self) -> dict[str, np.ndarray]:
        log.info("log-probabilities of %s, the reference, are computed once", self.start.where)
        model = open_weights(self.start.where, self.ranks.device).model
        found = {}
        for split in ("train", "val"):
            texts = getattr(self.examples, split)
            groups = self._groups(len(texts) // 2)

            def of_group(index: int, texts: Texts = texts, groups: list[np.ndarray] = groups) -> list[float]:
                return self._log_probs(model, *self._sequences(texts, groups[index])).flatten().tolist()

            flat = [each for part in divide_over_ranks(len(groups), of_group, self.ranks) for each in part]
            found[split] = np.array(flat, np.float32).reshape(-1, 2)
        uri = RunFolder(self.settings.run.url).reference
        on_main(functools.partial(storage.write_bytes, uri, safetensors.numpy.save(found)), self.ranks)
        return found


def _read_reference(uri: str) -> dict[str, np.ndarray] | None:
    try:
        return safetensors.numpy.load(storage.read_bytes(uri, untrusted.memory_bytes()))
    except ObjectNotFound:
        return None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{uri}: is damaged ({error}); delete it to have it computed again") from error
