"""Gives the learning rate of each step, as a share of the peak rate.

The settings give the first schedule. The run's course (core.run.course) records changes of it: a cooldown that was
decided while the run trained, an extension, or a branch.
"""

import math
from collections.abc import Callable, Sequence

from core.run.course import Change, trunks
from core.settings.training import OptimizerConfig

# Shares of the steps that a cooldown takes: a fifth is enough for AdamW (Hägele et al. 2024), and Muon gains from more.
FRACTIONS = {"adamw": 0.20, "muon": 0.35}
SHAPES = {"adamw": "1-sqrt", "muon": "linear"}


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate at optimizer step `step` (1 to `steps`), as a share of the peak rate.

    The rate rises linearly during the warm-up, stays at its peak, and falls to `min_lr_ratio` over the last
    `cooldown_fraction` of the steps.
    - cosine (Loshchilov & Hutter 2017): reaches `min_lr_ratio` at the last step. With `cooldown_fraction` 1, this is
      the schedule of Brown et al. 2020, appendix B.
    - linear (Hu et al. 2024, "MiniCPM", section 4; Hägele et al. 2024): falls in a line that ends one step after the
      last step, so the rate of the last step is a little above `min_lr_ratio`.
    - wsd: stays at the peak. `Schedule` adds the cooldown, because its first step is decided during the run.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "wsd":
        return 1.0
    begin = max(config.warmup_steps, steps - round(config.cooldown_fraction * steps))
    fallen = max(0, step - begin)
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, fallen / max(1, steps - begin))))
    else:
        # This is above 0 at the last step, because a rate of 0 would waste that step.
        left = 1 - fallen / (steps - begin + 1)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left


class Schedule:
    """The rates of a run of `steps` steps. `changes` is the run's course so far. All ranks call `add` for a change."""

    def __init__(self, config: OptimizerConfig, steps: int, changes: Sequence[Change] = ()):
        self.config = config
        self.changes: list[Change] = []
        extensions = [each for each in changes if each.kind == "extend"]
        # The settings of an extended run give its new length. The steps before the extension used the old length.
        self.first_steps = extensions[0].before if extensions else steps
        self.end = self.first_steps  # the last step, as planned now
        self._fraction = config.anneal_fraction or FRACTIONS[config.name]
        shape = SHAPES[config.name] if config.anneal_shape == "auto" else config.anneal_shape
        self._power = 0.5 if shape == "1-sqrt" else 1.0
        self._trunk: Callable[[int], float] = lambda step: rate_factor(step, self.first_steps, config)
        self._legs: list[tuple[int, Callable[[int], float]]] = [(-1, self._trunk)]
        self._since = 0  # the last step before the newest warm-up of an extended run
        self._progress: Callable[[int], float] = lambda step: 0.0  # the progress of the current cooldown
        for change in changes:
            self.add(change)

    @property
    def anneals(self) -> bool:
        """Whether a cooldown is decided while the run trains."""
        return self.config.schedule == "wsd" or any(each.kind == "extend" for each in self.changes)

    @property
    def cooldown(self) -> Change | None:
        """The current cooldown. None before a cooldown is decided, and after an extension."""
        return self.changes[-1] if self.changes and self.changes[-1].is_cooldown else None

    @property
    def trunk(self) -> int | None:
        """The last step before the newest cooldown, or None before one is decided."""
        return next(reversed(trunks(self.changes)), None)

    def factor(self, step: int) -> float:
        """The learning rate of `step`, counted from 1, as a share of the peak rate."""
        return next(rate(step) for after, rate in reversed(self._legs) if after < step)

    def wanted(self, step: int) -> int:
        """The length of a cooldown that begins after `step`: a fixed share of all steps, including the cooldown.

        After a second warm-up, the cooldown is at most as long as the steps since the warm-up began, so that the rate
        rises before it falls.
        """
        share = math.ceil(self._fraction / (1 - self._fraction) * step - 1e-9)
        return max(1, min(share, step - self._since) if self._since else share)

    def is_too_short(self, step: int, cooled: int, shortest: float) -> bool:
        """Whether `cooled` steps after `step` are less than the share `shortest` of the steps."""
        return cooled < max(1, min(shortest, self._fraction) * (step + cooled - self._since))

    def last_trunk_step(self) -> int:
        """The step after which the cooldown begins if the run takes all of its steps."""
        share = round(self._fraction * self.end)
        return max(1, self.end - max(1, min(share, (self.end - self._since) // 2) if self._since else share))

    def add(self, change: Change) -> None:
        """Add a change of course. It applies to the steps after `change.step`."""
        if change.is_cooldown:
            self._add_cooldown(change)
        else:
            if change.kind == "extend":
                self.end = change.steps
            if change.warmup is not None:
                self._trunk = _climb(change)
                self._since = change.step
            self._progress = lambda step: 0.0
            self._legs.append((change.step, self._trunk))
        self.changes.append(change)

    def _add_cooldown(self, change: Change) -> None:
        """Add a cooldown, in which the rate falls from its value in the trunk.

        A re-planned cooldown keeps its progress so far. The rest of the fall is spread over the new number of steps.
        """
        before = self.cooldown
        begins = before.step if before else change.step
        if before and begins < change.step:
            top, fallen = self._top, self._progress(change.step)
        else:
            top, fallen = self._trunk(max(1, change.step)), 0.0

        def progress(step: int) -> float:
            # The progress is below 1 at the last step, because a rate of 0 would waste that step.
            return fallen + (1 - fallen) * (step - change.step) / (change.steps + 1)

        self._top, self._progress = top, progress
        self._legs.append((change.step, lambda step: top * (1 - progress(step) ** self._power)))
        self.end = change.end


def _climb(change: Change) -> Callable[[int], float]:
    """The rate rises from the factor of `change` to the peak, and stays at the peak."""
    steps = max(1, change.warmup or 0)
    return lambda step: change.factor + (1 - change.factor) * min(1.0, (step - change.step) / steps)
