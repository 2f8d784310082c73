"""Reads the user's own runs. A plan prefers their speeds, overheads and losses to published ones."""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from core.errors import LauncherError
from core.run import cache
from core.run.model import Run
from core.run.reader import read_run
from costs import discover, throughput
from costs.plan.refit import OwnRun, own_run
from costs.throughput import Measured

log = logging.getLogger(__name__)
MOST_RUNS = 20
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Own:
    """Results of the user's runs: speeds and overheads by instance type, losses, and a note on the speeds."""

    speeds: Mapping[str, list[Measured]] = field(default_factory=dict)
    losses: Sequence[OwnRun] = ()
    said: str = ""


def named(urls: Iterable[str]) -> Own:
    """The results of the runs at these URLs. Raises LauncherError if a run cannot be read."""
    speeds: dict[str, list[Measured]] = {}
    losses = []
    for url in urls:
        run = read_run(url, cache_file=cache.path_for(url))
        measured, loss = throughput.measure(run), own_run(run)
        if measured is not None and measured.instance_type and not _is_rehearsal(run):
            speeds.setdefault(measured.instance_type, []).append(measured)
        losses += [loss] if loss is not None else []
    return Own(speeds, losses, note(speeds))


def _is_rehearsal(run: Run) -> bool:
    """Whether a run trained on the CPU (DEVICE=cpu) of a machine, so that it tells nothing about the machine's GPUs."""
    train = run.config.get("train")
    return isinstance(train, Mapping) and train.get("device") == "cpu"


def in_bucket(environment: Mapping[str, str]) -> Own:
    """The results of the runs in BUCKET. If the store does not answer in time, there are no results."""
    if not environment.get("BUCKET"):
        said = "own runs: none were read, BUCKET is not set; speeds and overheads are published or assumed values"
        return Own(said=said)
    answers: list[Own] = []
    reader = threading.Thread(target=lambda: answers.append(_read(environment)), daemon=True)
    reader.start()
    reader.join(PATIENCE_SECONDS)
    return answers[0] if answers else Own(said=f"own runs: BUCKET did not answer in {PATIENCE_SECONDS:.0f} s")


def _read(environment: Mapping[str, str]) -> Own:
    try:
        return named(islice(discover.find_runs(discover.runs_url(environment)), MOST_RUNS))
    except LauncherError as error:
        return Own(said=f"own runs: BUCKET cannot be read ({error})")


def note(speeds: Mapping[str, Sequence[Measured]]) -> str:
    count = sum(len(each) for each in speeds.values())
    if not count:
        return "own runs: none in BUCKET has trained; speeds and overheads are published or assumed values"
    return f"own runs: speed and overhead of {count} on {', '.join(sorted(speeds))}"
