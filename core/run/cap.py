"""Keeps a run within its limits: its machines together never cost more than MAX_USD or run longer than MAX_HOURS.

The ledgers of other segments give an upper bound of their cost. A killed machine counts until just before its next
heartbeat, so the cap holds even after many kills. Machines that opened no segment count too, and so do machines that
evaluate, serve or export the trained model (core.run.reader.spent_at_most). All these records are read again every
LOOK_SECONDS, because another machine may be running.

A segment stops while enough money remains for the last checkpoint and for the time until its machine is down. On spot,
enough money must also remain for the start of one more machine. If this machine is taken away, another machine starts,
and only after its start can it find that the money is spent. MAX_HOURS counts paid time in the same way.
MAX_RESTART_USD limits the cost of the machines since the newest checkpoint was stored, so a run that only restarts
comes to an end.
"""

import logging
import math
import re
import threading
from dataclasses import dataclass

from core import storage
from core.errors import ConfigError, LauncherError
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import Spent, spent_at_most

log = logging.getLogger(__name__)
LOOK_SECONDS = 30.0
RESTARTS = "MAX_RESTART_USD"
SAFETY = 1.5  # factor on the expected times of the last checkpoint and of a new machine's start
_MANIFEST = re.compile(r"^manifest-segment-(\d{6,12})\.json\Z")


@dataclass(frozen=True)
class Bounds:
    """The most that a run may cost in dollars and in paid hours. 0 sets no limit."""

    usd: float = 0.0
    hours: float = 0.0


def spent_by_earlier_segments(
    folder: RunFolder, machine: Machine, bounds: Bounds, started_at: float | None = None
) -> Spent:
    """The cost of all other machines of the run. Raises ConfigError if dollars are limited and a price is unknown.

    `started_at` is the start of this machine's paid time (unix s).
    """
    here = None if started_at is None else (machine.host, started_at)
    if bounds.usd and machine.price is None:
        raise ConfigError(
            f"run.max_usd is {bounds.usd:g}, but this machine's price is not known; "
            "set USD_PER_HOUR to what all its nodes cost per hour, or remove the cap"
        )
    before = spent_at_most(folder.url, here=here)
    if bounds.usd and before.usd is None:
        raise ConfigError(
            f"run.max_usd is {bounds.usd:g}, but an earlier segment of {folder} ran at an unknown price; "
            "remove the cap, or use another run.url"
        )
    return before


def newest_saving_segment(folder: RunFolder) -> int:
    """The number of the segment that stored the newest complete checkpoint, or 0 if there is none.

    Raises StorageError.
    """
    for step in sorted(storage.list_names(folder.checkpoints), reverse=True):
        names = storage.list_names(storage.join(folder.checkpoints, step))
        numbers = [int(match[1]) for name in names if (match := _MANIFEST.match(name))]
        if "COMPLETE" in names and numbers:
            return max(numbers)
    return 0


def restarts_too_dear(
    folder: RunFolder, max_usd: float, without: int | None = None, here: tuple[str | None, float] | None = None
) -> str:
    """A sentence, if the machines since the newest checkpoint have cost `max_usd` dollars or more.

    Otherwise, or if `max_usd` is 0, the result is "". The cost of this machine is left out. The caller names this
    machine by its segment (`without`) or by its host and start (`here`). Raises StorageError.
    """
    if not max_usd:
        return ""
    segment = newest_saving_segment(folder)
    usd = spent_at_most(folder.url, without, here, segment).usd
    if usd is None or usd < max_usd:
        return ""
    since = f"since segment {segment} stored the newest checkpoint" if segment else "and no checkpoint is stored"
    return f"restarts have cost ${usd:.2f} {since}, and {RESTARTS} is ${max_usd:g}"


class OthersWatch:
    """A thread that reads the cost of the run's other machines every few seconds, and passes it to the cap."""

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
                self._cap.others_have_spent(spent_at_most(self._run_url, without=self._segment))
            except LauncherError as error:  # the thread reads again after a pause
                log.info("the cost of this run's other machines cannot be read now: %s", error)


class SpendingCap:
    """The money and the time that this machine may still spend. `before` is the cost of the run's other machines."""

    def __init__(self, ledger: Ledger, bounds: Bounds, shutdown_seconds: float, before: Spent):
        self.max_usd = bounds.usd
        self._bounds = bounds
        self._ledger = ledger
        self._shutdown_seconds = shutdown_seconds
        self._before = before
        self._arrival_seconds = ledger.elapsed_seconds() if ledger.machine.spot else 0.0

    def others_have_spent(self, spent: Spent) -> None:
        """Update the cost of the other machines.

        If the new cost is unknown or lower than before, the old cost stays, so that the money that is left never rises.
        """
        before = self._before
        usd = before.usd if spent.usd is None or before.usd is None else max(before.usd, spent.usd)
        self._before = Spent(usd, max(before.seconds, spent.seconds))

    def spent_usd(self) -> float | None:
        """Upper bound of the run's dollars so far. None if a price is unknown; a run with a cap knows all prices."""
        here = self._ledger.spent_usd()
        return None if here is None or self._before.usd is None else self._before.usd + here

    def paid_seconds(self) -> float:
        """Upper bound of the paid time of all machines of the run so far."""
        return self._before.seconds + self._ledger.elapsed_seconds()

    def reached(self, step_seconds: float, checkpoint_seconds: float) -> bool:
        """Whether one more step would leave too little money or time for the last checkpoint and the shutdown."""
        return self._ledger.now() >= self.latest(step_seconds + SAFETY * checkpoint_seconds)

    def latest(self, seconds: float = 0.0) -> float:
        """The latest unix time at which the segment's end may begin, so that no limit is exceeded.

        The end takes `seconds`.
        """
        left = min(self._left_seconds())
        return self._ledger.now() + left - seconds - SAFETY * self._arrival_seconds - self._shutdown_seconds

    def _left_seconds(self) -> tuple[float, float]:
        """The seconds that this machine may still run: by the limit in dollars, and by the limit in hours."""
        usd, hours = self._bounds.usd, self._bounds.hours
        return (
            self._ledger.machine.price.seconds(usd - self.spent_usd()) if usd else math.inf,
            3600 * hours - self.paid_seconds() if hours else math.inf,
        )

    def now(self) -> float:
        """The current unix time, by the clock that `latest` uses."""
        return self._ledger.now()

    def variable(self) -> str:
        """The variable whose limit is reached first. With a larger value of this variable, the run goes on."""
        by_usd, by_hours = self._left_seconds()
        return "MAX_HOURS" if by_hours < by_usd else "MAX_USD"

    def describe(self) -> str:
        """A text with the sum that is compared with the cap.

        The sum is an upper bound, because a machine counts as running until its end is known.
        """
        spent = self.spent_usd()
        said = "dollars not known" if spent is None else f"at most ${spent:.2f}"
        said = f"{said} of ${self.max_usd:g} spent" if self.max_usd else f"{said} spent"
        if self._bounds.hours:
            said += f", {self.paid_seconds() / 3600:.2f} of {self._bounds.hours:g} hours paid"
        return said
