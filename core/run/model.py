"""Represents a run: its segments, their time and steps, and the figures that are computed from them.

    run = read_run("s3://bucket/run")
    run.usd, run.lost(now), run.points("eval")

Report, page, plots, status, model card and cap all take dollars, kept steps and lost work from here.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from core.run.folder import RunFolder
from core.run.journal import FLUSH_SECONDS
from core.run.machine import Machine, Price
from core.storage import ObjectInfo

# The names of three sums of a run's dollars. BY_LEDGER is the cost of the machine time in the ledgers, at the prices in
# the ledgers; every output shows the same sum to the cent. AS_KNOWN adds the amounts from all other sources, such as
# bills. AT_MOST is an upper bound, which is compared with the cap.
BY_LEDGER = "by the ledger"
AS_KNOWN = "as known"
AT_MOST = "at most"

# A machine without a heartbeat for this long counts as ended. Heartbeats come every few seconds, but an outage of the
# store may last minutes.
SILENT_SECONDS = 180.0


@dataclass
class Span:
    """An interval of a segment's timeline, with seconds by phase. The rest of the interval belongs to no phase."""

    start: float
    end: float
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Steps:
    """The optimizer steps of a segment in order, as compact arrays of number, train seconds and data-wait seconds."""

    number: array = field(default_factory=lambda: array("q"))
    train: array = field(default_factory=lambda: array("d"))
    wait: array = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class Lost:
    """Work of a segment that is lost. `steps` is the number of its steps that a later segment repeated.

    The seconds are the time of these steps and of a step that the segment did not finish.
    """

    steps: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.wait_seconds


