"""Records the budget of a run: the sum and the plan, each launch of a stage, and the outcome.

    RUN_URL/budget/000001/plan.json             the sum, the plan, the settings of all launches; written first
    RUN_URL/budget/000001/launch-000001.json    a launch: the stage, the time, and the stage's progress by then
    RUN_URL/budget/000001/outcome.json          loss and dollars, as expected and as measured; written at the end
    RUN_URL/budget/000002/plan.json             a later sum for the same run (ADD_USD)

`make run` writes these objects from the user's computer. If it is started again, it reads from them where it stopped.
Objects are created exclusively, so that two commands for the same run do not launch the run twice.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from core import storage, untrusted
from core.errors import DataError, ObjectExists, ObjectNotFound, RunError
from core.run.folder import RunFolder
from core.secrets import without_keys

FORMAT, VERSION = "run-budget", 1
_NUMBER = re.compile(r"\d{6}\Z")
_LAUNCH = re.compile(r"launch-(\d{6})\.json\Z")


@dataclass(frozen=True)
class Budget:
    """The budget of a run in dollars. `machines_usd` is the part for machines.

    The rest pays for storage, traffic and requests. `task` is the task file of the training, `options` choose its
    machines, and `settings` are the variables of all launches. `forecast` holds the expected values of the plan:
    `loss`, `loss_error`, `loss_scale`, `tokens`, `steps`, `hours`, and `parts` in dollars. `began_at` is unix time.
    """

    usd: float
    machines_usd: float
    task: str
    options: tuple[str, ...]
    settings: Mapping[str, str]
    train_tokens: int
    forecast: Mapping[str, Any]
    began_at: float
    number: int = 1


@dataclass(frozen=True)
class LaunchRecord:
    """A launch of a stage at `began_at` (unix time). `progress` is the stage's progress at that time."""

    stage: str
    began_at: float
    progress: int = 0
    number: int = field(default=0, compare=False)


def newest(folder: RunFolder) -> Budget | None:
    """The newest budget of a run, or None if the run has no budget.

    Raises DataError for a record that cannot be understood.
    """
    numbers = [int(name) for name in storage.list_names(folder.budget) if _NUMBER.match(name)]
    return _read(folder, max(numbers)) if numbers else None


def begin(folder: RunFolder, budget: Budget) -> None:
    """Store a budget before its first launch. Raises RunError if another command has stored it meanwhile."""
    document = {"format": FORMAT, "version": VERSION, **without_keys(asdict(budget))}
    try:
        _write(_uri(folder, budget.number, "plan.json"), document)
    except ObjectExists:
        raise RunError(
            f"{folder}: another command has just begun this run; run the same command again to follow it"
        ) from None


def launches(folder: RunFolder, number: int) -> list[LaunchRecord]:
    """The launches under a budget, in order. Raises DataError."""
    found = []
    for name in storage.list_names(_uri(folder, number)):
        if match := _LAUNCH.match(name):
            uri = _uri(folder, number, name)
            try:
                document = untrusted.read_object(uri)
                record = LaunchRecord(
                    str(document["stage"]), float(document["began_at"]), int(document["progress"]), int(match[1])
                )
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{uri}: not a record of a launch ({error}); delete it") from error
            found.append(record)
    return sorted(found, key=lambda record: record.number)


def launching(folder: RunFolder, number: int, stage: str, progress: int) -> LaunchRecord:
    """Record a launch that is about to begin. Raises RunError if another command records one at the same time."""
    before = launches(folder, number)
    record = LaunchRecord(stage, time.time(), progress, (before[-1].number if before else 0) + 1)
    uri = _uri(folder, number, f"launch-{record.number:06d}.json")
    try:
        _write(uri, {"stage": stage, "began_at": record.began_at, "progress": progress})
    except ObjectExists:
        raise RunError(
            f"{uri}: another command has just launched this run; run the same command again to follow it"
        ) from None
    return record


def end(folder: RunFolder, number: int, outcome: Mapping[str, Any]) -> None:
    """Store the outcome of a budget. A second call does not replace the first outcome."""
    document = {"format": "run-outcome", "version": VERSION, "time": time.time(), **without_keys(dict(outcome))}
    try:
        _write(_uri(folder, number, "outcome.json"), document)
    except ObjectExists:
        return


def outcome(folder: RunFolder, number: int) -> dict[str, Any] | None:
    """The outcome of a budget, or None while the run is under way. Raises DataError."""
    uri = _uri(folder, number, "outcome.json")
    try:
        return untrusted.read_object(uri)
    except ObjectNotFound:
        return None
    except ValueError as error:
        raise DataError(f"{uri}: not valid JSON ({error}); delete it, and run the same command again") from error


def _read(folder: RunFolder, number: int) -> Budget:
    uri = _uri(folder, number, "plan.json")
    try:
        document = untrusted.read_object(uri)
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{document['format']} version {document['version']}, not {FORMAT} version {VERSION}")
        budget = Budget(
            usd=float(document["usd"]),
            machines_usd=float(document["machines_usd"]),
            task=str(document["task"]),
            options=_texts(document["options"]),
            settings={str(name): str(value) for name, value in document["settings"].items()},
            train_tokens=int(document["train_tokens"]),
            forecast=dict(document["forecast"]),
            began_at=float(document["began_at"]),
            number=number,
        )
        if not 0 < budget.machines_usd <= budget.usd < math.inf:
            raise ValueError(f"machines_usd is {budget.machines_usd:g}, must be above 0 and at most usd")
        if not re.fullmatch(r"sky/[\w.-]+\.yaml", budget.task):
            raise ValueError(f"task is {budget.task!r}, must be a file of sky/")
        return budget
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{uri}: not a budget of this release ({error}); choose another RUN") from error


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise ValueError("options is not a list of texts")
    return tuple(value)


def _uri(folder: RunFolder, number: int, *names: str) -> str:
    return storage.join(folder.budget, f"{number:06d}", *names)


def _write(uri: str, document: Mapping[str, Any]) -> None:
    storage.claim(uri, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
