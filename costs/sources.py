"""Ask everybody else: SkyPilot when machines were up, AWS what they cost, the store what the run takes.

Each answer, and each answer that could not be had, becomes an origin in the report. None of them is needed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from clouds import aws, skypilot
from clouds.base import Instance, MachineRecord, Unavailable
from core import figures
from core.errors import StorageError
from core.run.model import Run, Segment
from costs.discover import storage_use
from costs.model import Origin, Outside
from costs.report import some
from costs.uptime import is_of, surroundings, with_cloud_times

Jobs = Callable[[], list[Mapping[str, Any]]]
Instances = Callable[[list[str], str], list[Instance]]
SpotHistory = Callable[[str, str, str | None, float, float], list[tuple[float, float]]]


def ask_others(
    run: Run,
    environment: Mapping[str, str],
    now: float,
    offline: bool = False,
    uptimes: Callable[[], list[MachineRecord]] = skypilot.uptimes,
    instances: Instances = aws.instances,
    jobs: Jobs = skypilot.jobs,
    spot_history: SpotHistory = aws.spot_history,
    bill: Callable[..., dict[str, float]] = aws.billed_usd,
) -> Outside:
    """What other sources know of `run`. `offline` asks the store alone.

    The prices of `run` become what was paid, where AWS's history of spot prices has it.
    """
    outside = Outside()
    try:
        outside.storage = storage_use(run.folder)
        rates = outside.storage.rates
        outside.origins.append(Origin("storage", f"listing of the run; rates: {rates.source if rates else '?'}"))
    except StorageError as error:
        outside.origins.append(Origin("storage", f"? ({error})"))
    if offline:
        outside.origins.append(Origin("launch, idle until down", "? (not asked: --offline)"))
        return outside
    if outside.storage and (unfinished := aws.unfinished_uploads(run.url)):
        outside.storage = dataclasses.replace(outside.storage, unfinished_uploads=unfinished)
    _launcher(run, outside, now, uptimes, instances, jobs)
    _paid_spot_prices(run, outside, spot_history)
    _bill(run, outside, environment, now, bill)
    return outside


def _launcher(
    run: Run,
    outside: Outside,
    now: float,
    uptimes: Callable[[], list[MachineRecord]],
    instances: Instances,
    jobs: Jobs,
) -> None:
    if not any(segment.launcher for segment in run.segments):
        outside.origins.append(Origin("launch, idle until down", "? (the run was not started by SkyPilot)"))
        return
    try:
        records = [record for record in uptimes() if is_of(run.segments, record)]
    except Unavailable as error:
        outside.origins.append(Origin("launch, idle until down", f"? ({error})"))
        return
    source = skypilot.ORIGIN
    try:
        records = _with_instances(records, now, instances)
        source = ", ".join(sorted({record.origin for record in records})) or source
    except Unavailable as error:
        outside.origins.append(Origin("times of the instances themselves", f"? ({error})"))
    around = surroundings(run.segments, records, now)
    outside.times = around.stretches
    outside.notes += around.notes
    outside.origins.append(Origin("launch, idle until down", source))
    outside.origins += _managed_jobs(run, jobs)


def _managed_jobs(run: Run, jobs: Jobs) -> list[Origin]:
    """What SkyPilot says of the managed jobs that ran this: how it ended, and how often it had to start anew."""
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
            f"{getattr(job.get('status'), 'value', job.get('status'))}, {job.get('recovery_count', '?')} recoveries, "
            f"{figures.duration(job.get('job_duration'))} running, by SkyPilot's queue",
        )
        for job in found
    ]


def _with_instances(records: list[MachineRecord], now: float, instances: Instances) -> list[MachineRecord]:
    """SkyPilot's intervals begin before the machine and end when it noticed; EC2 knows both to the second."""
    regions: dict[str, set[str]] = {}
    for record in records:
        if record.cloud == "aws" and record.region:
            regions.setdefault(record.region, set()).add(record.cluster)
    found = [each for region, clusters in regions.items() for each in instances(sorted(clusters), region)]
    return with_cloud_times(records, found, now)


def _paid_spot_prices(run: Run, outside: Outside, spot_history: SpotHistory) -> None:
    """What was paid for a spot machine is what AWS's history says, not what somebody expected at the launch.

    One question per zone and type. The first refusal ends the asking: what stops one stops all.
    """
    groups: dict[tuple[str, str, str | None], list[Segment]] = {}
    surprises: dict[tuple[str, str], list[str]] = {}
    for segment in run.segments:
        machine = segment.machine
        if machine.spot and (machine.cloud or "").lower() == "aws" and machine.zone and machine.instance_type:
            groups.setdefault((machine.zone, machine.instance_type, machine.region), []).append(segment)
    for (zone, instance_type, region), segments in groups.items():
        used = [segment for segment in segments if segment.spans]
        try:
            history = used and spot_history(
                zone, instance_type, region, min(s.started_at for s in used), max(s.ended_at for s in used)
            )
            for segment in used:
                price = aws.weighted(history, segment.started_at, segment.ended_at) * segment.machine.nodes
                expected = segment.machine.usd_per_hour
                if expected is not None and not 0.5 < price / expected < 2:
                    surprises.setdefault((f"{price:g}", f"{expected:g}"), []).append(str(segment.number))
                segment.machine = dataclasses.replace(
                    segment.machine, usd_per_hour=price, price_source=f"{aws.PRICE_SOURCE}, {zone}"
                )
        except Unavailable as error:
            outside.origins.append(Origin("paid spot prices", f"? ({error})"))
            break
    outside.notes += [
        f"segment {some(numbers)}: AWS's price history has ${price} an hour, the ledger expected ${expected}; "
        "the history is used"
        for (price, expected), numbers in surprises.items()
    ]


def _bill(
    run: Run, outside: Outside, environment: Mapping[str, str], now: float, bill: Callable[..., dict[str, float]]
) -> None:
    """COST_TAG=key=value names the cost allocation tag under which AWS bills this run."""
    key, separator, value = environment.get("COST_TAG", "").partition("=")
    starts = [segment.started_at for segment in run.segments if segment.started_at is not None]
    if not separator or not starts:
        return
    try:
        by_service = bill(key, value, min(starts), _last(run.segments, now))
    except Unavailable as error:
        outside.origins.append(Origin("AWS bill", f"? ({error})"))
        return
    services = ", ".join(f"{name} {usd:,.2f}" for name, usd in sorted(by_service.items(), key=lambda item: -item[1]))
    outside.origins.append(
        Origin("AWS bill", f"Cost Explorer, {key}={value}, whole days: ${sum(by_service.values()):,.2f} ({services})")
    )


def _last(segments: list[Segment], now: float) -> float:
    return max((segment.ended_at for segment in segments if segment.ended_at is not None), default=now)
