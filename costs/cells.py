"""Splits a run into a flat table of cells, the smallest parts that have a price. Reads nothing but its arguments.

Every figure in dollars is a sum over cells, so that all groupings add up to the same total. `[dataclasses.asdict(cell)
for cell in cells(run, attributed)]` can be loaded into a DataFrame.

A step counts for the last segment that computed it. If a later segment continued from an earlier step, all steps above
that step were repeated. The train and data-wait time of repeated and of unfinished steps is `train_lost`. Time without
a phase in the ledger is `not_attributed`. The phase `api` holds dollars paid to an endpoint, but no time: a machine's
wait for the endpoint belongs to another phase.
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from clouds.base import MachineRecord
from core.run import timeline
from core.run.machine import Price
from core.run.model import Lost, Run, Segment, Span
from core.run.phases import REPORT_PHASES
from costs.model import Charge, OutsideTime
from costs.sharing import Shares

# A report groups cells and looks up prices by these fields. It also groups by phase and day.
_PLACE = operator.attrgetter("stage", "cloud", "region", "zone", "instance", "market", "nodes")

MARKETS = {None: "?", True: "spot", False: "on demand"}

# Spans by segment number, with the phases of a report.
Attributed = dict[int, list[Span]]


@dataclass(frozen=True)
class Cell:
    """Seconds of one phase on one day on one machine. `usd` is None if the price is unknown.

    If no source knows when a machine's bill began or ended, up to `more_usd` dollars may have to be added.
    """

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
    more_usd: float = 0.0


def cells(
    run: Run,
    attributed: Attributed,
    outside: Sequence[OutsideTime] = (),
    more_seconds: Mapping[int, float] | None = None,
    charges: Sequence[Charge] = (),
    factor: float = 1.0,
) -> list[Cell]:
    """All cells of a run, with its payments to endpoints and `outside` time. `attributed` comes from `attribute`.

    `more_seconds` holds, by segment number, the seconds that may have to be added to the segment. `charges` have
    dollars but no time. The dollars that `factor` adds (1.19 is a tax of 19 %) become separate cells.
    """
    parts = [cell for segment in run.segments for cell in _segment_cells(run, segment, attributed[segment.number])]
    for segment in run.segments:
        if segment.price and (more := (more_seconds or {}).get(segment.number)):
            cell = _cell(run, segment, "not_attributed", _day(segment.ended_at), 0.0, segment.price)
            parts.append(replace(cell, more_usd=segment.price.usd(more)))
    for segment, usd in paid_to_endpoints(run):
        cell = _cell(run, segment, "api", _day(segment.ended_at), 0.0, None)
        parts.append(replace(cell, usd=usd, price_source="budget of the run's settings"))
    parts += [cell for time in outside for cell in _outside_cells(run, time)]
    parts += [_charge_cell(run, charge) for charge in charges]
    return parts + (_factor_cells(parts, factor) if factor != 1.0 else [])


def _charge_cell(run: Run, charge: Charge) -> Cell:
    if charge.segment is not None:
        cell = _cell(run, charge.segment, charge.phase, _day(charge.end), 0.0, None)
    else:
        nowhere = dict.fromkeys(("cloud", "region", "zone", "instance", "market"), "–")
        name = f"– {charge.phase}"
        cell = Cell(
            charge.phase, 0.0, None, name, run.stage or "?", _day(charge.end), **nowhere, nodes=1, price_source=""
        )
    return replace(cell, usd=charge.usd, price_source=charge.source)


def _factor_cells(parts: Sequence[Cell], factor: float) -> list[Cell]:
    """One cell per place and day, with the dollars that a factor adds there or takes off."""
    found: dict[Cell, list[Cell]] = {}
    for cell in parts:
        key = replace(cell, phase="factor", seconds=0.0, usd=None, more_usd=0.0, price_source="COST_FACTOR")
        found.setdefault(key, []).append(cell)
    rest, made = factor - 1, []
    for key, own in found.items():
        usd, above = math.fsum(cell.usd or 0.0 for cell in own), math.fsum(cell.more_usd for cell in own)
        if usd or above:
            made.append(replace(key, usd=usd * rest, more_usd=above * rest))
    return made


def summed_up(parts: Sequence[Cell]) -> list[Cell]:
    """Merges the cells of all segments: cells that differ only in segment, dollars and time become one.

    Cells without a price are not merged with priced ones.
    """
    groups: dict[tuple, list[Cell]] = {}
    for cell in parts:
        groups.setdefault((cell.usd is None, cell.phase, cell.day, *_PLACE(cell)), []).append(cell)
    return [
        replace(
            own[0],
            segment="",
            seconds=math.fsum([cell.seconds for cell in own]),
            usd=None if own[0].usd is None else math.fsum([cell.usd for cell in own]),
            more_usd=math.fsum([cell.more_usd for cell in own]),
        )
        for own in groups.values()
    ]


def paid_to_endpoints(run: Run) -> list[tuple[Segment, float]]:
    """Each segment that paid an endpoint, with the dollars that it paid.

    A mark `api` states the dollars since the run began. A killed segment may not have written its last mark. The next
    segment then finds these dollars in the run's folder, and they count for that next segment.
    """
    found, known = [], 0.0
    for segment in run.segments:
        for mark in segment.marks:
            paid = timeline.number(mark.get("usd")) if mark["name"] == "api" else None
            if paid is not None and paid > known:
                found.append((segment, paid - known))
                known = paid
    return found


def attribute(run: Run, lost: dict[int, Lost], shares: Mapping[int, Shares] | None = None) -> Attributed:
    """Split the ledger's phases into the phases of a report. `lost` is the result of `run.lost`.

    `shares` belong to the segments that shared a machine (costs.sharing.shares_of).
    """
    found = {segment.number: _attribute(segment, lost[segment.number]) for segment in run.segments}
    for number, share in (shares or {}).items():
        found[number] = [share.applied(span) for span in found[number]]
    return found


def _attribute(segment: Segment, lost: Lost) -> list[Span]:
    """The segment's spans with the phases of a report, newest first.

    Lost steps are the last steps of a segment, so lost time is taken from the newest spans first.
    """
    left = {"train": lost.train_seconds, "data_wait": lost.wait_seconds}
    spans = []
    for span in reversed(segment.spans):
        phases = {"not_attributed": max(0.0, span.seconds - math.fsum(span.phases.values()))}
        for phase, seconds in span.phases.items():
            if again := min(seconds, left.get(phase, 0.0)):
                left[phase] -= again
                phases["train_lost"] = phases.get("train_lost", 0.0) + again
            phases["train_kept" if phase == "train" else phase] = seconds - again
        spans.append(Span(span.start, span.end, phases))
    return spans


def _segment_cells(run: Run, segment: Segment, spans: list[Span]) -> list[Cell]:
    sums: dict[tuple[str, str], float] = {}
    for span in spans:
        day = _day(span.start)
        for phase, seconds in span.phases.items():
            sums[phase, day] = sums.get((phase, day), 0.0) + seconds
    price = segment.price
    if not sums:  # without a heartbeat, the machine's time is unknown
        sums["not_attributed", _day(segment.started_at)], price = 0.0, None
    of = segment.machine
    place = (of.cloud or "?", of.region or "?", of.zone or "?", of.instance_type or "?", MARKETS[of.spot], of.nodes)
    facts = (*place, of.price_source or "?")
    number, stage = str(segment.number), run.stage or "?"
    # dataclasses.replace would take several times as long.
    return [
        Cell(phase, seconds, price and price.usd(seconds), number, stage, day, *facts)
        for (phase, day), seconds in sums.items()
        if seconds > 0 or price is None
    ]


def _outside_cells(run: Run, time: OutsideTime) -> list[Cell]:
    """One cell per day, cut at midnight UTC. Seconds that may have to be added count on the last day."""
    found = []
    start = time.start
    while start < time.end:
        end = min(time.end, (start // 86400 + 1) * 86400)
        cell = _cell(run, time.segment, time.phase, _day(start), end - start, time.price, time.record)
        found.append(replace(cell, usd=time.price and 0.0) if time.free else cell)
        start = end
    if time.price and time.more_seconds:
        found = found or [_cell(run, time.segment, time.phase, _day(time.start), 0.0, time.price, time.record)]
        found[-1] = replace(found[-1], more_usd=time.price.usd(time.more_seconds))
    return found


def _cell(
    run: Run,
    segment: Segment | None,
    phase: str,
    day: str,
    seconds: float,
    price: Price | None,
    record: MachineRecord | None = None,
) -> Cell:
    """Builds a cell. Facts that the segment lacks come from the launcher's record of the machine."""

    def of(ours: str) -> object:
        known = [getattr(source, ours) for source in (segment and segment.machine, record) if source]
        return next((value for value in known if value is not None), None)

    spot = of("spot")
    return Cell(
        phase=phase,
        seconds=seconds,
        usd=price and price.usd(seconds),
        segment=str(segment.number) if segment else f"– {record.cluster}",
        stage=run.stage or "?",
        day=day,
        cloud=of("cloud") or "?",
        region=of("region") or "?",
        zone=of("zone") or "?",
        instance=of("instance_type") or "?",
        market=MARKETS[spot],
        nodes=int(of("nodes") or 1),
        price_source=of("price_source") or "?",
    )


