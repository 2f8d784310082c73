"""Reads run.json, ledger and metrics below RUN_URL into core.run.model.Run. No other module reads them.

    read_run("s3://bucket/run")                    ledger, and the metrics that a report shows
    read_run("s3://bucket/run", Detail.ALL)        ledger and all metrics, for plots
    read_run("s3://bucket/run", Detail.MONEY)      times and price of each segment, for the run's dollars; usually
                                                   fetches only two objects per segment

One listing finds all objects, which are fetched in parallel. `Run.problems` names each object that cannot be read.
"""

import enum
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import storage, untrusted
from core.errors import LauncherError, ObjectDamaged, ObjectNotFound, RunError
from core.run import cache, journal, paid, timeline
from core.run.cache import Seen
from core.run.folder import RunFolder, segment_number
from core.run.model import Run, Segment
from core.storage import ObjectInfo

PARALLEL_FETCHES = 16
Objects = Mapping[int, list[ObjectInfo]]


class Detail(enum.Enum):
    """The parts of a run to read."""

    MONEY = "money"  # start, last heartbeat, end and price of each segment
    REPORT = "report"  # the whole ledger, and a thinned part of the metrics that a report shows
    ALL = "all"  # the whole ledger and all metrics


def read_run(run_url: str, detail: Detail = Detail.REPORT, cache_file: Path | None = None) -> Run:
    """The run at `run_url`.

    If `cache_file` is given (for Detail.REPORT), objects that the last call read are not fetched again. Raises RunError
    if the URL holds no run, StorageError if the store fails.
    """
    run = Run(RunFolder(run_url))
    if detail is Detail.MONEY:
        ledgers = _segments_of_ledger(run.folder)
    else:
        run.objects = storage.list_objects(run.url)
        ledgers = _by_segment(run.objects, run.folder.ledger)
    if detail is not Detail.MONEY or not ledgers:
        _read_description(run)
    if not ledgers:
        found = "a run.json but no ledger: no segment has started" if run.config else "neither run.json nor ledger"
        raise RunError(f"{run_url}: holds no run to report on ({found}); give the run.url of a training run")
    if detail is Detail.MONEY:
        run.segments = _read_prices(run.folder, ledgers)
    else:
        _read_segments(run, ledgers, detail, cache_file)
    run.problems += [problem for segment in run.segments for problem in segment.problems]
    run.stage = _stage(run)
    return run


@dataclass(frozen=True)
class Spent:
    """Upper bounds: dollars (None if a price or a time is unknown), and paid seconds of machines."""

    usd: float | None
    seconds: float


def spent_at_most(
    run_url: str,
    without: int | None = None,
    here: tuple[str | None, float] | None = None,
    after: int = 0,
) -> Spent:
    """Upper bounds of the cost of a run so far. Raises StorageError.

    Counts the segments, the machines without a segment, and the preparation, evaluations, servers and exports of the
    run. Leaves out the segment `without`, and the machine whose host and start are `here`. If `after` is given, only
    the run's segments above that number count, and only the machines that started after that segment.
    """
    folder = RunFolder(run_url)
    run = Run(folder)
    # Segments are found by their objects, because a segment that another node just starts may have none yet.
    run.segments = _read_prices(folder, _segments_of_ledger(folder))
    others = {url: Run(RunFolder(url)) for url in folder.beside}
    for other in others.values():
        other.segments = _read_prices(other.folder, _segments_of_ledger(other.folder))
    preparation = others.pop(folder.preparation)
    # Machines that evaluate, serve or export are recorded in the folder of the run.
    beside = [segment for other in others.values() for segment in other.segments]
    records = paid.read_all(folder)
    machines = paid.unrecorded(records, [*run.segments, *beside], here)
    counted = [segment for segment in run.segments if segment.number != without and segment.number > after]
    if after:
        begun = max((each.started_at or 0.0 for each in run.segments if each.number <= after), default=0.0)
        machines = [each for each in machines if each.started_at > begun]
    else:
        counted += [*beside, *preparation.segments]
        machines += paid.unrecorded(paid.read_all(preparation.folder), preparation.segments)
    now = time.time()
    amounts = [*(each.usd_at_most for each in counted), *(each.usd_at_most(now) for each in machines)]
    if not after:
        amounts += paid.beside_usd(records, [*run.segments, *beside], now)
    seconds = [*(each.seconds_at_most for each in counted), *(each.seconds_at_most(now) for each in machines)]
    return Spent(None if None in amounts else math.fsum(amounts), math.fsum(seconds))


