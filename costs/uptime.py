"""Finds outside time, the time of machines that no segment covers, by comparing records of machines with the ledger.

The ledger begins when a process starts and ends with its last heartbeat. A launcher's record of the same machine also
covers the time from the launch to the process (`provision`) and from the last heartbeat to the shutdown
(`idle_until_down`). Several runs may use one machine. Each run pays for the time of its segments, and the run that
requested the machine pays for the rest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from clouds.base import Billing, Instance, MachineRecord
from clouds.providers import cloud_named
from core import figures
from core.run.journal import FLUSH_SECONDS
from core.run.model import Run, Segment
from core.run.paid import AFTER_SIGN_SECONDS, ALIVE_FOR_SECONDS, Paid
from costs.model import OutsideTime

# A launcher asks for a machine's state from time to time, so it notices the end of the machine up to this many seconds
# late. This delay is not billed.
NOTICED_LATE_SECONDS = 120.0
# Seconds from the last job's end to the machine's end, in addition to the idle minutes of the autostop. In eight
# launches with two idle minutes, both together took 79 to 133 s.
AUTOSTOP_TAKES_SECONDS = 60.0
# SkyPilot looks for jobs once a minute, so the idle minutes may begin up to a minute before the last job's end.
CHECK_SECONDS = 60.0
FAILED_LAUNCH_BEFORE_SECONDS = 3600.0
NAMED_BEFORE_SECONDS = 86400.0


@dataclass
class Found:
    """Outside time and notes for the reader.

    `more_seconds` holds, by segment number, seconds that may have to be added; `records` holds the machine's record.
    """

    times: list[OutsideTime] = field(default_factory=list)
    more_seconds: dict[int, float] = field(default_factory=dict)
    records: dict[int, MachineRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """The times (unix s) at which a segment's program ended and its machine was last known to be up.

    `alive` is None unless the machine gave signs of life after the program, and no more when it was kept up on purpose.
    """

    program: float | None
    alive: float | None = None


def outside_times(
    run: Run,
    records: Iterable[MachineRecord],
    now: float,
    others: Iterable[Segment] = (),
    attempts: Iterable[Paid] = (),
) -> Found:
    """Outside time that the records of a run's machines show.

    `others` are segments of other runs, and `attempts` the run's own records of its machines.
    """
    found, others, attempts = Found(), list(others), list(attempts)
    ends, numbers = _ends(run.segments, attempts), {each.number: at for at, each in enumerate(run.segments)}
    found.more_seconds = {
        number: seconds
        for number, seconds in unheard(run, now).items()
        if ends[number].program == run.segments[numbers[number]].ended_at
    }
    used: list[MachineRecord] = []
    for record in sorted(records, key=lambda each: each.start):
        end = now if record.end is None else record.end
        inside = [each for each in run.segments if _is_inside(each, record, end)]
        company = [each for each in others if _is_inside(each, record, end)]
        if not _is_of(run, record, inside, company):
            if not inside and not company and _is_unclaimed(run, record):
                found.notes.append(_unclaimed(record, end))
            continue
        used.append(record)
        found.records |= {segment.number: record for segment in inside}
        if inside:
            _around(found, run, record, end, inside, company, ends, now)
        elif record.was_up:
            found.times.append(OutsideTime("provision", record.start, end, record))
            found.notes.append(
                f"{record.origin}: {record.cluster} was up for {figures.duration(end - record.start)} but wrote no "
                "ledger; its time is booked as provision"
            )
        else:
            most = record.price and record.price.usd(end - record.start)
            found.notes.append(
                f"{record.origin}: a launch of {record.cluster} failed after {figures.duration(end - record.start)}, "
                "and no machine of this launch is known; nothing is counted for it "
                f"(it cost at most ${figures.dollars(most)})"
            )
    _without_record(found, run, used, attempts, ends, now)
    return found


def unheard(run: Run, now: float) -> dict[int, float]:
    """The seconds that a killed program may have run after its last heartbeat, by segment number."""
    return {
        each.number: each.unheard_seconds for each in run.segments if each.unheard_seconds and not each.is_live(now)
    }


def _ends(segments: Iterable[Segment], attempts: list[Paid]) -> dict[int, End]:
    """The end of each segment's program and machine, by segment number.

    After a kill, the node may have recorded a later end of the program.
    """
    known = {}
    for segment in segments:
        own = [each for each in attempts if each.is_in([segment])]
        ended = [segment.ended_at]
        if segment.end is None and segment.spans:
            ended += [each.ended_at for each in own]
        last = max((each for each in ended if each is not None), default=None)
        signs = [each.alive_at for each in own if each.alive_at is not None and last is not None]
        signs = [sign for sign in signs if 0 < sign - last < ALIVE_FOR_SECONDS - CHECK_SECONDS]
        known[segment.number] = End(last, max(signs, default=None))
    return known


def _is_of(run: Run, record: MachineRecord, inside: list[Segment], company: list[Segment]) -> bool:
    """Whether a record belongs to this run.

    The cluster of a managed job has a unique name. Any other cluster may serve several runs. The record of such a
    cluster belongs to each run with a segment on the machine and, if SkyPilot has kept the task, to the run that
    launched the cluster. If no such run is known, the record belongs to this run if it overlaps with the run's time on
    clusters of that name, or ended shortly before.
    """
    for segment in run.segments:
        job, cluster = segment.launcher.get("managed_job_id"), segment.launcher.get("cluster")
        if job is not None and (record.cluster == cluster if cluster else record.job == job):
            return True
    if inside or record.run is not None:
        return bool(inside) or record.run == run.url
    times = _times_on(run, record.cluster)
    if company or not times:
        return False
    earliest = min(start for start, _ in times) - FAILED_LAUNCH_BEFORE_SECONDS
    return record.start <= max(end for _, end in times) and (record.end is None or record.end >= earliest)


def _is_unclaimed(run: Run, record: MachineRecord) -> bool:
    """Whether a machine of this run's clusters ended in the day before the run, and the run that used it is unknown."""
    times = _times_on(run, record.cluster)
    if not times or record.run is not None or not record.was_up or record.end is None:
        return False
    return 0 <= min(start for start, _ in times) - record.end <= NAMED_BEFORE_SECONDS


