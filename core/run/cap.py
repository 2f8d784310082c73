"""Keeps a run below its dollar cap: all its segments together never cost more than MAX_USD.

The ledgers of earlier segments give an upper bound of their cost: a killed machine counts until its next heartbeat was
due, so that the cap also holds after many kills. A segment stops while enough money remains for the last checkpoint and
for the time until its machine is down. A segment on a spot machine also keeps enough money for the start of one more
machine: if its own is taken away now, a new one starts, and only then finds that the money is spent.
"""

import math

from core.errors import ConfigError
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import spent_usd_at_most

SAFETY = 1.5  # factor on the expected times of the last checkpoint and of a new machine's start


def spent_by_earlier_segments(folder: RunFolder, machine: Machine, max_usd: float) -> float | None:
    """Upper bound of the dollars of earlier segments; None if a price is unknown.

    Raises ConfigError for an unknown price if there is a cap (`max_usd` is not 0).
    """
    if not max_usd:
        return spent_usd_at_most(folder.url)
    if machine.price is None:
        raise ConfigError(
            f"run.max_usd is {max_usd:g}, but this machine's price is not known; "
            "set USD_PER_HOUR to what all its nodes cost per hour, or remove the cap"
        )
    before = spent_usd_at_most(folder.url)
    if before is None:
        raise ConfigError(
            f"run.max_usd is {max_usd:g}, but an earlier segment of {folder} ran at an unknown price; "
            "remove the cap, or use another run.url"
        )
    return before


class SpendingCap:
    """Tells rank 0 when the money is nearly spent. `spent_before` are the dollars of earlier segments."""

    def __init__(self, ledger: Ledger, max_usd: float, shutdown_seconds: float, spent_before: float | None):
        self.max_usd = max_usd
        self._ledger = ledger
        self._shutdown_seconds = shutdown_seconds
        self._before = spent_before
        self._arrival_seconds = ledger.elapsed_seconds() if ledger.machine.spot else 0.0

    def spent_usd(self) -> float | None:
        """Upper bound of the run's dollars so far; None if a price is unknown, which cannot happen with a cap."""
        here = self._ledger.spent_usd()
        return None if here is None or self._before is None else self._before + here

    def reached(self, step_seconds: float, checkpoint_seconds: float) -> bool:
        """Whether one more step would leave too little money for the last checkpoint and the shutdown."""
        return self._ledger.now() >= self.latest(step_seconds + SAFETY * checkpoint_seconds)

    def latest(self, seconds: float = 0.0) -> float:
        """The latest unix time at which an ending that takes `seconds` may begin, so that the cap holds."""
        if not self.max_usd:
            return math.inf
        paid_for = self._ledger.machine.price.seconds(self.max_usd - self.spent_usd())
        return self._ledger.now() + paid_for - seconds - SAFETY * self._arrival_seconds - self._shutdown_seconds

    def describe(self) -> str:
        return f"${self.spent_usd():.2f} of ${self.max_usd:g} spent"
