"""Pretraining: the next token of a stream of token shards."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import storage
from core.data import manifest
from core.data.vocabulary import read as read_vocabulary
from core.settings import loader
from core.settings.training import TrainConfig
from trainer.checkpoint.load import Restored
from trainer.data.cache import ShardCache
from trainer.data.loader import Batches, TokenSource
from trainer.distributed.in_turn import Between
from trainer.distributed.process_group import Ranks, on_main
from trainer.evals.validation import ValidationLoss
from trainer.model.gpt import GPT
from trainer.stages import plan
from trainer.stages.stage import HeldOut, Stage, default_cache_dir

log = logging.getLogger("train")


class NextToken(nn.Module):
    """Mean cross-entropy of a (B, T + 1) micro-batch."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens[:, :-1], tokens[:, 1:])


class Pretrain(Stage):
    name = "pretrain"

    def __init__(self, settings: TrainConfig, ranks: Ranks):
        self.data = on_main(functools.partial(manifest.read, settings.data.url), ranks)
        plan.check_vocabulary(settings, self.data)
        super().__init__(settings, ranks)

    @property
    def dealt(self) -> bool:
        return self.settings.optimizer.zero == 2

    @property
    def config(self) -> Mapping[str, Any]:
        return loader.to_dict(self.settings)

    @property
    def identity(self) -> Mapping[str, Any]:
        return loader.identity(self.settings)

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def fill(self, model: GPT, restored: Restored | None) -> None:
        if not restored:
            model.initialise(self.settings.train.seed)

    def describe(self, model: GPT) -> str:
        return plan.describe(self.settings, model, self.data, self.accumulation, self.ranks)

    def objective(self, model: GPT) -> nn.Module:
        return NextToken(model)

    def batches(self, first_step: int) -> Batches:
        settings = self.settings
        length, seed = settings.model.context, settings.train.seed
        return Batches(
            TokenSource(self._cache("train"), length, seed, settings.data.shards_mixed),
            0 if settings.train.overfit else first_step,
            batch=settings.batch.tokens_per_step // length,
            micro_batch_size=settings.batch.micro_batch_size,
            rank=self.share_rank,
            world=self.share_world,
            prefetch=settings.data.prefetch,
            device=self.ranks.device,
            fetches=self.ranks.local_rank == 0,
            skip=settings.train.skip_steps,
            dealt=self.dealt,
        )

    def held_out(self) -> HeldOut | None:
        validation = self.validation()
        if validation is None:
            return None

        def measure(model: GPT, between: Between | None = None) -> Mapping[str, float]:
            return {"val_loss": validation(model, between), "eval_tokens": validation.tokens}

        return measure

    def validation(self) -> ValidationLoss | None:
        settings = self.settings
        tokens, window = self.data.splits["val"].tokens, settings.model.context + 1
        if tokens < window:
            few = f"{tokens} validation tokens, fewer than one window of {window}" if tokens else "no validation tokens"
            log.warning("%s has %s, so there is no validation loss", settings.data.url, few)
            return None
        return ValidationLoss(
            self._cache("val"),
            settings.model.context,
            settings.train.eval_tokens,
            settings.batch.micro_batch_size,
            self.ranks,
            self.precision,
        )

    @functools.cached_property
    def encoding(self):
        return read_vocabulary(storage.join(self.settings.data.url, self.data.tokenizer.vocab_file)).encoding()

    def _cache(self, split: str) -> ShardCache:
        data = self.settings.data
        folder = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
        return ShardCache(data.url, self.data, split, folder, data.cache_gb * 1e9)