def _unclaimed(record: MachineRecord, end: float) -> str:
    usd = record.price and record.price.usd(end - record.start)
    return (
        f"{record.origin}: {record.cluster} was also up earlier, for {figures.duration(end - record.start)} "
        f"(${figures.dollars(usd)}); no ledger in this bucket says for which run, so it is not counted"
    )


def _times_on(run: Run, cluster: str) -> list[tuple[float, float]]:
    own = [segment for segment in run.segments if segment.launcher.get("cluster") == cluster]
    return [(segment.started_at, segment.ended_at) for segment in own if segment.started_at is not None]


def with_instances(records: Iterable[MachineRecord], instances: Iterable[Instance], now: float) -> list[MachineRecord]:
    """The records with the cloud's times, if the cloud still lists the instances."""
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


def _is_inside(segment: Segment, record: MachineRecord, end: float) -> bool:
    """Whether a segment ran on the machine of a record."""
    if segment.started_at is None or not segment.started_at < end or not segment.ended_at > record.start:
        return False
    cluster = segment.launcher.get("cluster")
    return cluster == record.cluster or (cluster is None and segment.launcher.get("managed_job_id") == record.job)


def _around(
    found: Found,
    run: Run,
    record: MachineRecord,
    end: float,
    inside: list[Segment],
    company: list[Segment],
    ends: Mapping[int, End],
    now: float,
) -> None:
    """Adds the outside time of a machine before, between and after its segments, if this run requested it."""
    users = [(each, True) for each in inside] + [(each, False) for each in company]
    users.sort(key=lambda user: user[0].started_at)
    asked = users[0][1] if record.run is None else record.run == run.url
    if not asked:
        found.notes.append(
            f"{record.origin}: another run asked for {record.cluster}, on which segment "
            f"{', '.join(str(each.number) for each in inside[:8])} ran; that run pays for boot and idle time"
        )
        return
    if company:
        found.notes.append(
            f"{record.origin}: other runs used {record.cluster} too, and pay for their own segments; this run pays for "
            "the time that no run used, because it asked for the machine"
        )
    # If each node opens a segment, each node's time is counted separately. The nodes of a training run share one
    # ledger.
    nodes: dict[str | None, list[tuple[Segment, bool]]] = {}
    for user in users:
        alone = record.nodes > 1 and user[0].machine.nodes == 1
        nodes.setdefault(user[0].machine.host if alone else None, []).append(user)
    if None in nodes:
        nodes = {None: users}
    for node in nodes.values():
        _between(found, record, end, node, ends, now)
    silent = record.nodes - len(nodes) if None not in nodes else 0
    if silent > 0:
        usd = record.usd_per_hour and record.usd_per_hour * silent / record.nodes
        part = replace(record, nodes=silent, usd_per_hour=usd)
        found.times.append(OutsideTime("provision", record.start, end, part))
        found.notes.append(f"{record.origin}: {silent} of {record.nodes} nodes of {record.cluster} wrote no ledger")


