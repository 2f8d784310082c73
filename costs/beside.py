"""Computes charges other than machine hours: disks, addresses, traffic, requests, storage, and the controller of jobs.

Each charge names its source. An amount that a source does not give is named as missing and never counted as zero.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from clouds import catalog
from clouds.base import Cloud, MachineRecord, Unavailable
from core.run.model import Run, Segment
from costs.discover import rates_for
from costs.model import Charge, Origin, Outside, StorageRates
from costs.sharing import shares_of

HOURS_PER_MONTH = 730.0
Missing = Callable[[Outside, str, object], None]


def add_charges(
    run: Run,
    outside: Outside,
    records: Mapping[int, MachineRecord],
    controllers: Iterable[MachineRecord],
    clouds: Mapping[str, Cloud],
    now: float,
    missing: Missing,
) -> None:
    """Add the charges of a run until `now` to `outside`. `records` holds, by segment number, the machine's record."""
    shares = shares_of(run, outside.neighbours)
    for segment in run.segments:
        if not segment.spans:
            continue
        share = shares[segment.number].of(segment.spans[0].start, segment.ended_at) if segment.number in shares else 1.0
        record = records.get(segment.number)
        if record is not None:
            nodes = segment.machine.nodes
            times = (segment.spans[0].start, segment.ended_at)
            _machine(outside, segment.machine.cloud, record, segment, times, share * nodes, missing)
    for time in outside.times:
        if time.record.cloud and not time.free:
            _machine(outside, time.record.cloud, time.record, time.segment, (time.start, time.end), 1.0, missing)
    rates = rates_for(run.url)
    if rates is not None:
        _moved(run, outside, rates, clouds, missing)
        _stored(run, outside, rates, now)
    _controller(run, outside, controllers)


def _machine(
    outside: Outside,
    cloud: str | None,
    record: MachineRecord,
    segment: Segment | None,
    times: tuple[float, float],
    machines: float,
    missing: Missing,
) -> None:
    """The charges for the disk and the address of a machine over some time.

    `machines` is the number of nodes, or a share of one node.
    """
    prices = catalog.extras((cloud or "").lower())
    start, end = times
    hours = (end - start) / 3600 * machines
    if not prices or hours <= 0:
        return
    if (disk := prices["disk"]).usd:
        if record.disk_gb is None:
            missing(outside, "disks", f"{record.origin} does not say how large the disk of {record.cluster} is")
        else:
            usd = hours / HOURS_PER_MONTH * record.disk_gb * disk.usd
            source = f"{record.disk_gb:g} GB by SkyPilot's record, at ${disk.usd:g} a GB and month: {disk.source}"
            outside.charges.append(Charge("disks", start, end, usd, source, segment))
    if (address := prices["address"]).usd:
        source = f"${address.usd:g} an hour: {address.source}"
        outside.charges.append(Charge("addresses", start, end, hours * address.usd, source, segment))


def _moved(run: Run, outside: Outside, rates: StorageRates, clouds: Mapping[str, Cloud], missing: Missing) -> None:
    """The charges for the traffic and the requests of the segments, by the counts in their ledgers."""
    silent, prices = [], {}
    for segment in run.segments:
        if not segment.spans:
            continue
        machine = segment.machine
        place = ((machine.cloud or "").lower() or None, machine.region)
        try:
            if place not in prices:
                prices[place] = _traffic_prices(run.url, place, rates, clouds)
        except Unavailable as error:
            missing(outside, "traffic", error)
            return
        reading, writing = prices[place]
        if not segment.moved:
            silent.append(str(segment.number))
            continue
        read, written, reads, writes = (count * machine.nodes for count in segment.moved)
        # The ledger counts the traffic of the first rank of each node. Other ranks upload parts of a checkpoint too,
        # and the mark of a checkpoint holds the bytes of all ranks.
        written = max(written, _checkpoint_bytes(segment))
        times = (segment.spans[0].start, segment.ended_at)
        usd = (read * reading + written * writing) / 1e9
        source = (
            f"bytes in the ledger, at ${reading:g} per GB read and ${writing:g} per GB written, "
            f"{rates.name}: {rates.source}"
        )
        outside.charges.append(Charge("traffic", *times, usd, source, segment))
        usd = reads / 1e6 * rates.usd_per_million_reads + writes / 1e6 * rates.usd_per_million_writes
        source = f"requests of the first rank of each node, in the ledger; {rates.name}: {rates.source}"
        outside.charges.append(Charge("requests", *times, usd, source, segment))
    if silent:
        some = ", ".join(silent[:8])
        missing(outside, "traffic, requests", f"the ledger of segment {some} holds no counts ({len(silent)} segments)")


def _traffic_prices(
    url: str, place: tuple[str | None, str | None], rates: StorageRates, clouds: Mapping[str, Cloud]
) -> tuple[float, float]:
    """Dollars per GB that a machine reads from the store and writes to it. Raises Unavailable."""
    if not clouds:
        raise Unavailable("the region of the bucket was not asked for: --offline")
    for cloud in clouds.values():
        if (found := cloud.traffic_usd_per_gb(url, *place)) is not None:
            reading, writing = found
            break
    else:
        reading, writing = rates.usd_per_gb_egress, 0.0
        if place[0] is not None and place[0] not in rates.name.lower():
            leaving = catalog.extras(place[0]).get("leaving")
            writing = leaving.usd if leaving else 0.0
    return reading, writing


def _checkpoint_bytes(segment: Segment) -> int:
    sizes = [mark.get("bytes") for mark in segment.marks if mark["name"] == "checkpoint"]
    return sum(size for size in sizes if type(size) is int and size > 0)


def _stored(run: Run, outside: Outside, rates: StorageRates, now: float) -> None:
    """The charge for storage until now, for the objects that still exist."""
    known = [each for each in run.objects if each.modified is not None and each.modified <= now]
    months = sum(each.size * (now - each.modified) for each in known) / 3600 / HOURS_PER_MONTH
    if known:
        source = f"listing of the run: objects that are still there, until now; {rates.name}: {rates.source}"
        start = min(each.modified for each in known)
        outside.charges.append(Charge("storage", start, now, months / 1e9 * rates.usd_per_gb_month, source))


def _controller(run: Run, outside: Outside, controllers: Iterable[MachineRecord]) -> None:
    """The charge for the controller of managed jobs over the time of the run.

    Other jobs may have used the controller too.
    """
    times = [(s.started_at, s.ended_at) for s in run.segments if s.launcher.get("managed_job_id") and s.started_at]
    if not times:
        return
    first, last = min(start for start, _ in times), max(end for _, end in times)
    for record in controllers:
        start, end = max(first, record.start), last if record.end is None else min(last, record.end)
        if end > start and record.price:
            source = (
                f"{record.origin}: {record.cluster} for the time of the run, ${record.price.usd_per_hour:g} an hour"
            )
            outside.charges.append(Charge("controller", start, end, record.price.usd(end - start), source))


def origins(charges: Sequence[Charge]) -> list[Origin]:
    """The names of the sources of some charges, without duplicates."""
    return [Origin(phase, source) for phase, source in dict.fromkeys((each.phase, each.source) for each in charges)]