def _day(time: float | None) -> str:
    return "?" if time is None else _name_of_day(time // 86400)


@functools.lru_cache(4096)
def _name_of_day(day: float) -> str:
    return datetime.fromtimestamp(day * 86400, UTC).date().isoformat()


class Spend:
    """Cumulative dollars of a run by phase.

    Time that has no price counts as zero dollars. If there is such time, `complete` is False.
    """

    def __init__(
        self,
        run: Run,
        attributed: Attributed,
        outside: Sequence[OutsideTime] = (),
        charges: Sequence[Charge] = (),
        factor: float = 1.0,
    ):
        self.complete = True
        pieces: dict[str, list[tuple[float, float, float]]] = {}
        for segment in run.segments:
            price = segment.price
            self.complete &= price is not None
            for span in attributed[segment.number] if price else ():
                start, end = span.start, span.end
                for phase, seconds in span.phases.items():
                    if seconds > 0:
                        pieces.setdefault(phase, []).append((start, end, seconds / 3600 * price.usd_per_hour))
        for time in outside:
            self.complete &= time.price is not None
            pieces.setdefault(time.phase, []).append((time.start, time.end, time.usd or 0.0))
        for segment, usd in paid_to_endpoints(run):
            ended = segment.ended_at or 0.0
            start = ended if segment.started_at is None else min(segment.started_at, ended)
            pieces.setdefault("api", []).append((start, ended, usd))
        for charge in charges:
            pieces.setdefault(charge.phase, []).append((charge.start, charge.end, charge.usd))
        if factor != 1.0:
            every = [piece for phase in pieces.values() for piece in phase]
            pieces["factor"] = [(start, end, usd * (factor - 1)) for start, end, usd in every]
        names = [*(p for p in REPORT_PHASES if p in pieces), *sorted(set(pieces) - set(REPORT_PHASES))]
        self.curves = {name: _ramp(pieces[name]) for name in names}
        edges = [edge for phase in pieces.values() for start, end, _ in phase for edge in (start, end)]
        self.start, self.end = (min(edges), max(edges)) if edges else (0.0, 0.0)

    def by_phase(self, times: Sequence[float]) -> dict[str, np.ndarray]:
        """Cumulative dollars of each phase at each time."""
        return {name: np.interp(times, *curve) for name, curve in self.curves.items()}

    def at(self, times: Sequence[float]) -> np.ndarray:
        """Cumulative dollars of all phases at each time."""
        return sum(self.by_phase(times).values(), np.zeros(len(times)))


def _ramp(pieces: list[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Times, and the dollars spent until each time, from intervals (start, end, dollars) that may overlap.

    The dollars of an interval are spread evenly over it.
    """
    start, end, usd = (np.array(column) for column in zip(*pieces, strict=True))
    rate = usd / np.maximum(end - start, 1e-9)
    corners = np.unique(np.concatenate([start, end]))
    change = np.zeros(len(corners))
    np.add.at(change, np.searchsorted(corners, start), rate)
    np.add.at(change, np.searchsorted(corners, end), -rate)
    spent = np.concatenate([[0.0], np.cumsum(np.cumsum(change)[:-1] * np.diff(corners))])
    return corners, spent
