"""Builds a Segment from the events of its ledger and metrics, in journal order, in one or more calls.

An event that cannot be understood is skipped, and `segment.problems` names it. So a damaged event never prevents a
report.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from core import output
from core.run import ledger
from core.run.machine import Machine
from core.run.model import Segment, Span
from core.stores import meter

# Events are merged into spans of this many seconds. Spans are longer after the first hour, so that the data of a long
# run stays small.
FINE_SPAN_SECONDS = 10.0
COARSE_SPAN_SECONDS = 60.0
FINE_FOR_SECONDS = 3600.0
# Metrics that a report shows. Other kinds, such as norms and samples, are read with Detail.ALL only.
SHOWN = {
    "train": ("tokens", "loss", "tokens_per_second", "mfu"),
    "eval": ("tokens", "val_loss"),
    "hellaswag": ("accuracy", "accuracy_norm"),
    "forecast": ("val_loss", "error", "end", "usd"),
}

# Gaps and overlaps up to this length are ignored. They come from rounding: the spans of a segment have none.
TOLERANCE_SECONDS = 0.001
# Limits for values in a ledger, which strangers may have changed. A real run stays within them.
LARGEST = 1e18
END_OF_TIME = 4_102_444_800.0  # 2100
LEAST_PRICE, HIGHEST_PRICE = 1e-12, 1e12  # dollars per hour
MOST_OF_A_MACHINE = 1_000_000  # nodes, GPUs
LONGEST_TEXT = 500
_MACHINE_TEXTS = ("cloud", "region", "zone", "instance_type", "gpu", "price_source", "host")


class NewerFormat(ValueError):
    """A newer release wrote the segment, so its events may have other meanings."""


def start(segment: Segment, event: Mapping[str, Any]) -> None:
    """Apply the start event.

    Raises ValueError with the reason if the event is unusable, and NewerFormat if a newer release wrote it.
    """
    if event.get("event") != "start" or not isinstance(event.get("machine"), Mapping):
        raise ValueError("it is not a start event")
    if not isinstance(event.get("version"), int) or event["version"] > ledger.VERSION:
        raise NewerFormat(f"ledger version {event.get('version')!r} is newer than this release; update the checkout")
    stored = event["machine"]
    machine: dict[str, Any] = {key: text(stored.get(key)) for key in _MACHINE_TEXTS}
    machine["usd_per_hour"] = _price(segment, stored)
    machine["spot"] = stored.get("spot")
    for key, least in (("gpus_per_node", 0), ("nodes", 1)):
        machine[key] = stored.get(key, least)
        if type(machine[key]) is not int or not least <= machine[key] <= MOST_OF_A_MACHINE:
            segment.problems.append(
                f"segment {segment.number}: {key} is {_brief(machine[key])}, not a count; used {least}"
            )
            machine[key] = least
    for key in (*_MACHINE_TEXTS, "spot"):
        if stored.get(key) is not None and not isinstance(stored[key], bool if key == "spot" else str):
            segment.problems.append(f"segment {segment.number}: {key} is {_brief(stored[key])}; taken for unknown")
            machine[key] = None
    segment.machine = Machine(**machine)
    segment.started_at = moment(event.get("time"))
    segment.program = _texts(event.get("program"))
    segment.launcher = _texts(event.get("launcher"))
    tags = event.get("tags")
    segment.tags = tuple(found for tag in tags if (found := text(tag))) if isinstance(tags, list) else ()


def absorb(segment: Segment, events: Iterable[Mapping[str, Any]]) -> None:
    """Append timeline events: spans, marks, the end."""
    for event in events:
        kind = event.get("event")
        if kind == "span":
            _span(segment, event)
        elif kind == "mark" and isinstance(event.get("name"), str) and moment(event.get("time")) is not None:
            segment.marks.append(_mark(event))
        elif kind == "end":
            segment.end = dict(event) | {"reason": text(event.get("reason"))}
        else:
            segment.problems.append(f"segment {segment.number}: skipped an event of unknown kind {_brief(kind)}")


def _mark(event: Mapping[str, Any]) -> dict[str, Any]:
    mark = dict(event) | {"name": text(event["name"])}
    if "step" in mark and step_number(mark["step"]) is None:
        del mark["step"]
    return mark


def absorb_metrics(segment: Segment, events: Iterable[Mapping[str, Any]]) -> None:
    """Append the metrics that a report shows. For each span of the timeline, only one training record is kept."""
    for event in events:
        kind, step, time = event.get("kind"), step_number(event.get("step")), moment(event.get("time"))
        if not isinstance(kind, str) or kind not in SHOWN or step is None or time is None:
            continue
        record = {"step": step, "time": time} | {name: _at_least_zero(event.get(name)) for name in SHOWN[kind]}
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
        known = step_number(event.get("step")) is not None and moment(event.get("time")) is not None
        if known and isinstance(event.get("kind"), str):
            segment.metrics.setdefault(event["kind"], []).append(dict(event))


def number(value: Any) -> float | None:
    """A finite float of at most LARGEST, or None for anything else."""
    kind = type(value)
    return float(value) if (kind is float or kind is int) and -LARGEST <= value <= LARGEST else None


def moment(value: Any) -> float | None:
    """A unix time from 1970 to 2100, or None for anything else."""
    found = number(value)
    return found if found is not None and 0 <= found < END_OF_TIME else None


def step_number(value: Any) -> int | None:
    """The number of an optimizer step, or None for anything else."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def text(value: Any) -> str | None:
    """A text cut to LONGEST_TEXT, with terminal control characters as escapes. None for any other value."""
    return _visible(value[:LONGEST_TEXT]) if isinstance(value, str) else None


