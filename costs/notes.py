"""What the reader of a report should know about its figures: missing prices, caps, clocks. Pure."""

import itertools

from core.run.model import Run
from costs import money

# Machines seldom agree on the time to the second; below this, an overlap proves nothing.
CLOCKS_AGREE_SECONDS = 2.0


def notes(run: Run) -> list[str]:
    return [*_price_notes(run), *_cap_notes(run), *_time_notes(run)]


def some(names: list[str]) -> str:
    """A list of names, cut where it would only fill the page."""
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} more"


def _price_notes(run: Run) -> list[str]:
    unpriced = [str(segment.number) for segment in run.segments if segment.price is None]
    if not unpriced:
        return []
    return [
        f"no price is known for segment {some(unpriced)}: its dollars are ?, and sums with it hold only the rest; "
        "set USD_PER_HOUR where the run is started"
    ]


def _cap_notes(run: Run) -> list[str]:
    """Why a run stopped although nothing failed, and how to go on."""
    return [
        f"segment {segment.number} stopped at the cap of ${_dollars(mark.get('limit_usd'))} with "
        f"${_dollars(mark.get('spent_usd'))} spent, as asked; start the run again with a higher MAX_USD to go on"
        for segment in run.segments
        for mark in segment.marks
        if mark["name"] == "cap"
    ]


def _dollars(value: object) -> str:
    return money.text(value if isinstance(value, int | float) else None)


def _time_notes(run: Run) -> list[str]:
    notes = []
    for segment in run.segments:
        jumps = [mark for mark in segment.marks if mark["name"] == "clock_jump"]
        if jumps:
            seconds = sum(mark.get("seconds") or 0.0 for mark in jumps)
            notes.append(
                f"segment {segment.number}: its clock was set by {seconds:+.0f} s while it ran; no duration is touched"
            )
    silent = [str(segment.number) for segment in run.segments if not segment.spans]
    if silent:
        notes.append(f"segment {some(silent)} left a start but no heartbeat: what that machine cost is not known")
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
                f"segments {before.number} and {after.number} overlap by {money.duration(common)}: "
                "two machines were paid at once, or their clocks differ"
            )
    return notes
