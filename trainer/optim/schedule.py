"""Learning rate by step."""

import math

from core.schema import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step `step` (1 .. steps): linear warm-up, then a cosine down to `min_lr_ratio` of the peak
    at the last step (Loshchilov & Hutter 2017; Brown et al. 2020, appendix B)."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
