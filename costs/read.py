"""Read a run from storage: RUN_URL/run.json, RUN_URL/ledger, RUN_URL/metrics → costs.model.Run.

    run = read_run("s3://bucket/run")

Two listings find every object; objects are fetched in parallel. What cannot be read is named, not fatal.
"""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from core import journal, ledger, storage
from core.errors import LauncherError, ObjectNotFound, RunError
from costs import timeline
from costs.model import Run, Segment

METRICS = "metrics"
PARALLEL_FETCHES = 16
_SEGMENT = re.compile(r"^segment-(\d{6,})$")


def read_run(run_url: str) -> Run:
    """The run at `run_url`. Raises RunError if there is none, StorageError if the store refuses."""
    run = Run(run_url)
    _read_description(run)
    ledgers = _by_segment(run_url, ledger.FOLDER)
    metrics = _by_segment(run_url, METRICS)
    if not ledgers:
        found = "a run.json but no ledger: no segment has started" if run.config else "neither run.json nor ledger"
        raise RunError(f"{run_url}: holds no run to report on ({found}); give the run.url of a training run")
    with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
        run.segments = list(
            pool.map(lambda n: _read_segment(run_url, n, ledgers[n], metrics.get(n, [])), sorted(ledgers))
        )
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


def _by_segment(run_url: str, folder: str) -> dict[int, list[str]]:
    """URIs of the objects of each segment."""
    root = storage.join(run_url, folder)
    found: dict[int, list[str]] = {}
    for info in storage.list_objects(root):
        match = _SEGMENT.match(info.uri[len(root) :].lstrip("/").split("/", 1)[0])
        if match:
            found.setdefault(int(match.group(1)), []).append(info.uri)
    return found


def _read_segment(run_url: str, number: int, ledger_uris: Iterable[str], metrics_uris: Iterable[str]) -> Segment:
    segment = Segment(number)
    folder = storage.join(run_url, ledger.FOLDER, ledger.segment_name(number))
    start_uri = storage.join(folder, "start.jsonl")
    try:
        event = json.loads(storage.read_bytes(start_uri))
        timeline.start(segment, event if isinstance(event, Mapping) else {})
    except timeline.NewerFormat as error:
        segment.problems.append(f"segment {number}: left out, {error} ({start_uri})")
        return segment
    except (LauncherError, ValueError) as error:
        segment.problems.append(f"segment {number}: {start_uri} cannot be used: {error}")
    events, problems = journal.read_objects(ledger_uris)
    timeline.absorb(segment, events)
    samples, metric_problems = journal.read_objects(metrics_uris)
    timeline.absorb_metrics(segment, samples)
    segment.problems += [*problems, *metric_problems]
    return segment


def _stage(run: Run) -> str | None:
    """prep, pretrain, finetune, evaluate: as the run says, else by which settings it has."""
    said: Any = run.stage or next((s.program["stage"] for s in run.segments if s.program.get("stage")), None)
    if said:
        return str(said)
    if "train" in run.config:
        return "pretrain"
    return "prep" if "source" in run.config else None
