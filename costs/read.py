"""Read a run from storage: RUN_URL/run.json, RUN_URL/ledger, RUN_URL/metrics → costs.model.Run.

    run = read_run("s3://bucket/run")

Two listings find every object; objects are fetched in parallel. What cannot be read is named, not fatal.
"""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from core import journal, ledger, storage
from core.errors import LauncherError, ObjectNotFound, RunError
from core.storage import ObjectInfo
from costs import cache, timeline
from costs.cache import Seen
from costs.model import Run, Segment

METRICS = "metrics"
PARALLEL_FETCHES = 16
_SEGMENT = re.compile(r"^segment-(\d{6,})$")


def read_run(run_url: str, cache_file: Path | None = None) -> Run:
    """The run at `run_url`; with `cache_file`, only what is new since the last call is fetched.

    Raises RunError if there is no run, StorageError if the store refuses.
    """
    run = Run(run_url)
    _read_description(run)
    ledgers = _by_segment(run_url, ledger.FOLDER)
    metrics = _by_segment(run_url, METRICS)
    if not ledgers:
        found = "a run.json but no ledger: no segment has started" if run.config else "neither run.json nor ledger"
        raise RunError(f"{run_url}: holds no run to report on ({found}); give the run.url of a training run")
    known = cache.load(cache_file) if cache_file else {}
    unchanged = {n: known[n] for n in ledgers if n in known and _seen(run_url, n, ledgers, metrics) == known[n][1]}
    rest = sorted(set(ledgers) - set(unchanged))
    with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
        fetched = pool.map(lambda n: _read_segment(run_url, n, ledgers, metrics, known.get(n)), rest)
        read = unchanged | dict(zip(rest, fetched, strict=True))
    run.segments = [read[number][0] for number in sorted(read)]
    if cache_file:
        # What was read with an error is read again the next time.
        whole = {number: (segment, seen) for number, (segment, seen) in read.items() if seen}
        if rest or whole.keys() != known.keys():
            cache.save(cache_file, whole)
    run.problems += [problem for segment in run.segments for problem in segment.problems]
    run.stage = _stage(run)
    return run


def _read_description(run: Run) -> None:
    uri = storage.join(run.url, "run.json")
    try:
        document = json.loads(storage.read_bytes(uri))
        run.config = document["config"]
        run.stage = document.get("stage")
    except ObjectNotFound:
        run.problems.append(f"{uri}: not there, so the settings of this run are not known")
    except (ValueError, KeyError, TypeError) as error:
        run.problems.append(f"{uri}: cannot be understood ({error}), so the settings of this run are not known")


def _by_segment(run_url: str, folder: str) -> dict[int, list[ObjectInfo]]:
    """The objects of each segment."""
    root = storage.join(run_url, folder)
    found: dict[int, list[ObjectInfo]] = {}
    for info in storage.list_objects(root):
        match = _SEGMENT.match(info.uri[len(root) :].lstrip("/").split("/", 1)[0])
        if match:
            found.setdefault(int(match.group(1)), []).append(info)
    return found


Objects = Mapping[int, list[ObjectInfo]]


def _seen(run_url: str, number: int, ledgers: Objects, metrics: Objects) -> Seen:
    """What a segment that has been read as far as these listings go is marked with."""
    start_uri = _start_uri(run_url, number)
    stamp = next((f"{info.size} {info.modified}" for info in ledgers[number] if info.uri == start_uri), "")
    return Seen(stamp, _newest(ledgers[number]), _newest(metrics.get(number, [])))


def _start_uri(run_url: str, number: int) -> str:
    return storage.join(run_url, ledger.FOLDER, ledger.segment_name(number), "start.jsonl")


def _read_segment(
    run_url: str, number: int, ledgers: Objects, metrics: Objects, known: tuple[Segment, Seen] | None
) -> tuple[Segment, Seen | None]:
    """The segment, and how far it has been read: None if something could not be."""
    name = ledger.segment_name(number)
    start_uri = _start_uri(run_url, number)
    target = _seen(run_url, number, ledgers, metrics)
    # A ledger that is shorter than what is known of it is another one: nothing of the old may stay.
    if (
        known
        and known[1].start == target.start
        and known[1].ledger <= target.ledger
        and known[1].metrics <= target.metrics
    ):
        segment, seen = known
    else:
        segment, seen = Segment(number), Seen(target.start)
        try:
            event = json.loads(storage.read_bytes(start_uri))
            timeline.start(segment, event if isinstance(event, Mapping) else {})
        except timeline.NewerFormat as error:
            segment.problems.append(f"segment {number}: left out, {error} ({start_uri})")
            return segment, None
        except (LauncherError, ValueError) as error:
            segment.problems.append(f"segment {number}: {start_uri} cannot be used: {error}")
            seen = Seen("")
    folder = storage.join(run_url, ledger.FOLDER, name, "events")
    events, newest, problems = _read_journal(folder, ledgers[number], seen.ledger)
    timeline.absorb(segment, events)
    folder = storage.join(run_url, METRICS, name)
    samples, newest_sample, more_problems = _read_journal(folder, metrics.get(number, []), seen.metrics)
    timeline.absorb_metrics(segment, samples)
    problems += more_problems
    segment.problems += problems
    whole = seen.start and not problems
    return segment, Seen(target.start, newest, newest_sample) if whole else None


def _read_journal(folder: str, objects: list[ObjectInfo], after: int) -> tuple[list[dict[str, Any]], int, list[str]]:
    """Events after number `after`, the number of the newest one, and what could not be read."""
    if _newest(objects) <= after:
        return [], after, []
    for _ in range(journal.READ_ATTEMPTS):
        try:
            events, problems = journal.read_objects([info.uri for info in objects], after)
            return events, _newest(objects), problems
        except ObjectNotFound:  # its writer put objects together since we listed them
            objects = storage.list_objects(folder)
    return [], after, [f"{folder}: its objects change faster than they can be read"]


def _newest(objects: Iterable[ObjectInfo]) -> int:
    """The highest sequence number in a journal's listing."""
    return max((numbers[1] for info in objects if (numbers := journal.sequence_numbers(info.uri))), default=-1)


def _stage(run: Run) -> str | None:
    """prep, pretrain, finetune, evaluate: as the run says, else by which settings it has."""
    said: Any = run.stage or next((s.program["stage"] for s in run.segments if s.program.get("stage")), None)
    if said:
        return str(said)
    if "train" in run.config:
        return "pretrain"
    return "prep" if "source" in run.config else None
