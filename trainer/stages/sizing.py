"""Does it fit? The memory of a run, estimated before anything is allocated, and the largest micro-batch.

With `batch.micro_batch_size: 0` the first segment of a run finds the most sequences that fit: by the estimate
(core.settings.memory), on a GPU confirmed by a trial of forward and backward pass. Later segments use what the first
one found, whatever machine they run on, because sums depend on it.
"""

import logging
import os

import torch

from core.errors import ConfigError
from core.settings.memory import advice, changed_to, estimate, possible
from core.settings.model import ModelConfig
from core.settings.training import TrainConfig
from trainer.distributed.process_group import Ranks, gather_numbers
from trainer.model.gpt import GPT
from trainer.model.precision import autocast, resolve

log = logging.getLogger("train")

CPU_SHARE = 0.5  # of the memory that is free, which also holds the page cache that the shards live in


def with_micro_batch(settings: TrainConfig, found_before: int | None, ranks: Ranks) -> TrainConfig:
    """The settings with a micro-batch size, and proof that they fit. Raises ConfigError if nothing does.

    `found_before` is what the run's first segment settled on.
    """
    if settings.batch.micro_batch_size or found_before:
        settings = changed_to(settings, "batch.micro_batch_size", settings.batch.micro_batch_size or found_before)
        if not found_before and ranks.device.type == "cuda":
            _check(settings, ranks)
        return settings
    candidates = possible(settings, ranks.world)
    memory = _memory_bytes(ranks)
    fitting = [size for size in candidates if estimate(settings, size, ranks.world) <= memory]
    if not fitting:
        raise ConfigError(_too_large(settings, candidates[-1], ranks, memory))
    size = fitting[0]
    if ranks.device.type == "cuda":
        size = next((each for each in fitting if _trial(settings.model, each, settings.train, ranks)), 0)
        if not size:
            raise ConfigError(_too_large(settings, fitting[-1], ranks, memory))
    log.info("batch.micro_batch_size: %d sequences fit", size)
    return changed_to(settings, "batch.micro_batch_size", size)


def _check(settings: TrainConfig, ranks: Ranks) -> None:
    memory = _memory_bytes(ranks)
    if estimate(settings, settings.batch.micro_batch_size, ranks.world) > memory:
        raise ConfigError(_too_large(settings, settings.batch.micro_batch_size, ranks, memory))


def _too_large(settings: TrainConfig, size: int, ranks: Ranks, memory: float) -> str:
    needed = estimate(settings, size, ranks.world)
    name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "this machine"
    said = f"batch.micro_batch_size = {size} needs about {needed / 1e9:.1f} GB per rank, "
    said += f"{name} has {memory / 1e9:.1f} GB free"
    return f"{said}; {advice(settings, ranks.world, memory)}"


def _trial(model: ModelConfig, size: int, train, ranks: Ranks) -> bool:
    """Whether one forward and backward pass fit on every rank."""
    fits = True
    try:
        with torch.device(ranks.device):
            trial = GPT(model, train.activation_checkpointing)
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
    """What a rank may use, the least over all ranks."""
    if ranks.device.type == "cuda":
        mine = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        mine = CPU_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks.local_world
    return float(gather_numbers([mine], ranks).min())
