"""Keeps a run below its dollar cap: all its machines together never cost more than MAX_USD.

The ledgers of other segments give an upper bound of their cost: a killed machine counts until just before its next
heartbeat, so that the cap also holds after many kills. Machines that opened no segment and evaluations of the run count
too (core.run.reader.spent_usd_at_most). All are read again every LOOK_SECONDS, because another machine may be running.

A segment stops while enough money remains for the last checkpoint and for the time until its machine is down. On spot,
enough must also remain for one more machine, which starts if this one is taken away now, and then finds that the money
is spent.
"""

import logging
import math
import threading

from core.errors import ConfigError, LauncherError
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import spent_usd_at_most

log = logging.getLogger(__name__)
LOOK_SECONDS = 30.0
SAFETY = 1.5  # factor on the expected times of the last checkpoint and of a new machine's start


def spent_by_earlier_segments(
    folder: RunFolder, machine: Machine, max_usd: float, started_at: float | None = None
) -> float | None:
    """Dollars of all other machines; None if a price is unknown, for which a cap raises ConfigError.

    `started_at` is the start of this machine's paid time (unix s).
    """
    here = None if started_at is None else (machine.host, started_at)
    if not max_usd:
        return spent_usd_at_most(folder.url, here=here)
    if machine.price is None:
        raise ConfigError(
            f"run.max_usd is {max_usd:g}, but this machine's price is not known; "
            "set USD_PER_HOUR to what all its nodes cost per hour, or remove the cap"
        )
    before = spent_usd_at_most(folder.url, here=here)
    if before is None:
        raise ConfigError(
            f"run.max_usd is {max_usd:g}, but an earlier segment of {folder} ran at an unknown price; "
            "remove the cap, or use another run.url"
        )
    return before


class OthersWatch:
    """Reads again and again what the run's other machines have spent, and tells a cap; on a thread of its own."""

    def __init__(self, cap: "SpendingCap", run_url: str, segment: int, seconds: float | None = None):
        self._cap, self._run_url, self._segment = cap, run_url, segment
        self._seconds = LOOK_SECONDS if seconds is None else seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spending of others", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            try:
                self._cap.others_have_spent(spent_usd_at_most(self._run_url, without=self._segment))
            except LauncherError as error:  # the store will answer again
                log.info("what other machines of this run spend is not known now: %s", error)


class SpendingCap:
    """The money that rank 0 may still spend. `spent_before` are the dollars of all other machines of the run."""

    def __init__(self, ledger: Ledger, max_usd: float, shutdown_seconds: float, spent_before: float | None):
        self.max_usd = max_usd
        self._ledger = ledger
        self._shutdown_seconds = shutdown_seconds
        self._before = spent_before
        self._arrival_seconds = ledger.elapsed_seconds() if ledger.machine.spot else 0.0

    def others_have_spent(self, usd: float | None) -> None:
        """Take a newer sum of the other machines. An unknown one, or a lower one, does not raise what is left."""
        if usd is not None and self._before is not None:
            self._before = max(self._before, usd)

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

    def now(self) -> float:
        """Unix seconds on the clock of `latest`."""
        return self._ledger.now()

    def describe(self) -> str:
        spent = self.spent_usd()
        said = "dollars unknown" if spent is None else f"${spent:.2f}"
        return f"{said} of ${self.max_usd:g} spent" if self.max_usd else f"{said} spent"
