"""Writes sentences on a run that the tables of a report cannot hold."""

import itertools

from core import figures
from core.run import timeline
from core.run.model import Run
from costs.sharing import machine_of

# The clocks of machines may differ by this many seconds, so a shorter overlap proves nothing.
CLOCKS_AGREE_SECONDS = 2.0


def notes_on_money(run: Run) -> list[str]:
    """The notes at the top of a report: unknown prices, caps that were reached, and a forecast."""
    return [*_price_notes(run), *_cap_notes(run), *_forecast_notes(run)]


def some(names: list[str]) -> str:
    """The names, separated by commas. A long list is cut after eight names and ends with the number of the others."""
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
    """A sentence for each segment that was stopped by the cap. It names the cap, and says how to continue."""
    return [
        f"segment {segment.number} stopped at the cap of ${_dollars(mark.get('limit_usd'))} with "
        f"${_dollars(mark.get('spent_usd'))} spent; to continue, start the run again with a higher MAX_USD"
        for segment in run.segments
        for mark in segment.marks
        if mark["name"] == "cap"
    ]


def _forecast_notes(run: Run) -> list[str]:
    """A note with a forecast of the run.

    If the run has finished, this is the forecast that was made nearest to half of the run's steps, with the outcome. If
    the run has not finished, this is the newest forecast.
    """
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


def notes_on_time(run: Run) -> list[str]:
    """Sentences on clocks that disagree, segments that overlap, and machines without a heartbeat."""
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
            shared = machine_of(before) and machine_of(before) == machine_of(after)
            notes.append(
                f"segments {before.number} and {after.number} overlap by {figures.duration(common)}: "
                + (
                    "they shared a machine, and each pays half of that time"
                    if shared
                    else "two machines were paid at the same time, or their clocks differ"
                )
            )
    return notes
