"""Records each machine of a run from the start of its paid time, so that the cap counts machines without a segment too.

    RUN_URL/machines/ATTEMPT/start.json     the time when its paid time began, and its price
    RUN_URL/machines/ATTEMPT/end.json       the time when its program ended; missing if it was killed
    RUN_URL/machines/ATTEMPT/alive.json     the last time at which the machine was up after its program
    RUN_URL/machines/ATTEMPT/gone.json      the time when the machine was gone, if the cloud reported it

A node that is refused, or whose program fails before it opens a segment, appears in no ledger. The time of such a
machine is taken from this record. The time of all other machines is taken from their segments. The set-up of a machine
writes a second record (launch/node/arrival.py) at the highest price that the machine may have. This second record
counts only if no program of this project ran on the machine.

The record of a managed job also holds the price of the job's controller and the time when the job was submitted.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from core import storage
from core.errors import LauncherError
from core.run.folder import RunFolder
from core.run.model import Segment
from core.storage import ObjectInfo

# A machine that has neither a segment nor end.json was killed or is still starting. Within this time, a starting
# machine opens a segment, fails in preflight, or is ended because it hangs (HANG_MINUTES).
STARTING_SECONDS = 1800.0
# A segment and its machine have the same start. The tolerance is for the rounding in JSON.
SAME_SECONDS = 1.5
# After its program, a machine writes alive.json at this interval (launch/node/alive.py). A machine that is up longer
# than the second number is kept up on purpose, and writes no more.
ALIVE_SECONDS = 10.0
ALIVE_FOR_SECONDS = 3600.0
# After its last sign of life, a machine may have been up for nearly two intervals: one until the next sign, and one in
# which the store did not answer.
AFTER_SIGN_SECONDS = 2 * ALIVE_SECONDS
# Longest plausible time in seconds from a program's end to its machine's end. If it took longer, the machine did
# something else meanwhile.
LONGEST_SHUTDOWN_SECONDS = 900.0
SLACK = 1.2
PARALLEL_FETCHES = 16
# SkyPilot 0.14.1 stops a controller ten minutes after its last job. It checks once a minute.
CONTROLLER_IDLE_SECONDS = 660.0

_UNUSABLE = (LauncherError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Controller:
    """The controller of a managed job. `since` is the time when the job was submitted (unix s)."""

    since: float
    usd_per_hour: float


@dataclass(frozen=True)
class Paid:
    """A machine of a run. Times are unix seconds. `usd_per_hour` is the price of all its nodes, None if unknown."""

    started_at: float
    seen_at: float
    usd_per_hour: float | None
    host: str
    ended_at: float | None = None
    is_setup: bool = False
    controller: Controller | None = None
    cloud: str = ""
    region: str = ""
    cluster: str = ""
    gone_at: float | None = None
    alive_at: float | None = None

    @property
    def gone_at_most(self) -> float | None:
        """The latest time at which the machine itself ended, None if unknown."""
        if self.gone_at is not None or self.alive_at is None:
            return self.gone_at
        return self.alive_at + AFTER_SIGN_SECONDS

    @property
    def shutdown_seconds(self) -> float:
        """Upper bound of the seconds from the end of the program to the end of the machine, 0 if unknown."""
        if self.gone_at_most is None or self.ended_at is None:
            return 0.0
        seconds = self.gone_at_most - self.ended_at
        return seconds if 0.0 < seconds <= LONGEST_SHUTDOWN_SECONDS else 0.0

    def end_at_most(self, now: float) -> float:
        """The latest time at which the program may have ended, if it opened no segment."""
        return min(now, self.seen_at + STARTING_SECONDS) if self.ended_at is None else self.ended_at

    def seconds_at_most(self, now: float) -> float:
        """Upper bound of the machine's paid time until `now`."""
        return max(0.0, self.end_at_most(now) - self.started_at) + self.shutdown_seconds

    def usd_at_most(self, now: float) -> float | None:
        """Upper bound of the machine's dollars until `now`, or None if the price is unknown."""
        return None if self.usd_per_hour is None else self.usd_per_hour / 3600 * self.seconds_at_most(now)

    def is_in(self, segments: Iterable[Segment]) -> bool:
        """Whether one of the segments ran on this machine."""
        places = [(each.machine.host, each.started_at) for each in segments if each.started_at is not None]
        return any(map(self.is_at, places))

    def is_at(self, place: tuple[str | None, float] | None) -> bool:
        """Whether this machine has the given host and start."""
        return place is not None and place[0] == self.host and abs(place[1] - self.started_at) < SAME_SECONDS


def begin(
    folder: RunFolder,
    attempt: str,
    started_at: float,
    usd_per_hour: float | None,
    host: str,
    controller: Controller | None = None,
    place: Mapping[str, Any] = {},
) -> None:
    """Record that a machine's program has begun. `place` is SkyPilot's description of it. Raises StorageError."""
    document: dict[str, Any] = {
        "started_at": started_at,
        "time": time.time(),
        "usd_per_hour": usd_per_hour,
        "host": host,
        "cloud": str(place.get("cloud") or "").lower(),
        "region": str(place.get("region") or ""),
        "cluster": str(place.get("cluster_name") or ""),
    }
    if controller:
        document["controller"] = asdict(controller)
    _write(storage.join(folder.machines, attempt, "start.json"), document)


def end(folder: RunFolder, attempt: str) -> None:
    """Record that the machine's program has ended. Raises StorageError."""
    _write(storage.join(folder.machines, attempt, "end.json"), {"time": time.time()})


