"""The smallest priced parts of a run, as a flat table: Run → list of Cell. Pure.

Every figure in dollars is a sum over cells, so that each way of grouping them adds up to the same total.
`[dataclasses.asdict(cell) for cell in cells(run, now)]` goes straight into a DataFrame.

Kept work: a step counts for the last segment that did it. Steps of an earlier segment above the step that a
later one restored were done again: their train and data-wait time, and that of a step which a segment did not
live to finish, is `train_lost`. Time that no phase claims is `not_attributed`.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from costs.model import Run, Segment

PHASES = (
    "provision image setup init compile restore data_wait train_kept train_lost eval sample checkpoint idle "
    "idle_until_down not_attributed"
).split()


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
    price_source: str


@dataclass(frozen=True)
class Lost:
    """What a segment did in vain: steps that were done again, and seconds of them and of its unfinished step."""

    steps: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0


def cells(run: Run, now: float) -> list[Cell]:
    """All cells of a run as of `now` (unix seconds)."""
    lost = lost_work(run, now)
    return [cell for segment in run.segments for cell in _segment_cells(run, segment, lost[segment.number])]


def lost_work(run: Run, now: float) -> dict[int, Lost]:
    """By segment number."""
    found = {}
    boundary = math.inf
    for segment in reversed(run.segments):
        unfinished = not completed(segment) and not (segment is run.segments[-1] and segment.is_live(now))
        found[segment.number] = _lost(segment, boundary, unfinished)
        restored = segment.restored_step
        boundary = boundary if restored is None else min(boundary, restored)
    return found


def completed(segment: Segment) -> bool:
    return segment.end is not None and segment.end.get("reason") == "finished"


def _lost(segment: Segment, boundary: float, unfinished: bool) -> Lost:
    steps = segment.steps
    again = [index for index, step in enumerate(steps.number) if step > boundary]
    lost = Lost(len(again), math.fsum(steps.train[i] for i in again), math.fsum(steps.wait[i] for i in again))
    if not unfinished:
        return lost
    booked = {name: math.fsum(s.phases.get(name, 0.0) for s in segment.slices) for name in ("train", "data_wait")}
    return Lost(
        lost.steps,
        lost.train_seconds + max(0.0, booked["train"] - math.fsum(steps.train)),
        lost.wait_seconds + max(0.0, booked["data_wait"] - math.fsum(steps.wait)),
    )


def _segment_cells(run: Run, segment: Segment, lost: Lost) -> list[Cell]:
    """Walk the timeline backwards: steps are in order, so what was lost is the last of the train time."""
    sums: dict[tuple[str, str], float] = {}
    left = {"train": lost.train_seconds, "data_wait": lost.wait_seconds}
    for stretch in reversed(segment.slices):
        day = datetime.fromtimestamp(stretch.start, UTC).date().isoformat()
        unclaimed = stretch.seconds
        for phase, seconds in stretch.phases.items():
            unclaimed -= seconds
            in_vain = min(seconds, left.get(phase, 0.0))
            if in_vain > 0:
                left[phase] -= in_vain
                sums["train_lost", day] = sums.get(("train_lost", day), 0.0) + in_vain
            name = "train_kept" if phase == "train" else phase
            sums[name, day] = sums.get((name, day), 0.0) + seconds - in_vain
        sums["not_attributed", day] = sums.get(("not_attributed", day), 0.0) + max(0.0, unclaimed)
    price = segment.machine.usd_per_hour
    if not sums:  # a machine that left no heartbeat ran for an unknown time
        day = datetime.fromtimestamp(segment.started_at, UTC).date().isoformat() if segment.started_at else "?"
        sums["not_attributed", day], price = 0.0, None
    machine = segment.machine
    return [
        Cell(
            phase=phase,
            seconds=seconds,
            usd=None if price is None else seconds / 3600 * price,
            segment=str(segment.number),
            stage=run.stage or "?",
            day=day,
            cloud=machine.cloud or "?",
            region=machine.region or "?",
            zone=machine.zone or "?",
            instance=machine.instance_type or "?",
            market={None: "?", True: "spot", False: "on demand"}[machine.spot],
            price_source=machine.price_source or "?",
        )
        for (phase, day), seconds in sums.items()
        if seconds > 0 or price is None
    ]
