"""Estimates whether a training config fits into a GPU's memory, and finds the nearest settings that fit.

    estimate(settings, model, micro_batch_size=32, world=8) <= memory_bytes("A100")
    verdict(settings, model, "A100", world=8)      (True, "A100: about 17 of 40 GB per GPU, by estimate …"), or None

Does not import torch, so that the check before a launch can use it. This check refuses a launch only if the estimate
exceeds the memory of the GPU. `memory` is in bytes per rank. `model.context` is the length of the sequences.
"""

import dataclasses
from typing import Any, TypeVar

from core.errors import ConfigError
from core.figures import counted
from core.gpus import memory_bytes
from core.settings.model import ModelConfig, training_bytes
from core.settings.training import TrainingConfig

Training = TypeVar("Training", bound=TrainingConfig)

UNCONFIRMED = "by estimate, not confirmed on a GPU yet"

LARGEST = 128  # the largest micro-batch size to try, in sequences; larger micro-batches are never faster


def possible(settings: TrainingConfig, model: ModelConfig, world: int) -> list[int]:
    """Micro-batch sizes that divide the batch over `world` ranks, largest first.

    Raises ConfigError if there is none.
    """
    sequences = settings.batch.tokens_per_step // model.context
    sizes = [size for size in range(min(LARGEST, sequences), 0, -1) if sequences % (size * world) == 0]
    if not sizes:
        raise ConfigError(
            f"batch.tokens_per_step = {settings.batch.tokens_per_step} is {counted(sequences, 'sequence')} of "
            f"{model.context}, which do not divide over {counted(world, 'rank')}; "
            f"make it a multiple of {world * model.context}"
        )
    return sizes


def estimate(settings: TrainingConfig, model: ModelConfig, micro_batch_size: int, world: int) -> float:
    """Estimated bytes that training needs on each GPU."""
    accumulation = max(1, settings.batch.tokens_per_step // (micro_batch_size * model.context * world))
    return training_bytes(
        model,
        micro_batch_size,
        accumulation,
        world,
        zero=settings.optimizer.zero,
        muon=settings.optimizer.name == "muon",
        recompute=settings.train.activation_checkpointing,
        residual=settings.train.residual,
    )


def advice(settings: TrainingConfig, model: ModelConfig, world: int, memory: float) -> str:
    """The end of a message: the flags with which training fits into `memory` bytes at the least loss of speed."""
    stages = range(settings.optimizer.zero + 1, 3) if world > 1 else ()
    remedies: list[tuple[str, Any]] = [("optimizer.zero", stage) for stage in stages]
    if not settings.train.activation_checkpointing:
        remedies.append(("train.activation_checkpointing", True))
    for count in range(len(remedies) + 1):
        taken = dict(remedies[:count])  # a higher ZeRO stage replaces a lower one
        changed = settings
        for key, value in taken.items():
            changed = changed_to(changed, key, value)
        for size in possible(settings, model, world):
            if estimate(changed, model, size, world) <= memory:
                flags = [f"--{key}={str(value).lower()}" for key, value in taken.items()]
                return f"try {' '.join([f'--batch.micro_batch_size={size}', *flags])}"
    return "no setting of this preset fits; take more or larger GPUs, or a smaller preset"


def changed_to(settings: Training, key: str, value: Any) -> Training:
    """The same settings with another value of section.name."""
    section, name = key.split(".")
    return dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **{name: value})})


def verdict(settings: TrainingConfig, model: ModelConfig, gpu: str, world: int) -> tuple[bool, str] | None:
    """Whether `settings` fit, and a sentence that names settings which fit.

    The result is None if the memory of the GPU is not known. Raises ConfigError if the batch does not divide over
    `world` ranks.
    """
    memory = memory_bytes(gpu)
    if memory is None:
        return None
    given = settings.batch.micro_batch_size
    # If the setting is 0, the trainer takes the largest micro-batch that fits.
    sizes = [given] if given else possible(settings, model, world)
    size = next((each for each in sizes if estimate(settings, model, each, world) <= memory), sizes[-1])
    need = estimate(settings, model, size, world)
    if need <= memory:
        found = "" if given else f", with {counted(size, 'sequence')} per micro-batch"
        return True, f"{gpu}: about {need / 1e9:.0f} of {memory / 1e9:.0f} GB per GPU, {UNCONFIRMED}{found}"
    needs = f"batch.micro_batch_size = {size} needs about {need / 1e9:.0f} GB per GPU ({UNCONFIRMED})"
    said = f"{gpu}: {needs}, it has {memory / 1e9:.0f}"
    return False, f"{said}; {advice(settings, model, world, memory)}"
