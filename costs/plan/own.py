"""Reads the user's own runs, whose speeds and overheads a plan prefers to published ones."""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from core.errors import LauncherError
from core.run import cache
from core.run.reader import read_run
from costs import discover, throughput
from costs.throughput import Measured

log = logging.getLogger(__name__)
MOST_RUNS = 20
PATIENCE_SECONDS = 10.0


def named(urls: Iterable[str]) -> dict[str, list[Measured]]:
    """What the runs at these URLs measured, by instance type. Raises LauncherError if one cannot be read."""
    found: dict[str, list[Measured]] = {}
    for url in urls:
        measured = throughput.measure(read_run(url, cache_file=cache.path_for(url)))
        if measured is not None and measured.instance_type:
            found.setdefault(measured.instance_type, []).append(measured)
    return found


def in_bucket(environment: Mapping[str, str]) -> tuple[dict[str, list[Measured]], str]:
    """What the runs in BUCKET measured, and a note about them. A store that does not answer only leaves them out."""
    if not environment.get("BUCKET"):
        return {}, "own runs: none were read, BUCKET is not set; speeds and overheads are published or assumed ones"
    answers: list[tuple[dict[str, list[Measured]], str]] = []
    reader = threading.Thread(target=lambda: answers.append(_read(environment)), daemon=True)
    reader.start()
    reader.join(PATIENCE_SECONDS)
    return answers[0] if answers else ({}, f"own runs: BUCKET did not answer in {PATIENCE_SECONDS:.0f} s")


def _read(environment: Mapping[str, str]) -> tuple[dict[str, list[Measured]], str]:
    try:
        found = named(islice(discover.find_runs(discover.runs_url(environment)), MOST_RUNS))
    except LauncherError as error:
        return {}, f"own runs: BUCKET cannot be read ({error})"
    return found, note(found)


def note(found: Mapping[str, Sequence[Measured]]) -> str:
    count = sum(len(each) for each in found.values())
    if not count:
        return "own runs: none in BUCKET has trained; speeds and overheads are published or assumed ones"
    return f"own runs: speed and overhead of {count} on {', '.join(sorted(found))}"
