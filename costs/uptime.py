"""Finds outside time, the time of machines that no segment covers, by comparing records of machines with the ledger.

The ledger begins when a process starts and ends with its last heartbeat. A launcher's record of the same machine also
covers the time before, from the launch on (`provision`), and after, until the shutdown (`idle_until_down`).
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace

from clouds.base import Instance, MachineRecord
from core import figures
from core.run.model import Segment
from costs.model import OutsideTime

# A launcher polls: it notices up to this much later that a machine is gone. This delay is not billed.
NOTICED_LATE_SECONDS = 120.0
FAILED_LAUNCH_BEFORE_SECONDS = 3600.0


def outside_times(
    segments: list[Segment], records: Iterable[MachineRecord], now: float
) -> tuple[list[OutsideTime], list[str]]:
    """Outside time that the records of a run's machines show, and notes for the reader."""
    times: list[OutsideTime] = []
    notes: list[str] = []
    for record in sorted(records, key=lambda each: each.start):
        if not is_of(segments, record):
            continue
        end = now if record.end is None else record.end
        inside = [s for s in segments if _same_machine(s, record) and s.started_at < end and s.ended_at > record.start]
        if inside:
            more, note = _between(record, end, inside, now)
            times += more
            notes += note
        elif record.was_up:
            times.append(OutsideTime("provision", record.start, end, record))
            notes.append(
                f"{record.origin}: {record.cluster} was up for {figures.duration(end - record.start)} but wrote no "
                "ledger; its time is booked as provision"
            )
        else:
            most = record.price and record.price.usd(end - record.start)
            notes.append(
                f"{record.origin}: a launch of {record.cluster} failed after {figures.duration(end - record.start)}, "
                "and no machine is known that it started; nothing is counted for it "
                f"(at most ${figures.dollars(most)})"
            )
    return times, notes


def is_of(segments: list[Segment], record: MachineRecord) -> bool:
    """Whether a record belongs to this run, by the names of clusters and jobs in the run's segments.

    The cluster of a managed job has a unique name. Any other name may also be used by other runs. A record with such a
    name belongs to this run if it overlaps the time between the run's first and last sign of life, or if it is a launch
    that failed shortly before.
    """
    for segment in segments:
        job, cluster = segment.launcher.get("managed_job_id"), segment.launcher.get("cluster")
        if job is not None and (record.cluster == cluster if cluster else record.job == job):
            return True
    own = [segment for segment in segments if segment.launcher.get("cluster") == record.cluster]
    times = [(segment.started_at, segment.ended_at) for segment in own if segment.started_at is not None]
    if not times:
        return False
    earliest = min(start for start, _ in times) - (0.0 if record.was_up else FAILED_LAUNCH_BEFORE_SECONDS)
    return record.start <= max(end for _, end in times) and (record.end is None or record.end >= earliest)


def with_instances(records: Iterable[MachineRecord], instances: Iterable[Instance], now: float) -> list[MachineRecord]:
    """Records with the times of the cloud's own instances, where the cloud still lists them."""
    listed = list(instances)
    refined = []
    for record in records:
        until = now if record.end is None else record.end
        own = [each for each in listed if each.cluster == record.cluster and record.start - 60 <= each.start <= until]
        ends = [each.end for each in own]
        if not own:
            refined.append(record)
            continue
        end = None if any(each.running for each in own) else record.end if None in ends else max(ends)
        exact = end is not None and None not in ends
        start = min(each.start for each in own)
        refined.append(replace(record, start=start, end=end, exact=exact, was_up=True, origin=own[0].origin))
    return refined


def _same_machine(segment: Segment, record: MachineRecord) -> bool:
    if segment.started_at is None:
        return False
    cluster = segment.launcher.get("cluster")
    return cluster == record.cluster or (cluster is None and segment.launcher.get("managed_job_id") == record.job)


def _between(
    record: MachineRecord, end: float, inside: list[Segment], now: float
) -> tuple[list[OutsideTime], list[str]]:
    """Outside time of one machine before, between and after its segments, and notes."""
    times: list[OutsideTime] = []
    first, last = inside[0], max(inside, key=lambda segment: segment.ended_at)
    if first.started_at > record.start:
        times.append(OutsideTime("provision", record.start, first.started_at, record, first))
    reached = first.ended_at
    for before, after in itertools.pairwise(inside):
        if after.started_at > reached:
            times.append(OutsideTime("idle", reached, after.started_at, record, before))
        reached = max(reached, after.ended_at)
    rest = end - reached
    if rest <= 0 or last.is_live(now):
        return times, []
    if last.end is None and record.end is not None and rest <= NOTICED_LATE_SECONDS:
        if record.exact:  # killed between two heartbeats
            return [*times, OutsideTime("not_attributed", reached, end, record, last)], []
        return times, [
            f"segment {last.number}: {record.origin} lists its machine for {figures.duration(rest)} after the last "
            "heartbeat; this is taken for the delay in noticing its end, and is not counted"
        ]
    return [*times, OutsideTime("idle_until_down", reached, end, record, last)], []
