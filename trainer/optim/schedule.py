"""Learning rate by step."""

import math

from core.settings.training import OptimizerConfig


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate at optimizer step `step` (1 .. steps).

    A linear warm-up, then the peak, then over the last `cooldown` share of the steps down towards `min_lr_ratio`: along
    a cosine that reaches it at the last step (Loshchilov & Hutter 2017; with cooldown 1 the schedule of Brown et al.
    2020, appendix B), or a line that reaches it one step later (warm-up, stable, decay: Hu et al. 2024, "MiniCPM",
    section 4; Hägele et al. 2024).
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    begin = max(config.warmup_steps, steps - round(config.cooldown_fraction * steps))
    fallen = max(0, step - begin)
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, fallen / max(1, steps - begin))))
    else:
        left = 1 - fallen / (steps - begin + 1)  # above 0 at the last step, which a rate of 0 would waste
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left