def alive(folder: RunFolder, attempt: str) -> None:
    """Record that the machine is still up after its program. Raises StorageError."""
    _write(storage.join(folder.machines, attempt, "alive.json"), {"time": time.time()})


def gone(folder: RunFolder, attempt: str, at: float) -> None:
    """Record the unix time `at` at which the machine itself was gone. Raises StorageError."""
    _write(storage.join(folder.machines, attempt, "gone.json"), {"time": at})


def reserve_seconds(folder: RunFolder, cloud: str | None) -> float:
    """The paid seconds to expect after the end of a program.

    They were measured on this run's earlier machines on the same cloud. The result is 0 if there were none. Raises
    StorageError.
    """
    name = (cloud or "").lower()
    return max((SLACK * each.shutdown_seconds for each in machines(folder).values() if each.cloud == name), default=0.0)


def unrecorded(
    found: list[Paid], segments: Iterable[Segment], here: tuple[str | None, float] | None = None
) -> list[Paid]:
    """The machines that have opened no segment.

    `here` is the host and the start of this machine if it is about to open a segment. This machine is then left out.
    """
    segments = list(segments)
    return [each for each in found if not each.is_at(here) and not each.is_in(segments)]


def beside_usd(found: list[Paid], segments: Iterable[Segment], now: float) -> Iterator[float]:
    """Upper bounds of dollars that are in no segment: for shutdowns after segments, and for controllers of jobs."""
    segments = list(segments)
    for each in found:
        if each.usd_per_hour and each.is_in(segments):
            yield each.usd_per_hour / 3600 * each.shutdown_seconds
    # A controller is paid from the submission of its job until SkyPilot stops the controller.
    for controller in dict.fromkeys(each.controller for each in found if each.controller):
        ends = [_end_of(each, segments, now) for each in found if each.controller == controller]
        end = min(now, max(ends) + CONTROLLER_IDLE_SECONDS)
        yield controller.usd_per_hour / 3600 * max(0.0, end - controller.since)


def read_all(folder: RunFolder, attempts: Iterable[str] | None = None) -> list[Paid]:
    """The usable records of `attempts`, or of all attempts if it is None. Each machine has one record.

    Raises StorageError.
    """
    return list(_once(list(machines(folder, attempts).values())))


def machines(folder: RunFolder, attempts: Iterable[str] | None = None) -> dict[str, Paid]:
    """The usable records by attempt: of `attempts`, or of all attempts if it is None. Raises StorageError."""
    names = sorted(storage.list_names(folder.machines)) if attempts is None else list(attempts)
    if storage.is_local(folder.url):  # threads hide the latency of requests, which a local disk does not have
        found = [_read(folder, name) for name in names]
    else:
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            found = list(pool.map(lambda name: _read(folder, name), names))
    return {name: machine for name, machine in zip(names, found, strict=True) if machine is not None}


def attempt_at(folder: RunFolder, place: tuple[str | None, float]) -> str | None:
    """The attempt of the machine with the given host and start, not of its set-up if possible. Raises StorageError."""
    found = {name: each for name, each in machines(folder).items() if each.is_at(place)}
    return min(found, key=lambda name: (found[name].is_setup, name), default=None)


def attempts_in(folder: RunFolder, objects: Iterable[ObjectInfo]) -> list[str]:
    """The names of the attempts in a listing of the run, in order."""
    inside = f"{folder.machines}/"
    return sorted({each.uri[len(inside) :].split("/", 1)[0] for each in objects if each.uri.startswith(inside)})


def _once(found: list[Paid]) -> Iterator[Paid]:
    """Yields the records of each machine. The record of its set-up is left out if the machine has another record."""
    taken: list[Paid] = []
    for each in sorted(found, key=lambda each: (each.is_setup, each.ended_at is None)):
        if not each.is_setup or not any(other.is_at((each.host, each.started_at)) for other in taken):
            taken.append(each)
            yield each


def _end_of(machine: Paid, segments: list[Segment], now: float) -> float:
    """The time when a machine's program ended.

    It is read from the record of the end, or else from the machine's segment.
    """
    ends = [each.ended_at for each in segments if machine.is_in([each]) and each.ended_at is not None]
    return max(ends) if ends and machine.ended_at is None else machine.end_at_most(now)


def _read(folder: RunFolder, attempt: str) -> Paid | None:
    """A machine's record, or None if start.json cannot be used."""
    place = storage.join(folder.machines, attempt)
    try:
        start = json.loads(storage.read_bytes(storage.join(place, "start.json")))
        price, named = start["usd_per_hour"], start.get("controller")
        controller = named and Controller(float(named["since"]), float(named["usd_per_hour"]))
        found = Paid(
            float(start["started_at"]),
            float(start["time"]),
            price and float(price),
            str(start["host"]),
            is_setup=bool(start.get("setup")),
            controller=controller or None,
            **{name: str(start.get(name) or "") for name in ("cloud", "region", "cluster")},
        )
    except _UNUSABLE:
        return None
    ended_at, gone_at, alive_at = (_time(storage.join(place, f"{name}.json")) for name in ("end", "gone", "alive"))
    return replace(found, ended_at=ended_at, gone_at=gone_at, alive_at=alive_at)


def _time(uri: str) -> float | None:
    """The time in an object, or None if the object is missing or cannot be used."""
    try:
        return float(json.loads(storage.read_bytes(uri))["time"])
    except _UNUSABLE:
        return None


def _write(uri: str, document: dict) -> None:
    storage.write_bytes(uri, (json.dumps(document) + "\n").encode())
