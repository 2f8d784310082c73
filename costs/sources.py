"""Asks SkyPilot and the clouds for machines, prices, bills and unfinished uploads, in addition to the ledger.

None of these sources is required. The report names the origin of each figure, or the reason why a source gave no
answer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clouds import sky_records, skypilot
from clouds.base import Cloud, MachineRecord, Unavailable, is_controller
from clouds.providers import CLOUDS
from core import figures
from core.environment import positive
from core.errors import DataError
from core.run import budget, paid
from core.run.budget import Budget
from core.run.model import Run, Segment
from core.run.paid import Paid
from costs import added
from costs.beside import add_charges, origins
from costs.discover import neighbours, storage_use
from costs.model import Origin, Outside
from costs.notes import some
from costs.uptime import outside_times, with_instances

LAUNCH = "launch, idle until down"


def ask_others(
    run: Run,
    environment: Mapping[str, str],
    now: float,
    offline: bool = False,
    records: Callable[[Sequence[str]], list[MachineRecord]] = sky_records.machine_records,
    jobs: Callable[[], list[Mapping[str, Any]]] = sky_records.job_queue,
    clouds: Mapping[str, Cloud] = CLOUDS,
) -> Outside:
    """Ask other sources about `run`. If `offline` is true, only the store is asked.

    This function changes `run`: if the cloud has a history of spot prices, the prices paid replace the expected spot
    prices.
    """
    outside = Outside(is_asked=True, ledger_usd=run.usd, factor=positive(environment, "COST_FACTOR") or 1.0)
    if outside.factor != 1.0:
        outside.origins.append(Origin("factor", f"COST_FACTOR is {outside.factor:g} and multiplies all other lines"))
    outside.storage, outside.budget = storage_use(run), _budget(run, outside)
    outside.charges += added.charges(run)
    rates = outside.storage.rates
    outside.origins.append(Origin("storage", f"listing of the run; rates: {rates.source if rates else '?'}"))
    attempts = paid.read_all(run.folder, paid.attempts_in(run.folder, run.objects))
    outside.neighbours = neighbours(run)
    if offline:
        _machines(run, outside, environment, now, attempts, {}, lambda _: _refuse("not asked: --offline"))
        if any(_has_spot_history(segment, clouds) for segment in run.segments):
            _missing(outside, "paid spot prices", "not asked: --offline")
        return outside
    unfinished = sum(cloud.unfinished_uploads(run.url) or 0 for cloud in clouds.values())
    outside.storage = dataclasses.replace(outside.storage, unfinished_uploads=unfinished)
    _machines(run, outside, environment, now, attempts, clouds, records)
    outside.origins += _managed_jobs(run, jobs)
    _paid_spot_prices(run, outside, clouds)
    _bills(run, outside, environment, now, clouds)
    return outside


def _budget(run: Run, outside: Outside) -> Budget | None:
    """The newest budget, if `make run` launched the run."""
    if not any(each.uri.startswith(f"{run.folder.budget}/") for each in run.objects):
        return None
    try:
        return budget.newest(run.folder)
    except DataError as error:
        outside.notes.append(f"the budget of the run is not known: {error}")
        return None


def _refuse(reason: str) -> list[MachineRecord]:
    raise Unavailable(reason)


def _missing(outside: Outside, figure: str, reason: object) -> None:
    """Note that a source applies to the run but has not answered. Each source is noted once."""
    if f"{figure}: {reason}" in outside.missing:
        return
    outside.origins.append(Origin(figure, f"? ({reason})"))
    outside.missing.append(f"{figure}: {reason}")


def _machines(
    run: Run,
    outside: Outside,
    environment: Mapping[str, str],
    now: float,
    attempts: list[Paid],
    clouds: Mapping[str, Cloud],
    records: Callable[[Sequence[str]], list[MachineRecord]],
) -> None:
    """Add to `outside` the time of the run's machines in which no segment ran."""
    found: list[MachineRecord] = []
    if any(segment.launcher for segment in run.segments):
        names = sorted({name for segment in run.segments if (name := segment.launcher.get("cluster"))})
        if any(segment.launcher.get("managed_job_id") for segment in run.segments):
            names.append(skypilot.controller_name(environment))
        try:
            found = records(names)
            outside.origins.append(Origin(LAUNCH, sky_records.ORIGIN))
        except Unavailable as error:
            _missing(outside, LAUNCH, error)
        try:
            found = _with_cloud_times(found, now, clouds)
        except Unavailable as error:
            _missing(outside, "start and end of the instances", error)
    else:
        outside.origins.append(Origin(LAUNCH, "? (the run was not started by SkyPilot)"))
    controllers = [record for record in found if is_controller(record.cluster)]
    machines = [record for record in found if not is_controller(record.cluster)]
    known = outside_times(run, machines, now, outside.neighbours, attempts)
    outside.times, outside.more_seconds = known.times, known.more_seconds
    outside.notes += known.notes
    add_charges(run, outside, known.records, controllers, clouds, now, _missing)
    sources = sorted({time.record.origin for time in outside.times})
    if sources and outside.origins[-1] == Origin(LAUNCH, sky_records.ORIGIN):
        outside.origins[-1] = Origin(LAUNCH, ", ".join(sources))
    outside.origins += origins(outside.charges)