def _between(
    found: Found,
    record: MachineRecord,
    end: float,
    users: list[tuple[Segment, bool]],
    ends: Mapping[int, End],
    now: float,
) -> None:
    own = [segment for segment, mine in users if mine]
    if not own:
        return
    for segment in own:  # the time after the segment's last heartbeat is another segment's time, or idle time
        found.more_seconds.pop(segment.number, None)
    cloud = cloud_named(own[0].machine.cloud or record.cloud)
    billing = cloud.billing if cloud else None
    first = users[0][0]
    if first.started_at > record.start:
        free = bool(billing and billing.from_ready)
        before = OutsideTime("provision", record.start, first.started_at, record, own[0], free=free)
        found.times.append(replace(before, more_seconds=before.end - before.start if free else 0.0))
    reached, last, last_is_own = None, first, True
    for segment, mine in users:
        if reached is not None and segment.started_at > reached:
            found.times.append(OutsideTime("idle", reached, segment.started_at, record, own[0]))
        ended = ends[segment.number].program if mine else segment.ended_at
        if reached is None or ended >= reached:
            reached, last, last_is_own = ended, segment, mine
    known = ends[last.number] if last_is_own else End(None)
    if known.program is not None:
        _unheard(found, record, last, min(known.program, end))
    if known.alive is not None or not last.is_live(now):
        if known.alive is not None and not record.exact:
            _after_sign(found, record, end, reached, last, known.alive)
        else:
            _after(found, record, end, reached, last if last_is_own else own[-1], last)
        if billing and record.end is not None:
            _round_up(found, record, billing, own[-1])


def _unheard(found: Found, record: MachineRecord, segment: Segment, ended: float) -> None:
    """Adds the time from the last heartbeat of a killed program to the end that its node recorded."""
    if ended > segment.ended_at:
        found.times.append(OutsideTime("not_attributed", segment.ended_at, ended, record, segment))


def _after_sign(
    found: Found, record: MachineRecord, end: float, reached: float, segment: Segment, alive: float
) -> None:
    """Adds the time from the end of the last program, at `reached`, to the machine's end.

    A machine ends soon after its last sign of life, unless its launcher still lists it.
    """
    latest = max(alive, min(end, alive + AFTER_SIGN_SECONDS))
    if end - latest > NOTICED_LATE_SECONDS:
        silence = f"{record.origin}: {record.cluster} {{}} {figures.duration(end - alive)} after its last sign of life"
        if record.end is None:
            latest = end
            found.notes.append(f"{silence.format('is still listed')}; `sky status --refresh` asks the cloud")
        else:
            found.notes.append(f"{silence.format('was found gone')}, which is taken for its end")
    time = OutsideTime("idle_until_down", reached, alive, record, segment, more_seconds=latest - alive)
    found.times.append(time)


