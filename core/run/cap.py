"""The hard dollar cap of a run: all its segments together never cost more than MAX_USD.

The ledgers of earlier segments give what they cost, as a cautious upper bound: a machine that was killed counts until
just before its next heartbeat, because a cap must hold after many of them. The cap is reached early enough that the
money left still pays for the last checkpoint and for the time until the machine is down; on spot also for another
machine, should this one be taken away now, up to the point where it finds that the money is spent.
"""

import math

from core.errors import ConfigError
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import spent_usd_at_most

SAFETY = 1.5  # on the times that the last checkpoint and a new machine are expected to take


def spent_by_earlier_segments(folder: RunFolder, machine: Machine, max_usd: float) -> float | None:
    """Dollars before this segment, None if a price is not known. Raises ConfigError if a cap could not hold then."""
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
    """Rank 0's view of the money. `spent_before` are the dollars of earlier segments."""

    def __init__(self, ledger: Ledger, max_usd: float, shutdown_seconds: float, spent_before: float | None):
        self.max_usd = max_usd
        self._ledger = ledger
        self._shutdown_seconds = shutdown_seconds
        self._before = spent_before
        self._arrival_seconds = ledger.elapsed_seconds() if ledger.machine.spot else 0.0

    def spent_usd(self) -> float | None:
        """The cautious upper bound of the whole run so far, None if a price is not known (with a cap all are)."""
        here = self._ledger.spent_usd()
        return None if here is None or self._before is None else self._before + here

    def reached(self, step_seconds: float, checkpoint_seconds: float) -> bool:
        """Whether one more step would leave too little for the last checkpoint and the way down."""
        return self._ledger.now() >= self.latest(step_seconds + SAFETY * checkpoint_seconds)

    def latest(self, seconds: float = 0.0) -> float:
        """When work must begin to end (unix s) that takes `seconds` to do so, for the money to suffice."""
        if not self.max_usd:
            return math.inf
        paid_for = self._ledger.machine.price.seconds(self.max_usd - self.spent_usd())
        return self._ledger.now() + paid_for - seconds - SAFETY * self._arrival_seconds - self._shutdown_seconds

    def describe(self) -> str:
        return f"${self.spent_usd():.2f} of ${self.max_usd:g} spent"