@dataclass
class Segment:
    """One machine's part of a run, as its ledger and metrics describe it.

    `machine.usd_per_hour` is None unless it is a usable price. `metrics` holds records by kind, each with `step` and
    `time`. `problems` are sentences for the user.
    """

    number: int
    machine: Machine = field(default_factory=Machine)
    started_at: float | None = None
    program: Mapping[str, Any] = field(default_factory=dict)
    launcher: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    spans: list[Span] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)
    marks: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    moved: Sequence[int] = ()  # bytes and requests of the segment's first rank so far (core.stores.meter.FIELDS)
    is_newer_format: bool = False  # whether a newer release wrote the segment; no part of such a segment is read

    @property
    def price(self) -> Price | None:
        return self.machine.price

    @property
    def ended_at(self) -> float | None:
        """Unix time of the last heartbeat. A regular end writes a heartbeat too.

        If there is no heartbeat, this is the start of the segment.
        """
        return self.spans[-1].end if self.spans else self.started_at

    @property
    def seconds(self) -> float:
        """Seconds of machine time up to the last heartbeat."""
        return self.spans[-1].end - self.spans[0].start if self.spans else 0.0

    @property
    def usd(self) -> float | None:
        """Dollars up to the last heartbeat. None if there is no price or no heartbeat."""
        return self.price.usd(self.seconds) if self.price and self.spans else None

    @property
    def seconds_at_most(self) -> float:
        """Upper bound of `seconds`: a killed machine may have run until just before its next heartbeat."""
        return self.seconds + self.unheard_seconds

    @property
    def usd_at_most(self) -> float | None:
        """Upper bound of `usd`."""
        if self.price is None or self.started_at is None:
            return None
        return self.price.usd(self.seconds_at_most)

    @property
    def unheard_seconds(self) -> float:
        """The longest time that the machine may have run after its last heartbeat."""
        return 0.0 if self.end and self.spans else FLUSH_SECONDS

    @property
    def restored_step(self) -> int | None:
        """The step from which the segment continued, 0 for a fresh start.

        The step is read from a mark in the ledger. If the mark is missing, it is the step before the segment's first
        step. The result is None if the segment has neither.
        """
        steps = [
            mark["step"] for mark in self.marks if mark["name"] == "restored" and isinstance(mark.get("step"), int)
        ]
        if steps:
            return steps[-1]
        return self.steps.number[0] - 1 if self.steps.number else None

    @property
    def gpus(self) -> int:
        return self.machine.gpus_per_node * self.machine.nodes

    def records(self, kind: str) -> list[dict[str, Any]]:
        return self.metrics.get(kind, [])

    def is_live(self, now: float) -> bool:
        """Whether the segment may still be running: it has no end event, and its last heartbeat is recent."""
        return self.end is None and self.ended_at is not None and abs(now - self.ended_at) < SILENT_SECONDS

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of the segment in each phase of the ledger."""
        found: dict[str, list[float]] = {}
        for span in self.spans:
            for name, seconds in span.phases.items():
                found.setdefault(name, []).append(seconds)
        return {name: math.fsum(parts) for name, parts in found.items()}


class Point(NamedTuple):
    """A metrics record of a step that no later segment repeated.

    `seconds` and `usd` (None if unknown) are machine time and dollars of the whole run up to this record.
    """

    step: int
    time: float
    seconds: float
    usd: float | None
    values: Mapping[str, Any]


@dataclass
class Run:
    """The content of a run folder. `config` is empty if there is no run.json.

    `objects` lists all objects in the folder; it is empty if only the dollars were read.
    """

    folder: RunFolder
    segments: list[Segment] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    stage: str | None = None
    problems: list[str] = field(default_factory=list)
    objects: Sequence[ObjectInfo] = ()

    @property
    def url(self) -> str:
        return self.folder.url

    @property
    def usd(self) -> float | None:
        """Dollars of all segments by their ledgers, or None if the dollars of a segment are unknown."""
        return _sum(segment.usd for segment in self.segments)

    @property
    def usd_at_most(self) -> float | None:
        """Upper bound of the dollars of all segments, which is compared with the cap."""
        return _sum(segment.usd_at_most for segment in self.segments)

    @property
    def last_step(self) -> int | None:
        return max((segment.steps.number[-1] for segment in self.segments if segment.steps.number), default=None)

    def boundaries(self) -> list[float]:
        """For each segment, the last step that no later segment repeated.

        A later segment that continued from a checkpoint repeated all steps after that checkpoint. If no later segment
        did so, the number is infinity.
        """
        found, boundary = [], math.inf
        for segment in reversed(self.segments):
            found.append(boundary)
            if (restored := segment.restored_step) is not None:
                boundary = min(boundary, restored)
        return found[::-1]

    def lost(self, now: float) -> dict[int, Lost]:
        """Lost work by segment number.

        A step that a running segment has not finished at `now` does not count as lost.
        """
        found = {}
        for segment, boundary in zip(self.segments, self.boundaries(), strict=True):
            finished = segment.end is not None and segment.end.get("reason") == "finished"
            running = segment is self.segments[-1] and segment.is_live(now)
            found[segment.number] = _lost(segment, boundary, unfinished=not finished and not running)
        return found

    def points(self, kind: str) -> list[Point]:
        """The metrics records of one kind without those of repeated steps, ordered by step, then by time."""
        found: list[Point] = []
        seconds, usd = 0.0, 0.0
        for segment, boundary in zip(self.segments, self.boundaries(), strict=True):
            start, price, records = (
                segment.started_at,
                segment.price if usd is not None else None,
                segment.records(kind),
            )
            for record in records:
                if record["step"] <= boundary:
                    since = 0.0 if start is None else max(0.0, record["time"] - start)
                    spent = price and usd + price.usd(since)
                    found.append(Point(record["step"], record["time"], seconds + since, spent, record))
            seconds += segment.seconds
            if usd is not None and segment.spans:
                usd = None if price is None else usd + price.usd(segment.seconds)
        return sorted(found, key=lambda point: point.step)

    def machine_seconds(self, mark: str) -> list[float]:
        """For each mark with the name `mark`, the machine seconds that the whole run had used by then."""
        found, seconds = [], 0.0
        for segment in self.segments:
            started_at = segment.started_at or 0.0
            found += [seconds + each["time"] - started_at for each in segment.marks if each["name"] == mark]
            seconds += segment.seconds
        return found

    def restarts(self) -> list[float]:
        """For each restart, the machine seconds that the whole run had used by then.

        Every segment except the first is a restart.
        """
        found, seconds = [], 0.0
        for segment in self.segments[:-1]:
            seconds += segment.seconds
            found.append(seconds)
        return found


def _lost(segment: Segment, boundary: float, unfinished: bool) -> Lost:
    """The work of all steps after `boundary`. The step numbers of a segment ascend.

    If `unfinished` is true, the time of an unfinished step is added.
    """
    steps = segment.steps
    first = bisect_right(steps.number, boundary) if boundary < math.inf else len(steps.number)
    lost = Lost(len(steps.number) - first, math.fsum(steps.train[first:]), math.fsum(steps.wait[first:]))
    if not unfinished:
        return lost
    spent = segment.phase_seconds()
    return Lost(
        lost.steps,
        lost.train_seconds + max(0.0, spent.get("train", 0.0) - math.fsum(steps.train)),
        lost.wait_seconds + max(0.0, spent.get("data_wait", 0.0) - math.fsum(steps.wait)),
    )


def _sum(amounts) -> float | None:
    known = list(amounts)
    return None if None in known else math.fsum(known)