def _managed_jobs(run: Run, jobs: Callable[[], list[Mapping[str, Any]]]) -> list[Origin]:
    """SkyPilot's records of the managed jobs of this run: how each ended, and how often it recovered."""
    wanted = {segment.launcher.get("managed_job_id") for segment in run.segments} - {None}
    if not wanted:
        return []
    try:
        found = [job for job in jobs() if str(job.get("job_id")) in wanted]
    except Unavailable as error:
        return [Origin("managed job", f"? ({error})")]
    return [
        Origin(
            f"managed job {job['job_id']}",
            f"{job.get('status')}, {job.get('recovery_count', '?')} recoveries, "
            f"{figures.duration(job.get('job_duration'))} running, by SkyPilot's queue",
        )
        for job in found
    ]


def _with_cloud_times(records: list[MachineRecord], now: float, clouds: Mapping[str, Cloud]) -> list[MachineRecord]:
    """Replace SkyPilot's times by the cloud's times, which are exact to the second. Raises Unavailable."""
    clusters: dict[tuple[str, str], set[str]] = {}
    for record in records:
        if record.cloud in clouds and record.region:
            clusters.setdefault((record.cloud, record.region), set()).add(record.cluster)
    found = [
        instance
        for (cloud, region), names in clusters.items()
        for instance in clouds[cloud].instances(sorted(names), region)
    ]
    return with_instances(records, found, now)


def _paid_spot_prices(run: Run, outside: Outside, clouds: Mapping[str, Cloud]) -> None:
    """Replace the expected price of spot machines by the price in the cloud's history.

    The cloud is asked once per zone and type. No more prices are asked for after the first refusal, because its reason
    applies to the other machines too.
    """
    groups: dict[tuple[str | None, ...], list[Segment]] = {}
    surprises: dict[tuple[str, str, str], list[str]] = {}
    for segment in run.segments:
        machine = segment.machine
        if _has_spot_history(segment, clouds):
            place = (machine.cloud, machine.region, machine.zone, machine.instance_type)
            groups.setdefault(place, []).append(segment)
    for segments in groups.values():
        machine = segments[0].machine
        first, last = min(s.started_at for s in segments), max(s.ended_at for s in segments)
        try:
            history = clouds[(machine.cloud or "").lower()].paid_spot(machine, first, last)
            for segment in segments if history else ():
                price = history.mean(segment.started_at, segment.ended_at) * segment.machine.nodes
                expected = segment.machine.usd_per_hour
                if expected is not None and not 0.5 < price / expected < 2:
                    surprise = (history.source, f"{price:g}", f"{expected:g}")
                    surprises.setdefault(surprise, []).append(str(segment.number))
                segment.machine = dataclasses.replace(
                    segment.machine, usd_per_hour=price, price_source=f"{history.source}, {machine.zone}"
                )
        except Unavailable as error:
            _missing(outside, "paid spot prices", error)
            break
    outside.notes += [
        f"segment {some(numbers)}: {source} has ${price} an hour, the ledger expected ${expected}; the history is used"
        for (source, price, expected), numbers in surprises.items()
    ]


def _has_spot_history(segment: Segment, clouds: Mapping[str, Cloud]) -> bool:
    cloud = clouds.get((segment.machine.cloud or "").lower())
    return bool(segment.machine.spot and segment.spans and cloud)


def _bills(run: Run, outside: Outside, environment: Mapping[str, str], now: float, clouds: Mapping[str, Cloud]) -> None:
    """Add the bills of machines with the cost allocation tag of this run. COST_TAG names this tag, as key=value."""
    key, separator, value = environment.get("COST_TAG", "").partition("=")
    starts = [segment.started_at for segment in run.segments if segment.started_at is not None]
    if not separator or not starts:
        return
    last = max((segment.ended_at for segment in run.segments if segment.ended_at is not None), default=now)
    for cloud in clouds.values():
        try:
            bill = cloud.bill(key, value, min(starts), last)
        except Unavailable as error:
            outside.origins.append(Origin("bill", f"? ({error})"))
            continue
        if bill is not None:
            by_usd = sorted(bill.by_service.items(), key=lambda item: -item[1])
            services = ", ".join(f"{name} {usd:,.2f}" for name, usd in by_usd)
            total = sum(bill.by_service.values())
            outside.origins.append(
                Origin("bill", f"{bill.source}, {key}={value}, whole days: ${total:,.2f} ({services})")
            )