def _after(found: Found, record: MachineRecord, end: float, reached: float, segment: Segment, last: Segment) -> None:
    """Adds the time from the end of the last program, at `reached`, to the end of the machine."""
    rest = end - reached
    if rest <= 0:
        return
    if last.end is None and record.end is not None and rest <= NOTICED_LATE_SECONDS and reached == last.ended_at:
        if record.exact:  # killed between two heartbeats
            found.times.append(OutsideTime("not_attributed", reached, end, record, segment))
            return
        if last is segment:
            found.more_seconds[last.number] = min(rest, FLUSH_SECONDS)
            found.notes.append(
                f"segment {last.number}: {record.origin} lists its machine for {figures.duration(rest)} after the last "
                "heartbeat; this is taken for the delay in noticing its end, and is not counted"
            )
        return
    sure = rest
    idle = record.idle_seconds
    if record.end is not None and not record.exact and idle is not None:
        expected = idle + AUTOSTOP_TAKES_SECONDS
        # The moment at which the machine ended itself is not recorded, so the rest of its time becomes a range.
        sure = min(rest, max(0.0, idle - CHECK_SECONDS))
        if rest > expected + NOTICED_LATE_SECONDS:
            found.notes.append(
                f"{record.origin}: {record.cluster} was to end itself {figures.duration(idle)} after its last job, and "
                f"was found gone {figures.duration(rest)} after it; its bill ends in between. The cloud's own list or "
                "an invoice has the exact time"
            )
    time = OutsideTime("idle_until_down", reached, reached + sure, record, segment, more_seconds=rest - sure)
    found.times.append(time)


def _round_up(found: Found, record: MachineRecord, billing: Billing, segment: Segment) -> None:
    """Adds the seconds after a machine's end that the cloud bills, because it bills whole units of time."""
    end, unit = record.end, billing.unit_seconds
    length = end - record.start
    if record.exact:
        rest = max(billing.least_seconds - length, -length % unit)
        if rest > 0:
            found.times.append(OutsideTime("billing_unit", end, end + rest, record, segment))
    elif unit > 1:
        found.times.append(OutsideTime("billing_unit", end, end, record, segment, more_seconds=unit))


def _without_record(
    found: Found,
    run: Run,
    used: list[MachineRecord],
    attempts: list[Paid],
    ends: Mapping[int, End],
    now: float,
) -> None:
    """Adds the time of machines that only the run's own folder records."""

    def is_covered(at: float) -> bool:
        return any(record.start <= at <= (now if record.end is None else record.end) for record in used)

    for segment in run.segments:
        ended, alive = ends[segment.number].program, ends[segment.number].alive
        if ended is None or is_covered(segment.ended_at):
            continue
        record = _as_record(segment.machine.host or "?", segment.ended_at, alive or ended, None)
        if ended > segment.ended_at:
            found.times.append(OutsideTime("not_attributed", segment.ended_at, ended, record, segment))
        if alive is not None:
            time = OutsideTime("idle_until_down", ended, alive, record, segment, more_seconds=AFTER_SIGN_SECONDS)
            found.times.append(time)
    for each in attempts:
        if each.is_in(run.segments) or is_covered(each.seen_at) or any(_ran_at(s, each) for s in run.segments):
            continue
        end = each.seen_at if each.ended_at is None else each.ended_at
        most = each.seconds_at_most(now) - (end - each.started_at)
        record = _as_record(each.host, each.started_at, end, each.usd_per_hour)
        found.times.append(OutsideTime("provision", each.started_at, end, record, more_seconds=max(0.0, most)))
        found.notes.append(
            f"machine {each.host}: was paid for {figures.duration(end - each.started_at)} but opened no segment "
            "(it was refused, or its program failed earlier); its time is booked as provision"
        )


def _ran_at(segment: Segment, attempt: Paid) -> bool:
    """Whether a segment on the same host covers the moment at which a program began."""
    if segment.machine.host != attempt.host or segment.started_at is None:
        return False
    return segment.started_at <= attempt.seen_at <= segment.ended_at


def _as_record(host: str, start: float, end: float, usd_per_hour: float | None) -> MachineRecord:
    source = None if usd_per_hour is None else "the run's own record of the machine"
    return MachineRecord(host, start, end, "record of the run", usd_per_hour=usd_per_hour, price_source=source)
