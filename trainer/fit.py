"""Does it fit? The memory of a run, estimated before anything is allocated, and the largest micro-batch.

With `batch.micro_batch: 0` the first segment of a run finds the most sequences that fit: by the estimate
(core.architecture.training_bytes), on a GPU confirmed by a trial of forward and backward pass. Later segments use
what the first one found, whatever machine they run on, because sums depend on it.
"""

import dataclasses
import logging
import os
from typing import Any

import torch

from core.architecture import ModelConfig, training_bytes
from core.errors import ConfigError
from core.schema import TrainConfig
from trainer.distributed import Ranks, gather_numbers
from trainer.model.gpt import GPT
from trainer.precision import autocast, resolve

log = logging.getLogger("train")

LARGEST = 128  # sequences; more are never faster
CPU_SHARE = 0.5  # of the memory that is free, which also holds the page cache that the shards live in


def with_micro_batch(settings: TrainConfig, found_before: int | None, ranks: Ranks) -> TrainConfig:
    """The settings with a micro-batch size, and proof that they fit. Raises ConfigError if nothing does.

    `found_before` is what the run's first segment settled on.
    """
    if settings.batch.micro_batch or found_before:
        settings = _with(settings, "batch.micro_batch", settings.batch.micro_batch or found_before)
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
    log.info("batch.micro_batch: %d sequences fit", size)
    return _with(settings, "batch.micro_batch", size)


def possible(settings: TrainConfig, world: int) -> list[int]:
    """Micro-batch sizes that divide the batch over `world` ranks, largest first. Raises ConfigError if none does."""
    sequences = settings.batch.tokens // settings.model.context
    sizes = [size for size in range(min(LARGEST, sequences), 0, -1) if sequences % (size * world) == 0]
    if not sizes:
        raise ConfigError(
            f"batch.tokens = {settings.batch.tokens} is {sequences} sequences of {settings.model.context}, which do "
            f"not divide over {world} ranks; make it a multiple of {world * settings.model.context}"
        )
    return sizes


def estimate(settings: TrainConfig, micro_batch: int, world: int) -> float:
    """Bytes on one device."""
    accumulation = max(1, settings.batch.tokens // (micro_batch * settings.model.context * world))
    return training_bytes(
        settings.model,
        micro_batch,
        accumulation,
        world,
        shard=settings.optimizer.shard,
        deal_sums=settings.optimizer.deal_sums,
        muon=settings.optimizer.name == "muon",
        recompute=settings.train.recompute,
    )


def _check(settings: TrainConfig, ranks: Ranks) -> None:
    memory = _memory_bytes(ranks)
    if estimate(settings, settings.batch.micro_batch, ranks.world) > memory:
        raise ConfigError(_too_large(settings, settings.batch.micro_batch, ranks, memory))


def _too_large(settings: TrainConfig, size: int, ranks: Ranks, memory: float) -> str:
    needed = estimate(settings, size, ranks.world)
    name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "this machine"
    said = (
        f"batch.micro_batch = {size} needs about {needed / 1e9:.1f} GB per rank, {name} has {memory / 1e9:.1f} GB free"
    )
    return f"{said}; {advice(settings, ranks.world, memory)}"


def advice(settings: TrainConfig, world: int, memory: float) -> str:
    """The nearest settings that fit, in order of what they cost in speed."""
    remedies = ["optimizer.shard", "optimizer.deal_sums"] if world > 1 else []
    remedies = [key for key in (*remedies, "train.recompute") if not _get(settings, key)]
    for count in range(len(remedies) + 1):
        changed = settings
        for key in remedies[:count]:
            changed = _with(changed, key, True)
        for size in possible(settings, world):
            if estimate(changed, size, world) <= memory:
                flags = [f"--batch.micro_batch={size}", *(f"--{key}=true" for key in remedies[:count])]
                return f"try {' '.join(flags)}"
    return "no setting of this preset fits; take more or larger GPUs, or a smaller preset"


def _get(settings: TrainConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(settings, section), name)


def _with(settings: TrainConfig, key: str, value: Any) -> TrainConfig:
    section, name = key.split(".")
    return dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **{name: value})})


def _trial(model: ModelConfig, size: int, train, ranks: Ranks) -> bool:
    """Whether one forward and backward pass fit on every rank."""
    fits = True
    try:
        with torch.device(ranks.device):
            trial = GPT(model, train.recompute)
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