def spent_usd_at_most(
    run_url: str, without: int | None = None, here: tuple[str | None, float] | None = None
) -> float | None:
    """The dollars of `spent_at_most`."""
    return spent_at_most(run_url, without, here).usd


def ledger_listing(run_url: str) -> Objects:
    """The objects of a run's ledger by segment number. Raises StorageError."""
    return _segments_of_ledger(RunFolder(run_url))


def read_money(run_url: str, ledgers: Objects) -> list[Segment]:
    """The segments in a listing of their ledgers, with machine, start and newest span. Raises StorageError."""
    return _read_prices(RunFolder(run_url), ledgers)


def _each(folder: RunFolder, numbers: Iterable[int], read: Callable[[int], Any]) -> list[Any]:
    if storage.is_local(folder.url):  # threads hide the latency of requests, which a local disk does not have
        return [read(number) for number in numbers]
    with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
        return list(pool.map(read, numbers))


def _read_description(run: Run) -> None:
    uri = run.folder.description
    try:
        document = untrusted.read_json(uri)
        if not isinstance(document["config"], dict):
            raise ValueError("its config is not a JSON object")
        run.config = document["config"]
        run.stage = timeline.text(document.get("stage"))
    except ObjectNotFound:
        run.problems.append(f"{uri}: not found, so the settings of this run are not known")
    except (ObjectDamaged, ValueError, KeyError, TypeError) as error:
        run.problems.append(f"{uri}: cannot be understood ({error}), so the settings of this run are not known")


def _segments_of_ledger(folder: RunFolder) -> Objects:
    return _by_segment(storage.list_objects(folder.ledger), folder.ledger)


def _by_segment(objects: Iterable[ObjectInfo], root: str) -> dict[int, list[ObjectInfo]]:
    """The objects below `root`, grouped by segment number."""
    found: dict[int, list[ObjectInfo]] = {}
    inside, cut = f"{root}/", len(root) + 1
    for info in objects:
        if not info.uri.startswith(inside):
            continue
        number = segment_number(info.uri[cut:].split("/", 1)[0])
        if number:
            found.setdefault(number, []).append(info)
    return found


def _read_prices(folder: RunFolder, ledgers: Objects) -> list[Segment]:
    return _each(folder, sorted(ledgers), lambda number: _read_money(folder, number, ledgers[number]))


def _read_money(folder: RunFolder, number: int, objects: list[ObjectInfo]) -> Segment:
    """A segment with its start and its newest span, from the newest readable object that has spans."""
    segment = _started(folder, number)
    by_age = sorted((info for info in objects if journal.sequence_numbers(info.uri)), key=_last_number, reverse=True)
    for info in by_age:
        events, _, problems = _read_journal(folder.segment(number).events, [info], -1)
        timeline.absorb(segment, events)
        segment.problems += problems
        if segment.spans:
            break
    return segment


def _read_segments(run: Run, ledgers: Objects, detail: Detail, cache_file: Path | None) -> None:
    metrics = _by_segment(run.objects, run.folder.metrics)
    known = cache.load(cache_file) if cache_file else {}
    targets = {number: _seen(run.folder, number, ledgers, metrics) for number in ledgers}
    unchanged = {number: known[number] for number in ledgers if number in known and targets[number] == known[number][1]}
    rest = sorted(set(ledgers) - set(unchanged))
    read_one = functools.partial(_read_segment, run.folder, ledgers, metrics, detail, targets, known)
    read = unchanged | dict(zip(rest, _each(run.folder, rest, read_one), strict=True))
    run.segments = [read[number][0] for number in sorted(read)]
    if cache_file:
        # Segments that were read with an error are not cached.
        whole = {number: (segment, seen) for number, (segment, seen) in read.items() if seen}
        if rest or whole.keys() != known.keys():
            cache.save(cache_file, whole)


