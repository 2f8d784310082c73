"""When machines were up, by somebody else's record, and what of it the ledger does not cover.

The ledger begins with a process and ends with its last heartbeat. A launcher's record of the same machine
reaches further: from the launch (`provision`) to the shutdown (`idle_until_down`). Pure.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from clouds.base import Instance, MachineRecord
from core import figures
from core.run.model import Segment
from costs.model import OutsideTime

# A launcher polls: it notices up to this much later that a machine is gone, which is not billed.
NOTICED_LATE_SECONDS = 120.0
FAILED_LAUNCH_BEFORE_SECONDS = 3600.0


@dataclass
class Surroundings:
    stretches: list[OutsideTime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def surroundings(segments: list[Segment], uptimes: Iterable[MachineRecord], now: float) -> Surroundings:
    """What the records of this run's machines add to its ledger."""
    around = Surroundings()
    for uptime in sorted(uptimes, key=lambda record: record.start):
        if not is_of(segments, uptime):
            continue
        end = now if uptime.end is None else uptime.end
        inside = [s for s in segments if _same_machine(s, uptime) and s.started_at < end and s.ended_at > uptime.start]
        if inside:
            _around_segments(around, uptime, end, inside, now)
        elif uptime.was_up:
            around.stretches.append(OutsideTime("provision", uptime.start, end, uptime))
            around.notes.append(
                f"{uptime.origin}: {uptime.cluster} was up for {figures.duration(end - uptime.start)} and never got to "
                "the point of writing a ledger; its time is booked as provision"
            )
        else:
            most = uptime.price and uptime.price.usd(end - uptime.start)
            around.notes.append(
                f"{uptime.origin}: a launch of {uptime.cluster} failed after {figures.duration(end - uptime.start)} "
                f"without a machine that is known of; nothing is counted for it (at most ${figures.dollars(most)})"
            )
    return around


def is_of(segments: list[Segment], uptime: MachineRecord) -> bool:
    """Whether a record is of this run, by the names that its segments were given.

    The cluster of a managed job has its name to itself. Any other name is used again and again, for other runs too:
    then a record belongs here if it lies between this run's first and last sign of life, or is of a launch that
    failed shortly before.
    """
    for segment in segments:
        job, cluster = segment.launcher.get("managed_job_id"), segment.launcher.get("cluster")
        if job is not None and (uptime.cluster == cluster if cluster else uptime.job == job):
            return True
    own = [segment for segment in segments if segment.launcher.get("cluster") == uptime.cluster]
    times = [(segment.started_at, segment.ended_at) for segment in own if segment.started_at is not None]
    if not times:
        return False
    earliest = min(start for start, _ in times) - (0.0 if uptime.was_up else FAILED_LAUNCH_BEFORE_SECONDS)
    return uptime.start <= max(end for _, end in times) and (uptime.end is None or uptime.end >= earliest)


def with_cloud_times(
    uptimes: Iterable[MachineRecord], instances: Iterable[Instance], now: float
) -> list[MachineRecord]:
    """Replace a launcher's times by those of the cloud's own instances, where it still remembers them."""
    known = list(instances)
    refined = []
    for uptime in uptimes:
        until = now if uptime.end is None else uptime.end
        own = [each for each in known if each.cluster == uptime.cluster and uptime.start - 60 <= each.start <= until]
        ends = [each.end for each in own]
        if not own:
            refined.append(uptime)
            continue
        end = None if any(each.running for each in own) else uptime.end if None in ends else max(ends)
        exact = end is not None and None not in ends
        start = min(each.start for each in own)
        refined.append(replace(uptime, start=start, end=end, exact=exact, was_up=True, origin=Instance.ORIGIN))
    return refined


def _same_machine(segment: Segment, uptime: MachineRecord) -> bool:
    if segment.started_at is None:
        return False
    cluster = segment.launcher.get("cluster")
    return cluster == uptime.cluster or (cluster is None and segment.launcher.get("managed_job_id") == uptime.job)


def _around_segments(
    around: Surroundings, uptime: MachineRecord, end: float, inside: list[Segment], now: float
) -> None:
    first, last = inside[0], max(inside, key=lambda segment: segment.ended_at)
    if first.started_at > uptime.start:
        around.stretches.append(OutsideTime("provision", uptime.start, first.started_at, uptime, first))
    reached = first.ended_at
    for before, after in itertools.pairwise(inside):
        if after.started_at > reached:
            around.stretches.append(OutsideTime("idle", reached, after.started_at, uptime, before))
        reached = max(reached, after.ended_at)
    rest = end - reached
    if rest <= 0 or last.is_live(now):
        return
    if last.end is None and uptime.end is not None and rest <= NOTICED_LATE_SECONDS:
        if uptime.exact:  # killed between a heartbeat and the next
            around.stretches.append(OutsideTime("not_attributed", reached, end, uptime, last))
            return
        around.notes.append(
            f"segment {last.number}: {uptime.origin} has its machine up for {figures.duration(rest)} after its last "
            "heartbeat; taken for the delay in noticing that it was gone, not counted"
        )
    else:
        around.stretches.append(OutsideTime("idle_until_down", reached, end, uptime, last))
