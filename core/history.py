"""What a run measured, in order, as its kept steps tell it: metrics with machine time and dollars at each point.

    history = read("s3://bucket/run")
    [(point.step, point.usd, point.values["loss"]) for point in history.points("train")]

Reads RUN_URL/metrics and RUN_URL/ledger. Steps that were lost and done again count once, as they were done last.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from core import journal, ledger, storage
from core.errors import DataError, LauncherError

METRICS = "metrics"
READERS = 16


@dataclass(frozen=True)
class Point:
    """One record of a kind. `seconds` of machine time of the whole run up to it; `usd` is None if a price is not
    known."""

    step: int
    seconds: float
    usd: float | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """A machine's stretch: when it began and was last heard of (unix seconds), its price, its ledger's marks."""

    number: int
    start: float
    end: float
    usd_per_hour: float | None
    marks: tuple[Mapping[str, Any], ...] = ()


@dataclass
class History:
    """`restarts` are machine seconds at which a new segment began, `checkpoints` those at which one was begun."""

    url: str
    segments: list[Segment] = field(default_factory=list)
    records: dict[str, list[Point]] = field(default_factory=dict)
    restarts: list[float] = field(default_factory=list)
    checkpoints: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def points(self, kind: str) -> list[Point]:
        """Records of one kind, by step and then by time."""
        return self.records.get(kind, [])


def read(run_url: str) -> History:
    """Raises DataError if there are no metrics at `run_url`."""
    numbers = ledger.segment_numbers(run_url)
    with ThreadPoolExecutor(READERS) as pool:
        read_segments = list(pool.map(lambda number: _segment(run_url, number), numbers))
        read_metrics = list(pool.map(lambda number: _metrics(run_url, number), numbers))
    history = History(run_url)
    kept: dict[str, list[Point]] = {}
    seconds, usd = 0.0, 0.0
    for (segment, problems), (events, more) in zip(read_segments, read_metrics, strict=True):
        history.problems += problems + more
        if segment is None:
            continue
        if history.segments:
            history.restarts.append(seconds)
        history.segments.append(segment)
        marks = segment.marks
        history.checkpoints += [
            seconds + mark["time"] - segment.start for mark in marks if mark["name"] == "checkpoint_begun"
        ]
        restored = next((mark["step"] for mark in marks if mark["name"] == "restored"), None)
        if restored is not None:
            kept = {kind: [point for point in points if point.step <= restored] for kind, points in kept.items()}
        for event in events:
            since = max(0.0, event["time"] - segment.start)
            price = segment.usd_per_hour
            spent = None if usd is None or price is None else usd + since / 3600 * price
            kept.setdefault(event["kind"], []).append(Point(event["step"], seconds + since, spent, event))
        length = max(0.0, segment.end - segment.start)
        seconds += length
        usd = None if usd is None or segment.usd_per_hour is None else usd + length / 3600 * segment.usd_per_hour
    history.records = {kind: sorted(points, key=lambda point: point.step) for kind, points in kept.items()}
    if not history.records:
        raise DataError(f"{run_url}: holds no metrics; give the run.url of a training run")
    return history


def _segment(run_url: str, number: int) -> tuple[Segment | None, list[str]]:
    folder = storage.join(run_url, ledger.FOLDER, ledger.segment_name(number))
    uri = storage.join(folder, "start.jsonl")
    try:
        start = json.loads(storage.read_bytes(uri))
        events, problems = journal.read(storage.join(folder, "events"))
        ends = [event["end"] for event in events if event["event"] == "span"]
        marks = tuple(event for event in events if event["event"] == "mark")
        price = start["machine"]["usd_per_hour"]
        return Segment(number, start["time"], max(ends, default=start["time"]), price, marks), problems
    except (LauncherError, ValueError, KeyError, TypeError) as error:
        return None, [f"{uri}: segment {number} left out ({error})"]


def _metrics(run_url: str, number: int) -> tuple[list[dict[str, Any]], list[str]]:
    events, problems = journal.read(storage.join(run_url, METRICS, ledger.segment_name(number)))
    return [event for event in events if {"kind", "step", "time"} <= event.keys()], problems
