"""Builds the cost report of a run. All tables of a report add up to the same total.

report = build(read_run(url), time.time())
report.phases, report.segments, report.by["day"]
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from core import figures
from core.run.machine import Price
from core.run.model import Lost, Run, Segment
from core.run.phases import REPORT_PHASES
from core.run.timeline import SHOWN
from costs.about import About, about, stretches
from costs.cells import Cell, Spend, attribute, cells, summed_up
from costs.foreseen import Comparison, Foreseen, compare
from costs.foreseen import read as read_forecast
from costs.model import Origin, Outside, StorageUse
from costs.notes import notes_on_money, notes_on_time, some
from costs.sharing import shares_of
from costs.units import Curves, Units, curves, units
from costs.uptime import unheard

RUNNING = "running"
ENDINGS = {"cap": "stopped by its cap", "storage": "stopped: its store failed"}
# States of a run after which its managed job starts no other machine.
FINAL = ("finished", "failed", "interrupted", *ENDINGS.values())
GROUPS = ("stage", "day", "cloud", "region", "zone", "instance", "market")


@dataclass(frozen=True)
class Line:
    """One row of a table. `usd` is None if no part of the row has a price; `complete` is false if a part has no price.

    `share` is the row's share of the dollars or, if a part of the report has no price, of the time. If no source knows
    when a machine's bill began or ended, the dollars lie between `usd` and `usd_most`.
    """

    name: str
    seconds: float
    usd: float | None
    share: float
    complete: bool = True
    usd_most: float | None = None


@dataclass(frozen=True)
class SegmentLine(Line):
    """One segment, on one machine. `end` says how the segment ended.

    After a kill, `ended_at` is the time of the last heartbeat.
    """

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
    """The content of a report for all renderers. Dollars are rounded to `places` digits, and the tables still add up.

    `total` is the bill as known. It starts from the ledger's dollars, `ledger_usd`, applies the prices paid, and adds
    the amounts from other sources. It is complete if every second has a price and each applicable source has answered.
    `missing` names the sources that have not answered.
    """

    run: str
    stage: str | None
    state: str
    places: int
    total: Line
    ledger_usd: float | None
    phases: list[Line]
    segments: list[SegmentLine]
    by: dict[str, list[Line]]
    units: Units
    curves: Curves
    tags: tuple[str, ...] = ()
    origins: list[Origin] = field(default_factory=list)
    storage: StorageUse | None = None
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    is_managed: bool = False
    foreseen: Foreseen | None = None
    forecast: list[Comparison] = field(default_factory=list)
    about: About = About()
    charges: list[Cell] = field(default_factory=list)  # the lines of all tables are sums of these cells

    @property
    def has_prices(self) -> bool:
        """Whether every second has a price. If so, shares are shares of dollars. If not, they are shares of time."""
        return all(line.complete for line in self.phases)


# A function that returns dollars per hour on demand, by cloud, region and instance type. It returns None if the price
# is unknown.
OnDemand = Callable[[str, str, str], float | None]


def _in_order(cell: Cell) -> tuple[str, int, str, str]:
    """The sort key: day, segment number and phase. The order of cells is then the same with and without a cache."""
    return (cell.day, len(cell.segment), cell.segment, cell.phase)


def build(run: Run, now: float, on_demand: OnDemand = lambda *_: None, outside: Outside | None = None) -> CostReport:
    """The report on a run at `now` (unix seconds).

    The last machine counts as running if its last heartbeat is recent at `now`. `outside` holds the amounts from
    sources other than the ledger (costs.sources).
    """
    outside = outside or Outside()
    foreseen = read_forecast(run)
    lost = run.lost(now)
    attributed = attribute(run, lost, shares_of(run, outside.neighbours))
    more_seconds = outside.more_seconds if outside.is_asked else unheard(run, now)
    parts = cells(run, attributed, outside.times, more_seconds, outside.charges, outside.factor)
    points = {kind: run.points(kind) for kind in SHOWN}
    spend = Spend(run, attributed, outside.times, outside.charges, outside.factor)
    usd = math.fsum(cell.usd for cell in parts if cell.usd is not None)
    places = figures.places_for(usd)
    summed = summed_up(parts)
    [total] = table(summed, None, ["total"], places)
    used = {cell.phase for cell in summed}
    # These lines are shown even if they are zero, because a reader looks for them.
    always = {"train_lost", "not_attributed"} if "train_kept" in used else {"not_attributed"}
    order = [*(phase for phase in REPORT_PHASES if phase in used | always), *sorted(used - set(REPORT_PHASES))]
    phases = table(summed, "phase", order, places, total)
    numbers = [str(segment.number) for segment in run.segments]
    others = sorted({cell.segment for cell in parts} - set(numbers))
    lines = table(parts, "segment", numbers + others, places, total)
    return CostReport(
        run=run.url,
        stage=run.stage,
        state=_how_it_ended(run, run.segments[-1], now),
        places=places,
        total=replace(total, complete=total.complete and not outside.missing),
        ledger_usd=figures.apportion([outside.ledger_usd if outside.is_asked else run.usd], places)[0],
        phases=phases,
        segments=[
            _segment_line(run, segment, line, lost[segment.number], now)
            for segment, line in zip(run.segments, lines, strict=False)
        ]
        + [
            SegmentLine(**vars(line), end="no ledger" if line.seconds else "no machine")
            for line in lines[len(numbers) :]
        ],
        by={
            group: table(summed, group, sorted({getattr(cell, group) for cell in summed}), places, total)
            for group in GROUPS
        },
        units=units(
            run,
            attributed,
            spend,
            {line.name: line.seconds for line in phases},
            usd if total.complete else None,
            _on_demand_usd(summed, on_demand),
            outside.times,
            points,
        ),
        curves=replace(curves(run, spend, points), machines=stretches(run, attributed, outside.times)),
        tags=tuple(sorted({tag for segment in run.segments for tag in segment.tags})),
        origins=[*_origins(run), *outside.origins],
        storage=outside.storage,
        notes=[*notes_on_money(run), *run.problems, *outside.notes, *notes_on_time(run)],
        missing=outside.missing,
        foreseen=foreseen,
        forecast=compare(foreseen, summed) if foreseen else [],
        is_managed=any(segment.launcher.get("managed_job_id") for segment in run.segments),
        about=about(run, outside.budget),
        charges=sorted(parts, key=_in_order),
    )


def _on_demand_usd(parts: list[Cell], on_demand: OnDemand) -> float | None:
    """The dollars that the same hours would have cost on demand.

    None if the run had no spot machines, or if a price is unknown.
    """
    if not any(cell.market == "spot" for cell in parts):
        return None
    usd = 0.0
    for cell in parts:
        if cell.market == "spot" and cell.seconds:
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
    parts: Iterable[Cell], group: str | None, order: list[str], places: int, total: Line | None = None
) -> list[Line]:
    """One Line per name in `order`: the sum of the cells whose field `group` has that name.

    The dollars are rounded so that the lines add up to `total`. If `group` is None, there is one line for all cells.
    """
    cells_of = {name: [] for name in order}
    for cell in parts:
        cells_of[getattr(cell, group) if group else order[0]].append(cell)
    # fsum gives the same sum in any order: the cache may change the order of the cells.
    seconds = {name: math.fsum([cell.seconds for cell in own]) for name, own in cells_of.items()}
    usd = {name: math.fsum([cell.usd or 0.0 for cell in own]) for name, own in cells_of.items()}
    more = [math.fsum([cell.more_usd for cell in own]) for own in cells_of.values()]
    priced = {name for name, own in cells_of.items() if any(cell.usd is not None for cell in own)}
    unpriced = {name for name, own in cells_of.items() if any(cell.usd is None for cell in own)}
    # A line without cells costs zero dollars, or an unknown amount if no cell has a price.
    known = [usd[name] if name in priced or (priced and name not in unpriced) else None for name in order]
    shown = figures.apportion(known, places, total and total.usd)
    above = figures.apportion(more, places, total and (total.usd_most or 0.0) - (total.usd or 0.0))
    whole = seconds if unpriced else usd
    sum_of_whole = math.fsum(whole.values())
    return [
        Line(
            name,
            seconds[name],
            shown[i],
            whole[name] / sum_of_whole if sum_of_whole else 0.0,
            name not in unpriced,
            None if shown[i] is None else round(shown[i] + above[i], places),
        )
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
        return RUNNING
    return "killed (end: last heartbeat)"
