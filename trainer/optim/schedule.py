"""Learning rate by step."""

import math

from core.schema import OptimizerConfig


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate at optimizer step `step` (1 .. steps).

    A linear warm-up, then the peak, then over the last `cooldown` share of the steps down to `min_lr_ratio` at the
    last one: along a cosine (Loshchilov & Hutter 2017; with cooldown 1 the schedule of Brown et al. 2020, appendix B)
    or a line (warm-up, stable, decay: Hu et al. 2024, "MiniCPM", section 4; Hägele et al. 2024).
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    begin = max(config.warmup_steps, steps - round(config.cooldown * steps))
    progress = min(1.0, max(0, step - begin) / max(1, steps - begin))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left
