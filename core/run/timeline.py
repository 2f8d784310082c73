"""Builds a Segment from events of its ledger and metrics, in journal order and possibly in several portions.

`segment.problems` names each event that is skipped because it cannot be understood. No event prevents a report.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from core.run import ledger
from core.run.machine import Machine
from core.run.model import Segment, Span

# Events are merged into spans of this length, coarser after the first hour, so that runs of months stay small.
FINE_SPAN_SECONDS = 10.0
COARSE_SPAN_SECONDS = 60.0
FINE_FOR_SECONDS = 3600.0
# Metrics that a report shows. Other kinds, such as norms and samples, are read with Detail.ALL only.
SHOWN = {
    "train": ("tokens", "loss", "tokens_per_second", "mfu"),
    "eval": ("tokens", "val_loss"),
    "hellaswag": ("accuracy", "accuracy_norm"),
}

# Gaps and overlaps up to this length are ignored: spans of a segment have none, but their stored ends are rounded.
TOLERANCE_SECONDS = 0.001
_MACHINE_FIELDS = {field.name for field in fields(Machine)}


class NewerFormat(ValueError):
    """The segment was written by a newer release, whose events may have other meanings."""


def start(segment: Segment, event: Mapping[str, Any]) -> None:
    """Apply the start event. Raises ValueError with the reason if it is unusable, NewerFormat for a newer release."""
    if event.get("event") != "start" or not isinstance(event.get("machine"), Mapping):
        raise ValueError("it is not a start event")
    if not isinstance(event.get("version"), int) or event["version"] > ledger.VERSION:
        raise NewerFormat(f"ledger version {event.get('version')!r} is newer than this release; update the checkout")
    machine = {key: value for key, value in event["machine"].items() if key in _MACHINE_FIELDS}
    machine["usd_per_hour"] = _price(segment, event["machine"])
    for key, least in (("gpus_per_node", 0), ("nodes", 1)):
        if not isinstance(machine.get(key, least), int) or machine.get(key, least) < least:
            segment.problems.append(f"segment {segment.number}: {key} is {machine[key]!r}, not a count; used {least}")
            machine[key] = least
    segment.machine = Machine(**machine)
    segment.started_at = number(event.get("time"))
    segment.program = _mapping(event.get("program"))
    segment.launcher = _mapping(event.get("launcher"))
    tags = event.get("tags")
    segment.tags = tuple(str(tag) for tag in tags) if isinstance(tags, list) else ()


def absorb(segment: Segment, events: Iterable[Mapping[str, Any]]) -> None:
    """Append timeline events: spans, marks, the end."""
    for event in events:
        kind = event.get("event")
        if kind == "span":
            _span(segment, event)
        elif kind == "mark" and isinstance(event.get("name"), str):
            segment.marks.append(dict(event))
        elif kind == "end":
            segment.end = dict(event)
        else:
            segment.problems.append(f"segment {segment.number}: skipped an event of unknown kind {kind!r}")


def absorb_metrics(segment: Segment, events: Iterable[Mapping[str, Any]]) -> None:
    """Append the metrics that a report shows. Of training records, keep one per span of the timeline."""
    for event in events:
        kind, step, time = event.get("kind"), event.get("step"), number(event.get("time"))
        if kind not in SHOWN or not isinstance(step, int) or time is None:
            continue
        record = {"step": step, "time": time} | {name: number(event.get(name)) for name in SHOWN[kind]}
        if kind == "eval" and record["val_loss"] is None:
            continue
        known = segment.metrics.setdefault(kind, [])
        if kind == "train" and len(known) > 1:
            since = time - known[0]["time"]
            if time - known[-2]["time"] < _span_seconds(since):
                known.pop()
        known.append(record)


def absorb_all_metrics(segment: Segment, events: Iterable[Mapping[str, Any]]) -> None:
    """Append every record unchanged."""
    for event in events:
        if isinstance(event.get("step"), int) and number(event.get("time")) is not None and "kind" in event:
            segment.metrics.setdefault(event["kind"], []).append(dict(event))


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _span(segment: Segment, event: Mapping[str, Any]) -> None:
    start, end = number(event.get("start")), number(event.get("end"))
    if start is None or end is None or end < start:
        segment.problems.append(
            f"segment {segment.number}: skipped a span from {event.get('start')!r} to {event.get('end')!r}: "
            "its clock went backwards"
        )
        return
    before = segment.ended_at
    if before is not None and start > before + TOLERANCE_SECONDS:
        # A part of the timeline is missing. Its time was paid and belongs to no phase.
        segment.spans.append(Span(before, start))
    elif segment.spans and start < before - TOLERANCE_SECONDS:
        segment.problems.append(
            f"segment {segment.number}: a span starts {before - start:.1f} s before the end of the previous span; "
            "the overlap is counted once"
        )
        start = min(before, end)
    phases = {
        name: seconds for name, value in _mapping(event.get("phases")).items() if (seconds := number(value) or 0) > 0
    }
    booked, length = sum(phases.values()), end - start
    if booked > length:
        if booked > length + TOLERANCE_SECONDS:
            segment.problems.append(
                f"segment {segment.number}: a span of {length:.1f} s books {booked:.1f} s; its phases are scaled down"
            )
        phases = {name: seconds * length / booked for name, seconds in phases.items()}
    for step in event.get("steps") or []:
        if isinstance(step, list) and len(step) >= 3 and None not in map(number, step[:3]):
            segment.steps.number.append(int(step[0]))
            segment.steps.train.append(max(0.0, step[1]))
            segment.steps.wait.append(max(0.0, step[2]))
    _extend(segment, start, end, phases)


def _extend(segment: Segment, start: float, end: float, phases: Mapping[str, float]) -> None:
    """Extend the newest span or begin another one. A span is short and ends with the UTC hour, so it is of one day."""
    last = segment.spans[-1] if segment.spans else None
    if (
        last is not None
        and last.phases
        and last.seconds < _span_seconds(start - segment.spans[0].start)
        and last.start // 3600 == end // 3600
    ):
        for name, seconds in phases.items():
            last.phases[name] = last.phases.get(name, 0.0) + seconds
        last.end = end
    else:
        segment.spans.append(Span(start, end, dict(phases)))


def _span_seconds(age_seconds: float) -> float:
    return FINE_SPAN_SECONDS if age_seconds < FINE_FOR_SECONDS else COARSE_SPAN_SECONDS


def _price(segment: Segment, machine: Mapping[str, Any]) -> float | None:
    """The stored price per hour in dollars; None, and a sentence in `problems`, if it is not usable."""
    stored, currency = machine.get("usd_per_hour"), machine.get("currency", "USD")
    if currency != "USD":
        segment.problems.append(f"segment {segment.number}: its price is in {currency}, not USD; counted as unknown")
        return None
    price = number(stored)
    if stored is not None and (price is None or price <= 0):
        segment.problems.append(f"segment {segment.number}: usd_per_hour {stored!r} is not a price; counted as unknown")
        return None
    return price


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
