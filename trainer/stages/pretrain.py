"""Pretrains: predicts the next token of a stream of token shards."""

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from core import storage
from core.data import manifest
from core.data.manifest import Manifest
from core.data.vocabulary import Vocabulary
from core.errors import ConfigError, DataError, StorageError
from core.figures import quantity
from core.settings.model import flops_per_token
from core.settings.training import PretrainConfig, of_length
from trainer.checkpoint.load import Restored
from trainer.data.cache import ShardCache
from trainer.data.loader import Batches, TokenSource
from trainer.distributed.process_group import Ranks, StopCheck, on_main
from trainer.evals.validation import ValidationLoss
from trainer.model.gpt import GPT
from trainer.stages.stage import Stage, Validation
from trainer.weights.open import vocabulary_at

log = logging.getLogger("train")


class NextToken(nn.Module):
    """Mean cross-entropy of a (B, T + 1) micro-batch."""

    def __init__(self, model: GPT, share: float):
        super().__init__()
        self.model = model
        self.share = share

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens[:, :-1], tokens[:, 1:], share=self.share)


class Pretrain(Stage):
    name = "pretrain"
    settings: PretrainConfig

    def __init__(self, settings: PretrainConfig, ranks: Ranks):
        # data.url is stored with the weights and may be opened from another working folder, so it is made absolute.
        data = dataclasses.replace(settings.data, url=storage.lasting(settings.data.url))
        settings = dataclasses.replace(settings, data=data)
        self.data = on_main(functools.partial(manifest.read, settings.data.url), ranks)
        check_vocabulary(settings, self.data)
        if settings.train.epochs:
            tokens = settings.train.epochs * self.data.split("train", settings.data.url).tokens
            train = of_length(settings.train, tokens, settings.batch.tokens_per_step)
            settings = dataclasses.replace(settings, train=train)
        super().__init__(settings, settings.model, settings.model.context, ranks)
        self.settings = dataclasses.replace(self.settings, model=self.model)
        self.round_robin = settings.optimizer.zero == 2

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def fill(self, model: GPT, restored: Restored | None) -> None:
        if not restored:
            model.initialise(self.settings.train.seed)

    def describe_data(self, model: GPT) -> list[str]:
        train, flops, count = self.data.splits["train"], flops_per_token(self.model), model.parameter_count()
        per_parameter = self.settings.batch.tokens_per_step * self.steps / count
        shards = ", ".join(f"{name} {len(split.shards):,}" for name, split in self.data.splits.items())
        return [
            f"model: {count:,} parameters, {quantity(flops)} FLOPs per token, {per_parameter:.3g} tokens per parameter",
            f"data: {quantity(train.tokens)} training tokens, {self.validation_tokens:,} validation tokens, "
            f"fingerprint {self.data.fingerprint[:12]}; shards: {shards}",
        ]

    def describe_epochs(self) -> str:
        tokens = self.settings.batch.tokens_per_step * self.steps
        return f" = {tokens / self.data.splits['train'].tokens:.2f} epochs"

    def objective(self, model: GPT, share: float) -> nn.Module:
        return NextToken(model, share)

    def batches(self, first_step: int) -> Batches:
        settings, length, seed = self.settings, self.context, self.settings.train.seed
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
            round_robin=self.round_robin,
        )

    def validation(self) -> Validation | None:
        validation = self.validation_loss()
        if validation is None:
            return None

        def measure(model: GPT, check_stop: StopCheck | None = None) -> Mapping[str, float]:
            return {"val_loss": validation(model, check_stop), "eval_tokens": validation.tokens}

        return measure

    @property
    def validation_tokens(self) -> int:
        split = self.data.splits.get("val")
        return split.tokens if split else 0

    def validation_loss(self) -> ValidationLoss | None:
        settings = self.settings
        tokens, window = self.validation_tokens, self.context + 1
        if tokens < window:
            few = f"{tokens} validation tokens, fewer than one window of {window}" if tokens else "no validation tokens"
            log.warning("%s has %s, so there is no validation loss", settings.data.url, few)
            return None
        return ValidationLoss(
            self._cache("val"),
            self.context,
            settings.train.eval_tokens,
            settings.batch.micro_batch_size,
            self.ranks,
            self.precision,
        )

    @property
    def data_url(self) -> str:
        return self.settings.data.url

    def read_vocabulary(self) -> Vocabulary:
        return vocabulary_at(self.settings.data.url, [self.settings.data.url])

    def check_stored(self) -> None:
        self.data.split("train", self.settings.data.url)
        check_shards(self.settings.data.url, self.data)

    def _cache(self, split: str) -> ShardCache:
        data = self.settings.data
        folder = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_folder()
        return ShardCache(data.url, self.data, split, folder, data.cache_gb * 1e9)


def default_cache_folder() -> Path:
    """The default folder for cached shards, in the system's temporary folder. All runs of this user share it."""
    import getpass  # imported here, because only this default needs the module

    return Path(tempfile.gettempdir()) / f"token-shards-{getpass.getuser()}"


def check_shards(data_url: str, data: Manifest) -> None:
    """Raises DataError unless all shards are stored with the sizes in the manifest.

    If the store can be read but not listed, the shards are not checked.
    """
    shards = {storage.join(data_url, shard.name): shard for split in data.splits.values() for shard in split.shards}
    try:
        stored = {
            info.uri: info.size
            for folder in {uri.rpartition("/")[0] for uri in shards}
            for info in storage.list_objects(folder)
        }
    except StorageError as error:
        log.debug("the shards of %s are not checked: %s", data_url, error)
        return
    for uri, shard in shards.items():
        if uri not in stored:
            raise DataError(
                f"{uri}: this shard of the manifest is missing; copy it again, or delete the set and prepare it again"
            )
        if stored[uri] != shard.bytes:
            raise DataError(
                f"{uri}: has {stored[uri]:,} bytes, the manifest says {shard.bytes:,}; copy it again, or delete "
                "the set and prepare it again"
            )


def check_vocabulary(settings: PretrainConfig, data: Manifest) -> None:
    """Raises ConfigError unless the model has a row for every token id of the data."""
    tokenizer = data.tokenizer
    if tokenizer.name != "gpt2":
        raise ConfigError(
            f"{settings.data.url}: was made with tokenizer {tokenizer.name!r}, this model needs 'gpt2'; "
            "prepare the data with it"
        )
    if tokenizer.vocab_size > settings.model.padded_vocab_size:
        raise ConfigError(
            f"model.padded_vocab_size is {settings.model.padded_vocab_size}, fewer than the {tokenizer.vocab_size} "
            f"tokens of {settings.data.url}; "
            f"set it to {-(-tokenizer.vocab_size // 128) * 128}"
        )
