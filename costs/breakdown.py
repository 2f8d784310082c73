"""Where the dollars of a run went: Run → Report. Pure; every table of a report adds up to the same total.

report = build(read_run(url), time.time())
report.phases, report.segments, report.by["day"]
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from costs import money
from costs.cells import PHASES, Cell, Lost, cells, lost_work
from costs.model import Run, Segment

# Machines seldom agree on the time to the second; below this, an overlap proves nothing.
CLOCKS_AGREE_SECONDS = 2.0
GROUPS = ("stage", "day", "cloud", "region", "zone", "instance", "market")


@dataclass(frozen=True)
class Line:
    """One row: `usd` is None when no part of it has a price; `complete` is false when some part has none.

    `share` is of the dollars when all of the report has a price, else of the time.
    """

    name: str
    seconds: float
    usd: float | None
    share: float
    complete: bool = True


@dataclass(frozen=True)
class SegmentLine(Line):
    """One machine's stretch. `end` says how it ended, and how that is known."""

    started_at: float | None = None
    machine: str = "?"
    usd_per_hour: float | None = None
    price_source: str | None = None
    restored_step: int | None = None
    last_step: int | None = None
    steps_lost: int = 0
    end: str = "?"


@dataclass(frozen=True)
class Report:
    """Everything a renderer needs. `places` is the number of digits at which all tables add up."""

    run: str
    stage: str | None
    state: str
    places: int
    total: Line
    phases: list[Line]
    segments: list[SegmentLine]
    by: dict[str, list[Line]]
    last_step: int | None
    tokens: float | None
    usd_per_billion_tokens: float | None
    train_loss: float | None
    val_loss: float | None
    notes: list[str] = field(default_factory=list)


def build(run: Run, now: float) -> Report:
    """The report on a run, as of `now` (unix seconds), which decides whether its last machine still runs."""
    parts = cells(run, now)
    lost = lost_work(run, now)
    priced = math.fsum(cell.usd for cell in parts if cell.usd is not None)
    places = money.places_for(priced)
    [total] = table(parts, None, ["total"], places)
    used = {cell.phase for cell in parts}
    # These two lines stand even at zero: that nothing was lost or left over is worth reading.
    always = {"train_lost", "not_attributed"} if "train_kept" in used else {"not_attributed"}
    order = [*(phase for phase in PHASES if phase in used | always), *sorted(used - set(PHASES))]
    by_segment = table(parts, "segment", [str(segment.number) for segment in run.segments], places, total.usd)
    tokens = _final(run, "tokens")
    whole_usd = total.usd if total.complete else None
    return Report(
        run=run.url,
        stage=run.stage,
        state=_how_it_ended(run, run.segments[-1], now),
        places=places,
        total=total,
        phases=table(parts, "phase", order, places, total.usd),
        segments=[
            _segment_line(run, segment, line, lost[segment.number], now)
            for segment, line in zip(run.segments, by_segment, strict=True)
        ],
        by={
            group: table(parts, group, sorted({getattr(c, group) for c in parts}), places, total.usd)
            for group in GROUPS
        },
        last_step=max((segment.steps.number[-1] for segment in run.segments if segment.steps.number), default=None),
        tokens=tokens,
        usd_per_billion_tokens=None if whole_usd is None or not tokens else whole_usd / tokens * 1e9,
        train_loss=_final(run, "loss"),
        val_loss=next((s.evals[-1]["val_loss"] for s in reversed(run.segments) if s.evals), None),
        notes=[*run.problems, *_price_notes(run), *_time_notes(run, now)],
    )


