"""How often to save: every so many steps, or by what saving and losing work cost.

Young (1974) and Daly (2006): with blocking cost C and mean time M between failures, the interval sqrt(2 C M) wastes
least. Here a save blocks for milliseconds, so the bound that a user can feel decides mostly: a machine that goes
without notice loses the interval plus the upload in flight, at most `max_lost_seconds`.
"""

import math
import time

from core.settings.training import CheckpointConfig


class Cadence:
    """Rank 0 asks `due` at each step boundary and tells what the last save cost."""

    def __init__(self, config: CheckpointConfig, now: float | None = None):
        self._config = config
        self._last = time.monotonic() if now is None else now
        self._blocked = 0.0
        self._background = 0.0

    def interval_seconds(self) -> float:
        """Seconds between two snapshots, from what was measured so far."""
        young = math.sqrt(2 * self._blocked * self._config.expected_hours_between_failures * 3600)
        longest = self._config.max_lost_seconds - self._background
        # One upload at a time: when it takes more than half of the bound, saves follow each other at once.
        return max(self._background, min(young, longest)) if self._background else longest / 2

    def due(self, step: int, step_seconds: float, now: float | None = None) -> bool:
        """Whether to save after `step`, so that the next step would come too late."""
        if self._config.every_steps:
            return step % self._config.every_steps == 0
        now = time.monotonic() if now is None else now
        return now + step_seconds - self._last >= self.interval_seconds()

    def saved(self, now: float | None = None) -> None:
        """A snapshot was taken."""
        self._last = time.monotonic() if now is None else now

    def seconds(self) -> float:
        """What the last complete checkpoint took in all."""
        return self._blocked + self._background

    def measured(self, blocked_seconds: float, background_seconds: float) -> None:
        """What the last complete checkpoint cost."""
        self._blocked = blocked_seconds
        self._background = background_seconds