def _seen(folder: RunFolder, number: int, ledgers: Objects, metrics: Objects) -> Seen:
    """What has been read of a segment, as a `Seen`, after all objects in these listings were read."""
    start_uri = folder.segment(number).start
    stamp = next((f"{info.size} {info.modified}" for info in ledgers[number] if info.uri == start_uri), "")
    return Seen(stamp, _newest(ledgers[number]), _newest(metrics.get(number, [])))


def _read_segment(
    folder: RunFolder,
    ledgers: Objects,
    metrics: Objects,
    detail: Detail,
    targets: Mapping[int, Seen],
    known: Mapping[int, tuple[Segment, Seen]],
    number: int,
) -> tuple[Segment, Seen | None]:
    """The segment, and the sequence numbers up to which it was read (None if something could not be read)."""
    target = targets[number]
    segment, seen = known.get(number, (None, None))
    # A ledger that is shorter than the cached one has been replaced, so the cached one is discarded.
    is_longer = seen and seen.start == target.start and seen.ledger <= target.ledger and seen.metrics <= target.metrics
    if not is_longer:
        segment, seen = _started(folder, number), Seen(target.start)
        if segment.problems and segment.started_at is None:
            seen = Seen("")
        if segment.is_newer_format:
            return segment, None
    events, newest, problems = _read_journal(folder.segment(number).events, ledgers[number], seen.ledger)
    timeline.absorb(segment, events)
    records, newest_record, more_problems = _read_journal(
        folder.segment(number).metrics, metrics.get(number, []), seen.metrics
    )
    absorb = timeline.absorb_all_metrics if detail is Detail.ALL else timeline.absorb_metrics
    absorb(segment, records)
    problems += more_problems
    segment.problems += problems
    whole = seen.start and not problems
    return segment, Seen(target.start, newest, newest_record) if whole else None


def _started(folder: RunFolder, number: int) -> Segment:
    """A segment with the facts of its start object. If that object cannot be used, `problems` says why."""
    segment, uri = Segment(number), folder.segment(number).start
    try:
        event = untrusted.read_json(uri)
        timeline.start(segment, event if isinstance(event, Mapping) else {})
    except timeline.NewerFormat as error:
        segment.is_newer_format = True
        segment.problems.append(f"segment {number}: left out, {error} ({uri})")
    except (LauncherError, ValueError) as error:
        segment.problems.append(f"segment {number}: {uri} cannot be used: {error}")
    return segment


def _read_journal(folder: str, objects: list[ObjectInfo], after: int) -> tuple[list[dict[str, Any]], int, list[str]]:
    """The events of a journal after number `after`, the highest number, and a sentence for each unreadable object."""
    if _newest(objects) <= after:
        return [], after, []
    for _ in range(journal.READ_ATTEMPTS):
        try:
            events, problems = journal.read_objects([info.uri for info in objects], after)
            return events, _newest(objects), problems
        except ObjectNotFound:  # the journal's writer has replaced objects since the listing
            objects = storage.list_objects(folder)
    return [], after, [f"{folder}: its objects change faster than they can be read"]


def _newest(objects: Iterable[ObjectInfo]) -> int:
    """The highest sequence number in a journal's listing."""
    return max((_last_number(info) for info in objects), default=-1)


def _last_number(info: ObjectInfo) -> int:
    numbers = journal.sequence_numbers(info.uri)
    return numbers[1] if numbers else -1


def _stage(run: Run) -> str | None:
    """The run's stage. If it is not recorded, it is inferred from the run's settings."""
    named: Any = run.stage or next((s.program["stage"] for s in run.segments if s.program.get("stage")), None)
    if named:
        return str(named)
    if "train" in run.config:
        return "pretrain"
    return "prep" if "source" in run.config else None
