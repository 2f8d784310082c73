"""Stores the forecast of a launch with the run, and compares it line by line with the dollars that the run has cost.

`cost_report.py estimate TASK --store` writes the forecast to RUN_URL/forecast.json. If this file does not exist, the
newest plan of `make run` is the forecast (RUN_URL/budget/NUMBER/plan.json).
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from core import storage, untrusted
from core.errors import LauncherError
from core.run import budget
from core.run.folder import RunFolder
from core.run.model import Run
from core.run.timeline import number
from costs.cells import Cell
from costs.forecast import ForecastRow, describe

FORMAT, VERSION = "cost-forecast", 1
# Lines of a forecast, with the phases of a report that belong to each line. The first line takes all phases that belong
# to no other line.
LINES = {
    "other": ("not_attributed", "api", "elsewhere", "factor"),
    "provision": ("provision",),
    "image, ready": ("setup", "init", "compile", "restore"),
    "train": ("train_kept", "prep", "finalize", "export", "serve"),
    "eval, sample, checkpoint, wait": ("eval", "sample", "checkpoint", "data_wait"),
    "restarts and lost work": ("train_lost",),
    "idle until down": ("idle_until_down", "idle", "billing_unit"),
    "storage": ("storage", "requests"),
    "egress": ("traffic",),
    "disks": ("disks", "addresses"),
    "controller": ("controller",),
}
_PARTS = {
    "image": "image, ready",
    "ready": "image, ready",
    "prepare": "train",
    "build": "train",
    "export": "train",
    "serve": "train",
    "sample": "eval, sample, checkpoint, wait",
    "jobs controller": "controller",
    "eval": "eval, sample, checkpoint, wait",
    "checkpoint": "eval, sample, checkpoint, wait",
}
# These parts of a plan are left out of the comparison: they belong to separate runs, or are not a cost.
_OTHERS = ("preparation", "evaluation", "reserve")


@dataclass(frozen=True)
class Foreseen:
    """A forecast that was made at a launch. `lines` are dollars by the names of LINES."""

    usd: float
    what: str
    lines: Mapping[str, float] = field(default_factory=dict)
    usd_low: float | None = None
    usd_high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A line of the comparison.

    `foreseen` holds the forecast dollars, or None if the forecast has no such line. `actual` holds the known dollars.
    """

    name: str
    foreseen: float | None
    actual: float


def store(run_url: str, task: str, row: ForecastRow) -> tuple[str, bool]:
    """Store the forecast of a launch. If the run has begun and has a forecast, the stored forecast is kept.

    Returns the URI of the stored forecast, and whether it is new. Raises StorageError.
    """
    folder = RunFolder(run_url)
    uri = folder.forecast
    if storage.exists(folder.description) and storage.exists(uri):
        return uri, False
    document = {"format": FORMAT, "version": VERSION, "time": time.time(), "task": task, "offer": describe(row)}
    document |= {"usd": row.usd, "usd_low": row.usd_low, "usd_high": row.usd_high, "parts": row.parts}
    storage.write_bytes(uri, (json.dumps(document | {"machine": asdict(row.offer)}, indent=1) + "\n").encode())
    return uri, True


def read(run: Run) -> Foreseen | None:
    """The forecast of a run. None if there is no forecast, or if it cannot be understood.

    Reads only objects in the run's listing.
    """
    names = {each.uri for each in run.objects}
    try:
        if run.folder.forecast in names:
            found = untrusted.read_object(run.folder.forecast)
            return _foreseen(found, str(found["offer"])[:100])
        if any(name.startswith(f"{run.folder.budget}/") for name in names) and (made := budget.newest(run.folder)):
            return _foreseen(made.forecast, f"plan for ${made.usd:g}")
    except (LauncherError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def _foreseen(document: Mapping[str, Any], what: str) -> Foreseen | None:
    lines: dict[str, float] = {}
    for part, value in document["parts"].items():
        usd = number(value)
        if usd is None or part in _OTHERS:
            continue
        name = _PARTS.get(part, part if part in LINES else "other")
        lines[name] = lines.get(name, 0.0) + usd
    if not lines:
        return None
    return Foreseen(sum(lines.values()), what, lines, number(document.get("usd_low")), number(document.get("usd_high")))


def compare(foreseen: Foreseen, parts: Sequence[Cell]) -> list[Comparison]:
    """Forecast and actual dollars by line, without lines for which both are zero."""
    line_of = {phase: name for name, phases in LINES.items() for phase in phases}
    actual = dict.fromkeys(LINES, 0.0)
    for cell in parts:
        actual[line_of.get(cell.phase, "other")] += cell.usd or 0.0
    return [
        Comparison(name, foreseen.lines.get(name), usd) for name, usd in actual.items() if usd or name in foreseen.lines
    ]
