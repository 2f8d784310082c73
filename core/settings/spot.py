"""Refuses spot machines for a run that would store no checkpoint, and says how long that run would take."""

import math

from core.settings.training import TrainingConfig

EXAMPLE_HOURS = 24.0


def too_few_checkpoints(config: TrainingConfig, hours: float | None = None) -> str:
    """A sentence that says why a config's checkpoints are too rare for spot machines, with the calculation.

    The result is "" if they come often enough. `hours` is the expected length of the run. If it is unknown, 24 hours
    are assumed. A run is refused if its first checkpoint is due after its last step. Interruptions come at random, on
    average M hours apart (`checkpoint.expected_hours_between_failures`). A run of T hours that must restart from the
    beginning each time takes M (e^(T/M) - 1) hours on average. If `every_steps` is 0, checkpoints come at the interval
    that costs least.
    """
    every, apart = config.checkpoint.every_steps, config.checkpoint.expected_hours_between_failures
    if every < config.train.steps:
        return ""
    length = EXAMPLE_HOURS if hours is None else hours
    paid = apart * math.expm1(min(length / apart, 50.0))
    return (
        f"checkpoint.every_steps is {every:,} and train.steps is {config.train.steps:,}, so that a spot machine that "
        f"is taken away loses everything. With an interruption every {apart:g} hours "
        f"(checkpoint.expected_hours_between_failures), {length:.3g} h of training take {apart:g} x "
        f"(e^({length:.3g}/{apart:g}) - 1) = {paid:,.0f} paid hours; set checkpoint.every_steps=0, which saves as "
        "often as costs least, or train on demand"
    )