def table(
    parts: Iterable[Cell], group: str | None, order: list[str], places: int, total: float | None = None
) -> list[Line]:
    """Sum cells by one of their fields (None: all of them), a line per name of `order`, rounded to add up."""
    seconds, usd = dict.fromkeys(order, 0.0), dict.fromkeys(order, 0.0)
    unpriced, priced = set(), set()
    for cell in parts:
        name = getattr(cell, group) if group else order[0]
        seconds[name] += cell.seconds
        usd[name] += cell.usd or 0.0
        (unpriced if cell.usd is None else priced).add(name)
    # A line without anything in it costs nothing, unless nothing at all has a price.
    known = [usd[name] if name in priced or (priced and name not in unpriced) else None for name in order]
    shown = money.apportion(known, places, total)
    whole = seconds if unpriced else usd
    sum_of_whole = math.fsum(whole.values())
    return [
        Line(name, seconds[name], shown[i], whole[name] / sum_of_whole if sum_of_whole else 0.0, name not in unpriced)
        for i, name in enumerate(order)
    ]


def _segment_line(run: Run, segment: Segment, line: Line, lost: Lost, now: float) -> SegmentLine:
    return SegmentLine(
        **vars(line),
        started_at=segment.started_at,
        machine=_machine(segment),
        usd_per_hour=segment.machine.usd_per_hour,
        price_source=segment.machine.price_source,
        restored_step=segment.restored_step,
        last_step=segment.steps.number[-1] if segment.steps.number else None,
        steps_lost=lost.steps,
        end=_how_it_ended(run, segment, now),
    )


def _machine(segment: Segment) -> str:
    machine = segment.machine
    what = machine.instance_type or (f"{machine.gpus_per_node}x {machine.gpu}" if machine.gpu else "?")
    where = machine.zone or machine.region or machine.cloud or ""
    market = {None: "", True: "spot", False: "on demand"}[machine.spot]
    nodes = f"{machine.nodes} x" if machine.nodes > 1 else ""
    return " ".join(part for part in (nodes, what, where, market) if part)


def _how_it_ended(run: Run, segment: Segment, now: float) -> str:
    if segment.end is not None:
        return {"cap": "stopped by its cap"}.get(str(segment.end.get("reason")), str(segment.end.get("reason")))
    if not segment.slices:
        return "no heartbeat"
    if segment is run.segments[-1] and segment.is_live(now):
        return "running"
    return "killed (end: last heartbeat)"


def _final(run: Run, column: str) -> float | None:
    """The newest known value of a training metric; of a step that was done twice, the later one's."""
    for segment in reversed(run.segments):
        for value in reversed(getattr(segment.curve, column)):
            if value is not None:
                return value
    return None


def _price_notes(run: Run) -> list[str]:
    unpriced = [str(segment.number) for segment in run.segments if segment.machine.usd_per_hour is None]
    if not unpriced:
        return []
    return [
        f"no price is known for segment {_some(unpriced)}: its dollars are ?, and sums with it hold only the rest; "
        "set USD_PER_HOUR where the run is started"
    ]


def _time_notes(run: Run, now: float) -> list[str]:
    notes = []
    for segment in run.segments:
        jumps = [mark for mark in segment.marks if mark["name"] == "clock_jump"]
        if jumps:
            seconds = sum(mark.get("seconds") or 0.0 for mark in jumps)
            notes.append(
                f"segment {segment.number}: its clock was set by {seconds:+.0f} s while it ran; no duration is touched"
            )
    silent = [str(s.number) for s in run.segments if _how_it_ended(run, s, now) == "no heartbeat"]
    if silent:
        notes.append(f"segment {_some(silent)} left a start but no heartbeat: what that machine cost is not known")
    for before, after in zip(run.segments, run.segments[1:], strict=False):
        if before.ended_at is None or after.started_at is None:
            continue
        if before.started_at is not None and after.started_at < before.started_at - CLOCKS_AGREE_SECONDS:
            notes.append(
                f"segment {after.number} starts {before.started_at - after.started_at:.0f} s before segment "
                f"{before.number}, which is older: the clocks of the two machines differ"
            )
        elif (common := before.ended_at - after.started_at) > CLOCKS_AGREE_SECONDS:
            notes.append(
                f"segments {before.number} and {after.number} overlap by {money.duration(common)}: "
                "two machines were paid at once, or their clocks differ"
            )
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} more"
