"""Determines the batch of a run: the largest micro-batch that fits, and its division over the ranks.

If `batch.micro_batch_size` is 0, the first segment of a run determines how many sequences fit. The segment uses the
estimate of core.settings.memory. On a GPU, it also tries a forward and a backward pass. Later segments use the size
that the first segment found, on any machine, because the bits of the sums depend on the size.

If `train.overfit` is set, the run repeats one micro-batch until its loss is below a bound. This tests whether the model
can learn at all.
"""

import dataclasses
import logging
import os

import torch

from core.errors import ConfigError
from core.figures import counted
from core.settings.memory import Training, advice, changed_to, estimate, possible
from core.settings.model import ModelConfig
from core.settings.training import BatchConfig, TrainingConfig, TrainLoopConfig
from trainer.distributed.process_group import Ranks, gather_numbers
from trainer.model.gpt import GPT
from trainer.model.precision import autocast, resolve

log = logging.getLogger("train")

CPU_SHARE = 0.5  # share of the free memory that training may use; the rest is for the page cache of the shards


def with_micro_batch(settings: Training, model: ModelConfig, found_before: int | None, ranks: Ranks) -> Training:
    """The settings with a micro-batch size that fits. Raises ConfigError if no size fits.

    `model.context` is the length of the sequences. `found_before` is the size that the run's first segment stored.
    """
    if settings.batch.micro_batch_size or found_before:
        settings = changed_to(settings, "batch.micro_batch_size", settings.batch.micro_batch_size or found_before)
        if not found_before and ranks.device.type == "cuda":
            _check(settings, model, ranks)
        return settings
    candidates = possible(settings, model, ranks.world)
    memory = _memory_bytes(ranks)
    fitting = [size for size in candidates if estimate(settings, model, size, ranks.world) <= memory]
    if not fitting:
        raise ConfigError(_too_large(settings, model, candidates[-1], ranks, memory))
    size = fitting[0]
    if ranks.device.type == "cuda":
        size = next((each for each in fitting if _trial(model, each, settings.train, ranks)), 0)
        if not size:
            raise ConfigError(_too_large(settings, model, fitting[-1], ranks, memory))
    log.info("batch.micro_batch_size: %s", "1 sequence fits" if size == 1 else f"{size} sequences fit")
    return changed_to(settings, "batch.micro_batch_size", size)


def accumulation(batch: BatchConfig, context: int, world: int, has_begun: bool = False) -> int:
    """The number of micro-batches per rank and step. Raises ConfigError if this number is not the same for all ranks.

    If the run `has_begun`, its batch cannot change, and the error proposes only another number of ranks.
    """
    micro_batches = batch.tokens_per_step // (batch.micro_batch_size * context)
    if micro_batches % world:
        fewer = next(count for count in range(world, 0, -1) if micro_batches % count == 0)
        more = next((count for count in range(world + 1, micro_batches + 1) if micro_batches % count == 0), None)
        remedy = f"start {counted(fewer, 'rank')}{f', or {more}' if more else ''}"
        raise ConfigError(
            f"batch.tokens_per_step = {batch.tokens_per_step} makes {counted(micro_batches, 'micro-batch')} "
            f"of {batch.micro_batch_size} x {context} tokens, "
            f"which do not divide over {counted(world, 'rank')}; {remedy}"
            + (": the batch of a run that has begun is fixed" if has_begun else _other_batch(batch, context, world))
        )
    return micro_batches // world


def _other_batch(batch: BatchConfig, context: int, world: int) -> str:
    """The nearest batch that divides over `world` ranks, as a setting of a new run."""
    sequences, size = batch.tokens_per_step // context, batch.micro_batch_size
    parity = 2 if size % 2 == 0 else 1  # pairs of preferences need an even size
    smaller = [each for each in range(size, 0, -1) if sequences % (each * world) == 0 and each % parity == 0]
    if smaller:
        return f", or set batch.micro_batch_size={smaller[0]}"
    unit = size * context * world
    return f", or set batch.tokens_per_step={max(1, round(batch.tokens_per_step / unit)) * unit}"


def one_micro_batch(settings: Training, model: ModelConfig, context: int) -> tuple[Training, ModelConfig]:
    """Settings and model for `train.overfit`: a batch of one micro-batch, a constant rate, no dropout, and evaluations
    at the end only.

    Every rank computes the same micro-batch. Dropout would keep the loss from falling.
    """
    batch = dataclasses.replace(settings.batch, tokens_per_step=settings.batch.micro_batch_size * context)
    optimizer = dataclasses.replace(settings.optimizer, warmup_steps=0, cooldown_fraction=0.0)
    train = dataclasses.replace(settings.train, eval_every=0, hellaswag_every=0, sample_every=0)
    model = dataclasses.replace(model, dropout=0.0)
    return dataclasses.replace(settings, batch=batch, optimizer=optimizer, train=train), model


def _check(settings: TrainingConfig, model: ModelConfig, ranks: Ranks) -> None:
    memory = _memory_bytes(ranks)
    if estimate(settings, model, settings.batch.micro_batch_size, ranks.world) > memory:
        raise ConfigError(_too_large(settings, model, settings.batch.micro_batch_size, ranks, memory))


def _too_large(settings: TrainingConfig, model: ModelConfig, size: int, ranks: Ranks, memory: float) -> str:
    needed = estimate(settings, model, size, ranks.world)
    name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "this machine"
    said = f"batch.micro_batch_size = {size} needs about {needed / 1e9:.1f} GB per rank, "
    said += f"{name} has {memory / 1e9:.1f} GB free"
    return f"{said}; {advice(settings, model, ranks.world, memory)}"


def _trial(model: ModelConfig, size: int, train: TrainLoopConfig, ranks: Ranks) -> bool:
    """Whether one forward and backward pass fit on every rank."""
    fits = True
    try:
        with torch.device(ranks.device):
            trial = GPT(model, train.activation_checkpointing, train.residual)
        tokens = torch.zeros(size, model.context, dtype=torch.int32, device=ranks.device)
        with autocast(ranks.device, resolve(train.precision, ranks.device)):
            loss = trial(tokens, tokens)
        loss.backward()
    except torch.OutOfMemoryError:
        fits = False
    finally:
        trial = tokens = loss = None
        torch.cuda.empty_cache()
    return bool(gather_numbers([float(fits)], ranks).all())


def _memory_bytes(ranks: Ranks) -> float:
    """The bytes that each rank may use. This is the smallest number of all ranks."""
    if ranks.device.type == "cuda":
        mine = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        mine = CPU_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks.local_world
    return float(gather_numbers([mine], ranks).min())
