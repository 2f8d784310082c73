"""What a run is going to do, checked before it costs anything: vocabulary, batch, length."""

from core.data.manifest import Manifest
from core.errors import ConfigError
from core.figures import quantity
from core.settings import loader
from core.settings.model import flops_per_token
from core.settings.training import TrainConfig
from trainer.distributed.process_group import Ranks
from trainer.model.gpt import GPT
from trainer.stages import overfit


def check_vocabulary(settings: TrainConfig, data: Manifest) -> None:
    """The model must have a row for every token id of the data."""
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


def accumulation_of(settings: TrainConfig, world: int) -> int:
    """Micro-batches per rank and step. Raises ConfigError if they do not divide."""
    micro_batches = settings.batch.tokens_per_step // (settings.batch.micro_batch_size * settings.model.context)
    if micro_batches % world:
        possible = next(count for count in range(world, 0, -1) if micro_batches % count == 0)
        raise ConfigError(
            f"batch.tokens_per_step = {settings.batch.tokens_per_step} makes {micro_batches} micro-batches "
            f"of {settings.batch.micro_batch_size} x {settings.model.context} tokens, "
            f"which do not divide over {world} ranks; start {possible} ranks, or lower batch.micro_batch_size"
        )
    return micro_batches // world


def describe(settings: TrainConfig, model: GPT, data: Manifest, accumulation: int, ranks: Ranks) -> str:
    """The numbers that the run follows from, in order."""
    flops = flops_per_token(settings.model)
    available = data.splits["train"].tokens
    if settings.train.overfit:
        batch_and_length = overfit.describe(settings, ranks)
    else:
        batch_and_length = _batch_and_length(settings, accumulation, ranks, available)
    return "\n".join(
        [
            "settings:\n" + loader.to_yaml(settings).rstrip(),
            f"model: {model.parameter_count():,} parameters, {quantity(flops)} FLOPs per token",
            f"data: {quantity(available)} training tokens, {data.splits['val'].tokens:,} validation tokens, "
            f"fingerprint {data.fingerprint[:12]}",
            *batch_and_length,
        ]
    )


def _batch_and_length(settings: TrainConfig, accumulation: int, ranks: Ranks, available: int) -> list[str]:
    tokens = settings.batch.tokens_per_step * settings.train.steps
    return [
        f"batch: {settings.batch.tokens_per_step:,} tokens = {settings.batch.micro_batch_size} sequences x "
        f"{settings.model.context} tokens x {accumulation} micro-batches x "
        f"{ranks.world} ranks on {ranks.device.type}",
        f"length: {settings.train.steps:,} steps = {quantity(tokens)} tokens = {tokens / available:.2f} epochs",
    ]
