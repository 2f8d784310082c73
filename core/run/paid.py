"""Records each machine of a run from the time that it is paid for, so that the cap also counts one without a segment.

    RUN_URL/machines/ATTEMPT/start.json     when its paid time began, and its price
    RUN_URL/machines/ATTEMPT/end.json       when its program ended; missing if it was killed

A node that is refused, or whose program fails before it opens a segment, appears in no ledger. The records of all other
machines are ignored: their segments hold the same time, to the second.
"""

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from core import storage
from core.errors import LauncherError
from core.run.folder import RunFolder
from core.run.model import Segment
from core.storage import ObjectInfo

# A node without a segment and without an end was killed, or still starts. It opens one within this time, or is ended as
# hung (HANG_MINUTES), or its preflight fails.
STARTING_SECONDS = 1800.0
# The start of a segment is that of its machine, but for the rounding of JSON.
SAME_SECONDS = 1.5
PARALLEL_FETCHES = 16


@dataclass(frozen=True)
class Paid:
    """A machine of a run. Times are unix seconds; `usd_per_hour` is for all its nodes, None if it is unknown."""

    started_at: float
    seen_at: float
    usd_per_hour: float | None
    host: str
    ended_at: float | None = None

    def seconds_at_most(self, now: float) -> float:
        """Upper bound of its paid time until `now`."""
        end = min(now, self.seen_at + STARTING_SECONDS) if self.ended_at is None else self.ended_at
        return max(0.0, end - self.started_at)

    def usd_at_most(self, now: float) -> float | None:
        """Upper bound of its dollars until `now`; None if the price is unknown."""
        return None if self.usd_per_hour is None else self.usd_per_hour / 3600 * self.seconds_at_most(now)

    def is_in(self, segments: Iterable[Segment]) -> bool:
        """Whether a segment holds its time."""
        places = [(each.machine.host, each.started_at) for each in segments if each.started_at is not None]
        return any(map(self.is_at, places))

    def is_at(self, place: tuple[str | None, float] | None) -> bool:
        """Whether its host and start are these."""
        return place is not None and place[0] == self.host and abs(place[1] - self.started_at) < SAME_SECONDS


def begin(folder: RunFolder, attempt: str, started_at: float, usd_per_hour: float | None, host: str) -> None:
    """Record that a machine's program has begun. Raises StorageError."""
    document = {"started_at": started_at, "time": time.time(), "usd_per_hour": usd_per_hour, "host": host}
    _write(storage.join(folder.machines, attempt, "start.json"), document)


def end(folder: RunFolder, attempt: str) -> None:
    """Record that it has ended. Raises StorageError."""
    _write(storage.join(folder.machines, attempt, "end.json"), {"time": time.time()})


def unrecorded(
    folder: RunFolder, segments: Iterable[Segment], here: tuple[str | None, float] | None = None
) -> list[Paid]:
    """The machines without a segment. Raises StorageError.

    `here` is this machine, by host and start, if it is about to open its segment: it is left out.
    """
    segments = list(segments)
    machines = read_all(folder, storage.list_names(folder.machines))
    return [each for each in machines if not each.is_at(here) and not each.is_in(segments)]


def read_all(folder: RunFolder, attempts: Iterable[str]) -> list[Paid]:
    """The records of these attempts that can be used. Raises StorageError."""
    if storage.is_local(folder.url):  # a disk has no latency that threads could hide
        found = [_read(folder, attempt) for attempt in attempts]
    else:
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            found = list(pool.map(lambda attempt: _read(folder, attempt), attempts))
    return [each for each in found if each is not None]


def attempts_in(folder: RunFolder, objects: Iterable[ObjectInfo]) -> list[str]:
    """The names of the attempts in a listing of the run, in order."""
    inside = f"{folder.machines}/"
    return sorted({each.uri[len(inside) :].split("/", 1)[0] for each in objects if each.uri.startswith(inside)})


def _read(folder: RunFolder, attempt: str) -> Paid | None:
    """A machine's record; None if its start cannot be used."""
    place = storage.join(folder.machines, attempt)
    try:
        start = json.loads(storage.read_bytes(storage.join(place, "start.json")))
        price = start["usd_per_hour"]
        found = Paid(float(start["started_at"]), float(start["time"]), price and float(price), str(start["host"]))
    except (LauncherError, ValueError, KeyError, TypeError, RecursionError):
        return None
    try:
        ended_at = float(json.loads(storage.read_bytes(storage.join(place, "end.json")))["time"])
    except (LauncherError, ValueError, KeyError, TypeError, RecursionError):
        return found
    return Paid(found.started_at, found.seen_at, found.usd_per_hour, found.host, ended_at)


def _write(uri: str, document: dict) -> None:
    storage.write_bytes(uri, (json.dumps(document) + "\n").encode())
