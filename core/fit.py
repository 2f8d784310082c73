"""Does a training config fit a GPU's memory, and if not, which settings nearest to it do? By estimate alone.

    estimate(settings, micro_batch=32, world=8) <= memory_bytes("A100")

Torch-free, so that a check before launch says what the trainer would say on the machine. `memory` is what a rank may
use, in bytes.
"""

import dataclasses
from typing import Any

from core.architecture import training_bytes
from core.errors import ConfigError
from core.schema import TrainConfig

LARGEST = 128  # sequences; more are never faster


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


def advice(settings: TrainConfig, world: int, memory: float) -> str:
    """The nearest settings that fit, in order of what they cost in speed."""
    remedies = ["optimizer.shard", "optimizer.deal_sums"] if world > 1 else []
    remedies = [key for key in (*remedies, "train.recompute") if not _get(settings, key)]
    for count in range(len(remedies) + 1):
        changed = settings
        for key in remedies[:count]:
            changed = changed_to(changed, key, True)
        for size in possible(settings, world):
            if estimate(changed, size, world) <= memory:
                flags = [f"--batch.micro_batch={size}", *(f"--{key}=true" for key in remedies[:count])]
                return f"try {' '.join(flags)}"
    return "no setting of this preset fits; take more or larger GPUs, or a smaller preset"


def changed_to(settings: TrainConfig, key: str, value: Any) -> TrainConfig:
    """The same settings with another value of section.name."""
    section, name = key.split(".")
    return dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **{name: value})})


def _get(settings: TrainConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(settings, section), name)
