"""Decides when a run with `train.overfit` has reached its goal."""

import logging

from core.errors import TrainingError
from core.settings.training import TrainLoopConfig

log = logging.getLogger("train")


def is_overfitted(train: TrainLoopConfig, loss: float | None) -> bool:
    """Whether a run with `train.overfit` has reached its goal with this loss."""
    return train.overfit and loss is not None and loss < train.overfit_max_loss


def check_overfit(step: int, train: TrainLoopConfig, loss: float | None) -> None:
    """After the last step of a run with `train.overfit`: raises TrainingError unless the goal is reached."""
    if not train.overfit or loss is None:
        return
    bound = f"train.overfit_max_loss = {train.overfit_max_loss:g}"
    if not is_overfitted(train, loss):
        raise TrainingError(
            f"step {step}: with one micro-batch repeated the loss is {loss:.4f}, not below {bound}; "
            "if the loss was still falling, start a new run (another run.url) with more train.steps; else look at "
            "optimizer.lr and at the changes to the model"
        )
    log.info("step %d: the model has memorized the micro-batch: loss %.4f is below %s", step, loss, bound)
