"""Caches the segments of a run on this machine, so that the next report fetches only new objects.

Each run has one NumPy file below $COST_CACHE_DIR (default ~/.cache/pretrain-launcher/costs). The file contains no
secrets and may be deleted at any time. A file that is damaged or of another release is ignored and replaced.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
import zipfile
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core import urls
from core.run.machine import Machine
from core.run.model import Segment, Span, Steps
from core.run.timeline import SHOWN
from core.stores import aws

log = logging.getLogger(__name__)
VERSION = 5
_PLAIN = ("number", "started_at", "program", "launcher", "marks", "end", "problems", "moved")
_CURVE = ("step", "time", *SHOWN["train"])


@dataclass(frozen=True)
class Seen:
    """Sequence numbers up to which ledger and metrics of a segment were read; -1 if nothing was read.

    `start` identifies the version of the start object, so a replaced segment is noticed.
    """

    start: str
    ledger: int = -1
    metrics: int = -1


Known = Mapping[int, tuple[Segment, Seen]]


def path_for(run_url: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Path of the cache file of a run. Runs with the same URL at two S3 endpoints have two files."""
    endpoint = aws.endpoint_of(environment) or ""
    digest = hashlib.sha256(f"{endpoint} {run_url.rstrip('/')}".encode()).hexdigest()
    return folder(environment) / f"{digest[:20]}.npz"


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    if environment.get("COST_CACHE_DIR"):
        return urls.local_path(environment["COST_CACHE_DIR"], "environment variable COST_CACHE_DIR")
    root = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pretrain-launcher" / "costs"


def load(path: Path) -> dict[int, tuple[Segment, Seen]]:
    """The cached segments by number. The result is empty if there is no usable file."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
        head = json.loads(columns.pop("head").tobytes())
        if head["version"] != VERSION:
            return {}
        return _unpack(head, columns)
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
        log.warning("%s: this cache cannot be read and is replaced (%s)", path, error)
        return {}


def save(path: Path, known: Known) -> None:
    """Replace the file atomically. If this fails, a warning is logged.

    The next report then fetches everything again.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **_pack(known))
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: this cache cannot be written (%s); the next report reads everything again", path, error)


def _pack(known: Known) -> dict[str, np.ndarray]:
    segments = [segment for segment, _ in known.values()]
    spans = [each for segment in segments for each in segment.spans]
    phases = sorted({phase for each in spans for phase in each.phases})
    place = {phase: column for column, phase in enumerate(phases)}
    seconds = np.zeros((len(spans), len(phases)))
    for row, each in enumerate(spans):
        for phase, value in each.phases.items():
            seconds[row, place[phase]] = value
    head = {"version": VERSION, "phases": phases, "segments": []}
    for segment, seen in known.values():
        plain = {name: getattr(segment, name) for name in _PLAIN}
        plain["metrics"] = {kind: records for kind, records in segment.metrics.items() if kind != "train"}
        counts = [len(segment.spans), len(segment.steps.number), len(segment.records("train"))]
        plain |= {"machine": asdict(segment.machine), "tags": segment.tags, "seen": asdict(seen), "counts": counts}
        head["segments"].append(plain)
    columns = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), "phase_seconds": seconds}
    columns |= {f"span_{name}": np.array([getattr(s, name) for s in spans], float) for name in ("start", "end")}
    for name in vars(Steps()):
        parts = [np.asarray(getattr(segment.steps, name)) for segment in segments]
        columns[f"steps_{name}"] = np.concatenate(parts) if parts else np.array([])
    for name in _CURVE:
        values = [record[name] for segment in segments for record in segment.records("train")]
        columns[f"curve_{name}"] = np.array([math.nan if v is None else v for v in values], float)
    return columns


def _unpack(head: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> dict[int, tuple[Segment, Seen]]:
    phases = head["phases"]
    lists = {name: values.tolist() for name, values in columns.items() if not name.startswith("steps_")}
    at = [0, 0, 0]
    known = {}
    for plain in head["segments"]:
        ranges = [slice(begin, begin + count) for begin, count in zip(at, plain["counts"], strict=True)]
        at = [each.stop for each in ranges]
        rows = zip(*(lists[name][ranges[0]] for name in ("span_start", "span_end", "phase_seconds")), strict=True)
        segment = Segment(
            **{name: plain[name] for name in _PLAIN},
            machine=Machine(**plain["machine"]),
            tags=tuple(plain["tags"]),
            spans=[
                Span(start, end, {phase: value for phase, value in zip(phases, row, strict=True) if value})
                for start, end, row in rows
            ],
            steps=Steps(**{name: _array(columns[f"steps_{name}"][ranges[1]]) for name in vars(Steps())}),
            metrics=plain["metrics"] | _curve(lists, ranges[2]),
        )
        known[segment.number] = (segment, Seen(**plain["seen"]))
    return known


def _array(values: np.ndarray) -> array:
    found = array("q" if values.dtype.kind == "i" else "d")
    found.frombytes(values.tobytes())
    return found


def _curve(lists: Mapping[str, list[float]], rows: slice) -> dict[str, list[dict[str, Any]]]:
    """The metrics records of kind "train". NaN in the file stands for an unknown value."""
    columns = [[None if value != value else value for value in lists[f"curve_{name}"][rows]] for name in _CURVE]
    records = [dict(zip(_CURVE, values, strict=True)) for values in zip(*columns, strict=True)]
    return {"train": [record | {"step": int(record["step"])} for record in records]} if records else {}
