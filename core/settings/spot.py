"""Says what a spot machine without checkpoints would cost in time, and refuses it."""

import math

from core.figures import duration
from core.settings.training import TrainingConfig

EXAMPLE_HOURS = 24.0


def too_few_checkpoints(config: TrainingConfig, hours: float | None = None) -> str:
    """Why a config's checkpoints are too rare for spot, with the arithmetic; "" if they are not.

    `hours` is the expected length of the run; if it is not known, the arithmetic is that of 24. A run is refused if no
    checkpoint is due before its last step. Interruptions come at random, on average M hours apart
    (`checkpoint.expected_hours_between_failures`). A run of T hours that can only start again takes M (e^(T/M) - 1)
    hours until it once gets through.
    """
    every, apart = config.checkpoint.every_steps, config.checkpoint.expected_hours_between_failures
    if every:
        if every < config.train.steps:
            return ""
        rare = f"checkpoint.every_steps is {every:,}, and the run has {config.train.steps:,} steps"
    else:
        longest = config.checkpoint.max_lost_seconds / 3600
        if hours is None or longest < hours:
            return ""
        rare = f"checkpoint.max_lost_seconds is {duration(3600 * longest)}, as long as the run"
    length = EXAMPLE_HOURS if hours is None else hours
    paid = apart * math.expm1(min(length / apart, 50.0))
    return (
        f"no checkpoint would be stored on spot before the end: {rare}. With an interruption every {apart:g} hours "
        f"(checkpoint.expected_hours_between_failures), {length:.3g} h of training take "
        f"{apart:g} x (e^({length:.3g}/{apart:g}) - 1) = {paid:,.3g} paid hours; set checkpoint.every_steps=0, which "
        "saves as often as costs least, or train on demand"
    )
