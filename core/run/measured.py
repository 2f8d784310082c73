"""Reads the metrics of runs, with machine time and dollars. Steps that were repeated later are left out.

    runs = read_all(["s3://bucket/runs/first", "s3://bucket/runs/second"])
    rows(runs)          # one dict per record, for a data frame or a file

`trainer.plots` draws these records. `trainer.metrics` writes them to one file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import DataError
from core.run.model import Run
from core.run.reader import Detail, read_run

# The first columns of a row. The others are the fields of the records (docs/formats.md, Metrics).
LEADING = ("run", "kind", "step", "machine_seconds", "usd", "time")


def read_measured(run_url: str) -> Run:
    """Reads a run with all of its metrics. Raises DataError if the run has no metrics."""
    run = read_run(run_url, Detail.ALL)
    if not any(segment.metrics for segment in run.segments):
        raise DataError(f"{run_url}: has no metrics; give the run.url of a training run")
    return run


def read_all(urls: Sequence[str]) -> list[tuple[str, Run]]:
    """Runs with their short names, in the order of `urls`. Raises LauncherError if a run cannot be read."""
    return [(name, read_measured(url)) for name, url in named(urls).items()]


def named(urls: Sequence[str]) -> dict[str, str]:
    """URLs by short name: the last part of the URL, or the whole URL if several URLs end in the same part."""
    last = [url.rstrip("/").rsplit("/", 1)[-1] for url in urls]
    return {name if last.count(name) == 1 else url: url for name, url in zip(last, urls, strict=True)}


def rows(runs: Sequence[tuple[str, Run]]) -> list[dict[str, Any]]:
    """One row for each record, sorted by run, step and time. All rows have the same columns.

    `machine_seconds` and `usd` (None if unknown) are sums of the whole run up to the record. The columns of nested
    fields have names such as `weights.mlp`. The columns of list items have names such as `largest_activations.0`. A
    field that a record lacks is None.
    """
    found = []
    for name, run in runs:
        kinds = dict.fromkeys(kind for segment in run.segments for kind in segment.metrics)
        points = [(point, kind) for kind in kinds for point in run.points(kind)]
        for point, kind in sorted(points, key=lambda each: (each[0].step, each[0].time)):
            start = {"run": name, "kind": kind, "step": point.step, "machine_seconds": point.seconds, "usd": point.usd}
            found.append({**_flat(point.values), **start})
    others = sorted({column for row in found for column in row} - set(LEADING))
    return [{column: row.get(column) for column in (*LEADING, *others)} for row in found]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
