"""Shows the cost of machines from SkyPilot's records, and the cost of runs from their ledgers."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clouds import skypilot
from core import bucket
from core.errors import ConfigError, LauncherError, RunError
from core.run.model import BY_LEDGER
from core.run.reader import Detail, read_run
from core.task import read_task
from launch import gone
from launch.left import Survey, brief


def lines(survey: Survey) -> list[str]:
    """Lines with the cost of each cluster of a survey, and of each run that its clusters and jobs worked on."""
    clusters = list(_clusters(survey))
    runs = [line for url in dict.fromkeys(_runs(survey)) for line in run_lines(url)]
    return [*clusters, *runs] or ["not known here: neither SkyPilot nor a ledger has it; see the cloud's bill"]


def run_lines(run_url: str) -> list[str]:
    """A line for each machine whose end was recorded by this call, and a line with the run's dollars."""
    try:
        ends = gone.record(run_url)
    except LauncherError:  # the line with the run's dollars reports this error
        ends = []
    return [*ends, spent_line(run_url)]


def spent_line(run_url: str) -> str:
    """A line with the run's dollars.

    If there is no such run, the line says so and does not show $0.00, because the name may be wrong.
    """
    try:
        usd = read_run(run_url, Detail.MONEY).usd
    except RunError:
        return f"{run_url}: no run here yet; check RUN and BUCKET"
    except LauncherError as error:
        return str(error)
    return f"{run_url}: {'?' if usd is None else f'${usd:.2f}'} so far, {BY_LEDGER} (cost_report.py shows for what)"


def _clusters(survey: Survey) -> Iterator[str]:
    if not survey.clusters:
        return
    try:
        records = {record.get("cluster_hash"): record for record in skypilot.listed(["cost-report", "--all"])}
    except ConfigError as error:
        yield f"clusters: not known ({brief(error)})"
        return
    for cluster in survey.clusters:
        record = records.get(cluster.get("cluster_hash")) or {}
        usd = record.get("total_cost")  # the cost is 0 if SkyPilot knows no price
        hours = f" for {record['duration'] / 3600:.2f} hours" if record.get("duration") else ""
        said = f"${usd:.2f}{hours} at today's list price, by SkyPilot's records" if usd else f"?{hours}"
        yield f"cluster {cluster['name']}: {said}"


def _runs(survey: Survey) -> Iterator[str]:
    """The URLs of runs that clusters and jobs worked on."""
    for cluster in survey.clusters or ():
        yield from _url(skypilot.variables_of(cluster))
    if survey.jobs:  # SkyPilot's queue does not hold a job's variables
        for path in sorted(Path("sky").glob("*.yaml")):
            task = read_task(str(path), os.environ)
            if task.name in {job["job_name"] for job in survey.jobs}:
                yield from _url(task.envs)


def _url(envs: Mapping[str, Any]) -> Iterator[str]:
    try:
        yield bucket.url({name: str(value or "") for name, value in envs.items()}, "RUN")
    except ConfigError:
        return
