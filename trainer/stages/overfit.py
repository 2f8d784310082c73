"""`train.overfit`: one micro-batch again and again, until its loss is below a bound, to see that everything works.

The settings of such a run follow from the given ones, so that every preset can do it:

    batch.tokens_per_step     one micro-batch; every rank computes the same one
    optimizer        neither warm-up nor cooldown: the rate stays at its peak
    model.dropout    0: dropout would keep the loss from falling
    train.eval_every and its like    0: what one micro-batch teaches is measured once, at the end

`train.steps` is the most steps that it may take.
"""

import dataclasses

from core.settings.training import TrainConfig
from trainer.distributed.process_group import Ranks


def one_micro_batch(settings: TrainConfig) -> TrainConfig:
    """The settings, with a micro-batch size, of a run that learns one micro-batch by heart."""
    return dataclasses.replace(
        settings,
        batch=dataclasses.replace(
            settings.batch, tokens_per_step=settings.batch.micro_batch_size * settings.model.context
        ),
        optimizer=dataclasses.replace(settings.optimizer, warmup_steps=0, cooldown_fraction=0.0),
        model=dataclasses.replace(settings.model, dropout=0.0),
        train=dataclasses.replace(settings.train, eval_every=0, hellaswag_every=0, sample_every=0),
    )


def is_learned(settings: TrainConfig, loss: float | None) -> bool:
    """Whether a run with this loss has done what it is for."""
    return settings.train.overfit and loss is not None and loss < settings.train.overfit_max_loss


def describe(settings: TrainConfig, ranks: Ranks) -> list[str]:
    """Batch and length, for the log."""
    batch, train = settings.batch, settings.train
    return [
        f"batch: {batch.tokens_per_step:,} tokens = {batch.micro_batch_size} sequences x {settings.model.context} "
        f"tokens, the same ones in every step and on each of {ranks.world} ranks on {ranks.device.type}",
        f"length: until the loss is below train.overfit_max_loss = {train.overfit_max_loss:g}, "
        f"at most {train.steps:,} steps",
    ]