_visible = functools.lru_cache(4096)(output.visible)  # cached, because the same few words are repeated often


def _span(segment: Segment, event: Mapping[str, Any]) -> None:
    start, end = moment(event.get("start")), moment(event.get("end"))
    if start is None or end is None or end < start:
        why = "these are no times" if start is None or end is None else "its clock went backwards"
        ends = f"{_brief(event.get('start'))} to {_brief(event.get('end'))}"
        segment.problems.append(f"segment {segment.number}: skipped a span from {ends}: {why}")
        return
    before = segment.ended_at
    if before is not None and start > before + TOLERANCE_SECONDS:
        # A part of the timeline is missing. The time of this part was paid for and belongs to no phase.
        segment.spans.append(Span(before, start))
    elif segment.spans and start < before - TOLERANCE_SECONDS:
        segment.problems.append(
            f"segment {segment.number}: a span starts {before - start:.1f} s before the end of the previous span; "
            "the overlap is counted once"
        )
        start = before
    _steps(segment, event.get("steps"))
    _moved(segment, event.get("moved"))
    if segment.spans and end <= start:
        return  # the span is a duplicate, or the clock was set back before it: its time is already counted
    booked_phases = _mapping(event.get("phases")).items()
    phases = {text(name): seconds for name, value in booked_phases if (seconds := number(value) or 0) > 0}
    booked, length = sum(phases.values()), end - start
    if booked > length:
        if booked > length + TOLERANCE_SECONDS:
            segment.problems.append(
                f"segment {segment.number}: a span of {length:.1f} s books {booked:.1f} s; its phases are scaled down"
            )
        phases = {name: seconds * length / booked for name, seconds in phases.items()}
    _extend(segment, start, end, phases)


def _moved(segment: Segment, moved: Any) -> None:
    """Update the counts of bytes and requests since the start of the program. A lower value than before is ignored."""
    if isinstance(moved, list) and len(moved) == len(meter.FIELDS) and None not in map(step_number, moved):
        known = segment.moved or (0,) * len(moved)
        segment.moved = [max(pair) for pair in zip(known, moved, strict=True)]


def _steps(segment: Segment, steps: Any) -> None:
    """Append the steps of a span. A segment computes each step once, so a number that does not rise is a duplicate."""
    if not isinstance(steps, list):
        return
    numbers, trained, waited = segment.steps.number, segment.steps.train, segment.steps.wait
    last = numbers[-1] if numbers else -1
    for step in steps:
        if not isinstance(step, list) or len(step) < 3 or step_number(step[0]) is None or step[0] <= last:
            continue
        train, wait = number(step[1]), number(step[2])
        if train is not None and wait is not None:
            last = step[0]
            numbers.append(last)
            trained.append(max(0.0, train))
            waited.append(max(0.0, wait))


def _extend(segment: Segment, start: float, end: float, phases: Mapping[str, float]) -> None:
    """Extend the newest span, or begin another span.

    A span ends at the latest with its UTC hour, so no span crosses the end of a day.
    """
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
    """The stored price per hour in dollars. If it is not usable, returns None and adds a sentence to `problems`."""
    stored, currency = machine.get("usd_per_hour"), machine.get("currency", "USD")
    if currency != "USD":
        named = text(currency) or _brief(currency)
        segment.problems.append(f"segment {segment.number}: its price is in {named}, not USD; counted as unknown")
        return None
    price = number(stored)
    if stored is not None and (price is None or not LEAST_PRICE <= price <= HIGHEST_PRICE):
        segment.problems.append(
            f"segment {segment.number}: usd_per_hour {_brief(stored)} is not a price; counted as unknown"
        )
        return None
    return price


def _at_least_zero(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and found >= 0 else None


def _brief(value: Any) -> str:
    return output.visible(repr(value)[:80])


def _texts(value: Any) -> Mapping[str, str]:
    return {str(text(key)): found for key, each in _mapping(value).items() if (found := text(each)) is not None}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
