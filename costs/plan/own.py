"""Reads the user's own runs. A plan prefers their speeds, overheads and losses to published ones."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from core.errors import LauncherError
from core.run import cache
from core.run.model import Run
from core.run.reader import read_run
from costs import discover, throughput
from costs.model import OutsideTime
from costs.plan.refit import OwnRun, own_run
from costs.throughput import Measured

log = logging.getLogger(__name__)
MOST_RUNS = 20
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Own:
    """Results of the user's runs: speeds and overheads by instance type, losses, and a note on the speeds.

    `failed` means that BUCKET gave no answer.
    """

    speeds: Mapping[str, list[Measured]] = field(default_factory=dict)
    losses: Sequence[OwnRun] = ()
    said: str = ""
    failed: bool = False


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
    silent = Own(said=f"own runs: BUCKET did not answer in {PATIENCE_SECONDS:.0f} s", failed=True)
    return _in_time(lambda: _read(environment), silent)


def with_machine_times(measured: Measured, offline: bool = False) -> Measured:
    """Add to a measurement how long the run's machines took to boot, and to go after their programs.

    The run's folder, SkyPilot and the clouds are asked. If `offline` is true, only the folder is asked.
    """
    from costs.sources import ask_others  # imported here, because a plan does not ask these sources

    def asked() -> Measured:
        run = read_run(measured.run, cache_file=cache.path_for(measured.run))
        times = ask_others(run, os.environ, time.time(), offline).times
        return replace(
            measured,
            provision_seconds=_mean(each for each in times if each.phase == "provision" and each.segment),
            shutdown_seconds=_mean(each for each in times if each.phase == "idle_until_down"),
        )

    return _in_time(asked, measured)


def _mean(times: Iterable[OutsideTime]) -> float | None:
    """Mean seconds that are billed. An end that is not known is taken to be in the middle of its range."""
    known = [(0.0 if each.free else each.end - each.start) + each.more_seconds / 2 for each in times]
    return sum(known) / len(known) if known else None


def _in_time(ask: Callable[[], Any], otherwise: Any) -> Any:
    """The answer of `ask`. If it fails or takes longer than PATIENCE_SECONDS, the answer is `otherwise`."""
    answers: list[Any] = []

    def work() -> None:
        with contextlib.suppress(LauncherError):
            answers.append(ask())

    reader = threading.Thread(target=work, daemon=True)
    reader.start()
    reader.join(PATIENCE_SECONDS)
    return answers[0] if answers else otherwise


def _read(environment: Mapping[str, str]) -> Own:
    try:
        return named(islice(discover.find_runs(discover.runs_url(environment)), MOST_RUNS))
    except LauncherError as error:
        return Own(said=f"own runs: BUCKET cannot be read ({error})", failed=True)


def note(speeds: Mapping[str, Sequence[Measured]]) -> str:
    count = sum(len(each) for each in speeds.values())
    if not count:
        return "own runs: none in BUCKET has trained; speeds and overheads are published or assumed values"
    return f"own runs: speed and overhead of {count} on {', '.join(sorted(speeds))}"
