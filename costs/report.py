"""Builds the cost report of a run, from its arguments alone. All tables of a report add up to the same total.

report = build(read_run(url), time.time())
report.phases, report.segments, report.by["day"]
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from core import figures
from core.run import timeline
from core.run.machine import Price
from core.run.model import Lost, Run, Segment
from core.run.phases import REPORT_PHASES
from costs.cells import Cell, Spend, attribute, cells
from costs.model import Origin, Outside, StorageUse
from costs.units import Curves, Units, curves, units

ENDINGS = {"cap": "stopped by its cap", "storage": "stopped: its store was away"}
GROUPS = ("stage", "day", "cloud", "region", "zone", "instance", "market")


@dataclass(frozen=True)
class Line:
    """One row of a table. `usd` is None if no part of it has a price; `complete` is false if some part has none.

    `share` is the row's share of the dollars or, if a part of the report has no price, of the time.
    """

    name: str
    seconds: float
    usd: float | None
    share: float
    complete: bool = True


@dataclass(frozen=True)
class SegmentLine(Line):
    """One segment, on one machine. `end` says how it ended; after a kill, `ended_at` is the last heartbeat."""

    started_at: float | None = None
    ended_at: float | None = None
    machine: str = "?"
    usd_per_hour: float | None = None
    price_source: str | None = None
    restored_step: int | None = None
    last_step: int | None = None
    steps_kept: int = 0
    steps_lost: int = 0
    end: str = "?"


@dataclass(frozen=True)
class CostReport:
    """The content of a report for all renderers. Tables add up when rounded to `places` digits."""

    run: str
    stage: str | None
    state: str
    places: int
    total: Line
    phases: list[Line]
    segments: list[SegmentLine]
    by: dict[str, list[Line]]
    units: Units
    curves: Curves
    tags: tuple[str, ...] = ()
    origins: list[Origin] = field(default_factory=list)
    storage: StorageUse | None = None
    notes: list[str] = field(default_factory=list)


# Dollars per hour on demand, by cloud, region and instance type; None if unknown.
OnDemand = Callable[[str, str, str], float | None]


def build(run: Run, now: float, on_demand: OnDemand = lambda *_: None, outside: Outside | None = None) -> CostReport:
    """The report on a run at `now` (unix seconds), which decides whether its last machine is still running.

    `outside` holds what other sources add to the ledger (costs.sources).
    """
    outside = outside or Outside()
    lost = run.lost(now)
    attributed = attribute(run, lost)
    parts = cells(run, attributed, outside.times)
    spend = Spend(run, attributed, outside.times)
    places = figures.places_for(math.fsum(cell.usd for cell in parts if cell.usd is not None))
    [total] = table(parts, None, ["total"], places)
    used = {cell.phase for cell in parts}
    # These two lines are shown even at zero, because a reader looks for them.
    always = {"train_lost", "not_attributed"} if "train_kept" in used else {"not_attributed"}
    order = [*(phase for phase in REPORT_PHASES if phase in used | always), *sorted(used - set(REPORT_PHASES))]
    phases = table(parts, "phase", order, places, total.usd)
    numbers = [str(segment.number) for segment in run.segments]
    others = sorted({cell.segment for cell in parts} - set(numbers))
    lines = table(parts, "segment", numbers + others, places, total.usd)
    return CostReport(
        run=run.url,
        stage=run.stage,
        state=_how_it_ended(run, run.segments[-1], now),
        places=places,
        total=total,
        phases=phases,
        segments=[
            _segment_line(run, segment, line, lost[segment.number], now)
            for segment, line in zip(run.segments, lines, strict=False)
        ]
        + [SegmentLine(**vars(line), end="no ledger") for line in lines[len(numbers) :]],
        by={
            group: table(parts, group, sorted({getattr(cell, group) for cell in parts}), places, total.usd)
            for group in GROUPS
        },
        units=units(
            run,
            lost,
            spend,
            {line.name: line.seconds for line in phases},
            total.usd if total.complete else None,
            _on_demand_usd(parts, on_demand),
            outside.times,
        ),
        curves=curves(run, spend),
        tags=tuple(sorted({tag for segment in run.segments for tag in segment.tags})),
        origins=[*_origins(run), *outside.origins],
        storage=outside.storage,
        notes=[*run.problems, *outside.notes, *notes(run)],
    )


def _on_demand_usd(parts: list[Cell], on_demand: OnDemand) -> float | None:
    """Dollars of the same hours on demand; None without spot machines, or if a price is unknown."""
    if not any(cell.market == "spot" for cell in parts):
        return None
    usd = 0.0
    for cell in parts:
        if cell.market == "spot" and cell.phase != "api":
            price = on_demand(cell.cloud, cell.region, cell.instance)
            cost = None if price is None else Price(price * cell.nodes, "on demand").usd(cell.seconds)
        else:
            cost = cell.usd
        if cost is None:
            return None
        usd += cost
    return usd


def _origins(run: Run) -> list[Origin]:
    found = [Origin("time by phase", f"ledger of {len(run.segments)} segment{'s' * (len(run.segments) != 1)}")]
    prices: dict[str, list[str]] = {}
    for segment in run.segments:
        if segment.price:
            prices.setdefault(segment.price.source, []).append(str(segment.number))
    return found + [Origin(f"price of segment {some(numbers)}", source) for source, numbers in prices.items()]


def table(
    parts: Iterable[Cell], group: str | None, order: list[str], places: int, total: float | None = None
) -> list[Line]:
    """One Line per name in `order`: the sum of the cells whose field `group` has that name. The dollars are rounded so
    that the lines add up to `total`. With `group=None`, one line for all cells."""
    cells_of = {name: [] for name in order}
    for cell in parts:
        cells_of[getattr(cell, group) if group else order[0]].append(cell)
    # fsum, because the cache may change the order of the cells, which must not change a digit.
    seconds = {name: math.fsum(cell.seconds for cell in own) for name, own in cells_of.items()}
    usd = {name: math.fsum(cell.usd or 0.0 for cell in own) for name, own in cells_of.items()}
    priced = {name for name, own in cells_of.items() if any(cell.usd is not None for cell in own)}
    unpriced = {name for name, own in cells_of.items() if any(cell.usd is None for cell in own)}
    # A line without cells costs zero dollars, or an unknown amount if no cell has a price.
    known = [usd[name] if name in priced or (priced and name not in unpriced) else None for name in order]
    shown = figures.apportion(known, places, total)
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
        ended_at=segment.ended_at,
        machine=_machine(segment),
        usd_per_hour=segment.machine.usd_per_hour,
        price_source=segment.machine.price_source,
        restored_step=segment.restored_step,
        last_step=segment.steps.number[-1] if segment.steps.number else None,
        steps_kept=len(segment.steps.number) - lost.steps,
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
        return ENDINGS.get(str(segment.end.get("reason")), str(segment.end.get("reason")))
    if not segment.spans:
        return "no heartbeat"
    if segment is run.segments[-1] and segment.is_live(now):
        return "running"
    return "killed (end: last heartbeat)"


# Clocks of machines differ by up to this much, so that a shorter overlap proves nothing.
CLOCKS_AGREE_SECONDS = 2.0


def notes(run: Run) -> list[str]:
    return [*_price_notes(run), *_cap_notes(run), *_forecast_notes(run), *_time_notes(run)]


def some(names: list[str]) -> str:
    """The names, separated by commas. Of a long list only the first eight, and the number of the others."""
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} more"


def _price_notes(run: Run) -> list[str]:
    unpriced = [str(segment.number) for segment in run.segments if segment.price is None]
    if not unpriced:
        return []
    return [
        f"no price is known for segment {some(unpriced)}: its dollars are ?, and sums count only the other segments; "
        "set USD_PER_HOUR where the run is started"
    ]


def _cap_notes(run: Run) -> list[str]:
    """For each segment that its cap stopped, the cap and how to continue."""
    return [
        f"segment {segment.number} stopped at the cap of ${_dollars(mark.get('limit_usd'))} with "
        f"${_dollars(mark.get('spent_usd'))} spent; to continue, start the run again with a higher MAX_USD"
        for segment in run.segments
        for mark in segment.marks
        if mark["name"] == "cap"
    ]


def _forecast_notes(run: Run) -> list[str]:
    """What the run expects of itself; after its end, the forecast at half of the steps and what came."""
    points = [point for point in run.points("forecast") if point.values["val_loss"] is not None]
    if not points:
        return []
    measured = run.points("eval")
    ended = run.segments[-1].end
    if ended and ended.get("reason") == "finished" and measured:
        came = measured[-1]
        point = min(points, key=lambda point: abs(point.step - came.step / 2))
        tail = f"; it came to {came.values['val_loss']:.3f} and ${_dollars(run.usd)}"
    else:
        point, tail = points[-1], ""
    loss = f"{point.values['val_loss']:.3f} ± {point.values['error'] or 0.0:.3f}"
    end = int(point.values["end"] or 0)
    return [
        f"forecast at step {point.step}: validation loss {loss} at step {end}, ${_dollars(point.values['usd'])}{tail}"
    ]


def _dollars(value: object) -> str:
    return figures.dollars(timeline.number(value))


def _time_notes(run: Run) -> list[str]:
    notes = []
    for segment in run.segments:
        jumps = [mark for mark in segment.marks if mark["name"] == "clock_jump"]
        if jumps:
            seconds = sum(timeline.number(mark.get("seconds")) or 0.0 for mark in jumps)
            notes.append(
                f"segment {segment.number}: its clock was set by {seconds:+.0f} s while it ran; durations are correct"
            )
    silent = [str(segment.number) for segment in run.segments if not segment.spans]
    if silent:
        notes.append(f"segment {some(silent)} has a start but no heartbeat, so the cost of its machine is not known")
    for before, after in itertools.pairwise(run.segments):
        if before.ended_at is None or after.started_at is None:
            continue
        if before.started_at is not None and after.started_at < before.started_at - CLOCKS_AGREE_SECONDS:
            notes.append(
                f"segment {after.number} starts {before.started_at - after.started_at:.0f} s before segment "
                f"{before.number}, which is older: the clocks of the two machines differ"
            )
        elif (common := before.ended_at - after.started_at) > CLOCKS_AGREE_SECONDS:
            notes.append(
                f"segments {before.number} and {after.number} overlap by {figures.duration(common)}: "
                "two machines were paid at the same time, or their clocks differ"
            )
    return notes
