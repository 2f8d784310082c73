"""The smallest priced parts of a run, as a flat table: Run → list of Cell. Pure.

Every figure in dollars is a sum over cells, so that each way of grouping them adds up to the same total.
`[dataclasses.asdict(cell) for cell in cells(run, now)]` goes straight into a DataFrame.

Kept work: a step counts for the last segment that did it. Steps of an earlier segment above the step that a
later one restored were done again: their train and data-wait time, and that of a step which a segment did not
live to finish, is `train_lost`. Time that no phase claims is `not_attributed`. `api` is what a paid endpoint took, and
no time: the machine's own time of asking is another phase.
"""

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from costs.model import Run, Segment, Slice, Stretch, Uptime

PHASES = (
    "provision image setup init prep finalize compile restore data_wait train_kept train_lost eval sample api "
    "checkpoint idle idle_until_down not_attributed"
).split()


# The slices of each segment, by its number, with the phases of a report.
Books = dict[int, list[Slice]]


@dataclass(frozen=True)
class Cell:
    """Seconds of one phase on one day on one machine. `usd` is None where the price is not known."""

    phase: str
    seconds: float
    usd: float | None
    segment: str
    stage: str
    day: str
    cloud: str
    region: str
    zone: str
    instance: str
    market: str
    nodes: int
    price_source: str


@dataclass(frozen=True)
class Lost:
    """What a segment did in vain: steps that were done again, and seconds of them and of its unfinished step."""

    steps: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0


def cells(run: Run, books: Books) -> list[Cell]:
    """All cells of a run; `books` as from `booked`."""
    parts = [cell for segment in run.segments for cell in _segment_cells(run, segment, books[segment.number])]
    for segment, usd in paid_to_endpoints(run):
        cell = _cell(run, segment, "api", _day(segment.ended_at), 0.0, None)
        parts.append(replace(cell, usd=usd, price_source="budget of the run's settings"))
    return parts + [cell for stretch in run.around for cell in _stretch_cells(run, stretch)]


def lost_work(run: Run, now: float) -> dict[int, Lost]:
    """By segment number. `now` tells whether the last segment may still finish its step."""
    found = {}
    boundary = math.inf
    for segment in reversed(run.segments):
        finished = segment.end is not None and segment.end.get("reason") == "finished"
        running = segment is run.segments[-1] and segment.is_live(now)
        found[segment.number] = _lost(segment, boundary, unfinished=not finished and not running)
        restored = segment.restored_step
        boundary = boundary if restored is None else min(boundary, restored)
    return found


def _lost(segment: Segment, boundary: float, unfinished: bool) -> Lost:
    steps = segment.steps
    again = np.asarray(steps.number) > boundary
    lost = Lost(int(again.sum()), *(float(np.asarray(column)[again].sum()) for column in (steps.train, steps.wait)))
    if not unfinished:
        return lost
    booked = {name: math.fsum(s.phases.get(name, 0.0) for s in segment.slices) for name in ("train", "data_wait")}
    return Lost(
        lost.steps,
        lost.train_seconds + max(0.0, booked["train"] - float(np.sum(steps.train))),
        lost.wait_seconds + max(0.0, booked["data_wait"] - float(np.sum(steps.wait))),
    )


def paid_to_endpoints(run: Run) -> list[tuple[Segment, float]]:
    """Dollars that segments paid. The marks count from the run's beginning: what a machine paid that was killed is with
    the next one, which found it in the run's folder."""
    found, known = [], 0.0
    for segment in run.segments:
        for mark in segment.marks:
            paid = mark.get("usd") if mark["name"] == "api" else None
            if isinstance(paid, int | float) and known < paid < math.inf:
                found.append((segment, paid - known))
                known = paid
    return found


def booked(run: Run, lost: dict[int, Lost]) -> Books:
    """By segment number; `lost` as from `lost_work`."""
    return {segment.number: _booked(segment, lost[segment.number]) for segment in run.segments}


def _booked(segment: Segment, lost: Lost) -> list[Slice]:
    """The segment's slices with the phases of a report, newest first.

    Steps are in order, so what was lost is the last of the train time: it is taken off from the end.
    """
    left = {"train": lost.train_seconds, "data_wait": lost.wait_seconds}
    slices = []
    for stretch in reversed(segment.slices):
        phases = {"not_attributed": max(0.0, stretch.seconds - math.fsum(stretch.phases.values()))}
        for phase, seconds in stretch.phases.items():
            if in_vain := min(seconds, left.get(phase, 0.0)):
                left[phase] -= in_vain
                phases["train_lost"] = phases.get("train_lost", 0.0) + in_vain
            phases["train_kept" if phase == "train" else phase] = seconds - in_vain
        slices.append(Slice(stretch.start, stretch.end, phases))
    return slices


def _segment_cells(run: Run, segment: Segment, book: list[Slice]) -> list[Cell]:
    sums: dict[tuple[str, str], float] = {}
    for stretch in book:
        day = _day(stretch.start)
        for phase, seconds in stretch.phases.items():
            sums[phase, day] = sums.get((phase, day), 0.0) + seconds
    price = segment.machine.usd_per_hour
    if not sums:  # a machine that left no heartbeat ran for an unknown time
        sums["not_attributed", _day(segment.started_at)], price = 0.0, None
    return [
        _cell(run, segment, phase, day, seconds, price)
        for (phase, day), seconds in sums.items()
        if seconds > 0 or price is None
    ]


def _stretch_cells(run: Run, stretch: Stretch) -> list[Cell]:
    """Cut at midnight, UTC."""
    uptime = stretch.uptime
    price = uptime.usd_per_hour
    if stretch.segment is not None and stretch.segment.machine.usd_per_hour is not None:
        price = stretch.segment.machine.usd_per_hour  # one machine has one price
    found = []
    start = stretch.start
    while start < stretch.end:
        end = min(stretch.end, (start // 86400 + 1) * 86400)
        found.append(_cell(run, stretch.segment, stretch.phase, _day(start), end - start, price, uptime))
        start = end
    return found


def _cell(
    run: Run,
    segment: Segment | None,
    phase: str,
    day: str,
    seconds: float,
    price: float | None,
    uptime: Uptime | None = None,
) -> Cell:
    """What the segment does not say about its machine, the launcher's record may."""

    def of(ours: str) -> object:
        known = [getattr(source, ours) for source in (segment and segment.machine, uptime) if source]
        return next((value for value in known if value is not None), None)

    spot = of("spot")
    return Cell(
        phase=phase,
        seconds=seconds,
        usd=None if price is None else seconds / 3600 * price,
        segment=str(segment.number) if segment else f"– {uptime.cluster}",
        stage=run.stage or "?",
        day=day,
        cloud=of("cloud") or "?",
        region=of("region") or "?",
        zone=of("zone") or "?",
        instance=of("instance_type") or "?",
        market={None: "?", True: "spot", False: "on demand"}[spot],
        nodes=int(of("nodes") or 1),
        price_source=of("price_source") or "?",
    )


def _day(time: float | None) -> str:
    return "?" if time is None else datetime.fromtimestamp(time, UTC).date().isoformat()
