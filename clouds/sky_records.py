"""Reads SkyPilot's records of clusters and managed jobs, for the cost report.

    machine_records(["gpt2-7"])        [MachineRecord("gpt2-7", 1795176000.0, 1795183200.0, ...)]

If SkyPilot is not installed for this Python, the module runs a Python that has it: the Python of .venv-launch, or of
the `sky` command on PATH.
"""

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from clouds import skypilot
from clouds.base import MachineRecord, Unavailable
from core import bucket
from core.errors import ConfigError
from core.exit_codes import FAILED, OK
from core.run.machine import REPOSITORY
from core.task import idle_seconds

ORIGIN = "SkyPilot cluster records"
DAYS = 365
ASK_SECONDS = 180.0
HOW = "run `make setup-launch`, or put its sky command on PATH"
_JOB_FIELDS = ("job_id", "status", "recovery_count", "job_duration")


def machine_records(clusters: Sequence[str]) -> list[MachineRecord]:
    """The machines of clusters with these names, including clusters of managed jobs. Raises Unavailable."""
    found, refusal = _answer(tuple(sorted(set(clusters))))
    if refusal:
        raise Unavailable(refusal)
    return [MachineRecord(**record) for record in found["records"]]


def job_queue() -> list[Mapping[str, Any]]:
    """Managed jobs with their recoveries and durations. Raises Unavailable."""
    found, refusal = _answer(None)
    if refusal:
        raise Unavailable(refusal)
    return found["jobs"]


def answer_here(clusters: Sequence[str]) -> int:
    """Print the records of these clusters as JSON. If no cluster is named, print the managed jobs.

    Returns an exit code.
    """
    try:
        print(json.dumps(_ask(tuple(clusters) or None)))
    except Unavailable as error:
        print(error, file=sys.stderr)
        return FAILED
    return OK


@functools.cache
def _answer(clusters: tuple[str, ...] | None) -> tuple[dict[str, Any], str]:
    """SkyPilot's answer, or the reason why there is no answer. Asks once per process."""
    try:
        try:
            skypilot.package()
        except Unavailable:
            other = _other_python()
            if other is None:
                raise Unavailable(f"SkyPilot is not installed; {HOW}") from None
            return _ask_by(other, clusters), ""
        return _ask(clusters), ""
    except Unavailable as error:
        return {}, str(error)


def _other_python() -> str | None:
    """The Python of an environment with SkyPilot, or None if none is found."""
    places = [REPOSITORY / ".venv-launch" / "bin"]
    if sky := shutil.which("sky"):
        places.append(Path(sky).resolve().parent)
    for place in places:
        python = place / "python"
        if (place / "sky").exists() and python.exists() and Path(sys.executable).parent.absolute() != place:
            return str(python)
    return None


def _ask_by(python: str, clusters: tuple[str, ...] | None) -> dict[str, Any]:
    code = "import sys, clouds.sky_records as records; sys.exit(records.answer_here(sys.argv[1:]))"
    command = [python, "-c", code, *(clusters or ())]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=ASK_SECONDS)
        if done.returncode:
            raise Unavailable(" ".join(done.stderr.split())[-200:] or f"{python} ended with {done.returncode}")
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise Unavailable(f"SkyPilot of {python} did not answer ({type(error).__name__})") from error


def _ask(clusters: tuple[str, ...] | None) -> dict[str, Any]:
    sky = skypilot.package()
    if clusters is None:
        try:
            listed = list(sky.get(sky.jobs.queue_v2(refresh=False, all_users=False))[0])
        except Exception as error:  # no controller, no API server
            raise Unavailable(f"SkyPilot has no list of managed jobs ({type(error).__name__})") from error
        return {"jobs": [_job(job) for job in listed]}
    try:
        # SkyPilot's answer contains the tasks of the clusters only if the clusters are named.
        records = sky.get(sky.cost_report(days=DAYS, cluster_names=list(clusters)))
    except TypeError:  # releases before 0.14 do not accept names
        records = sky.get(sky.cost_report(days=DAYS))
    except Exception as error:  # any error of its client, such as no API server or no network
        raise Unavailable(f"SkyPilot's API server did not answer ({type(error).__name__})") from error
    return {"records": [asdict(each) for record in records for each in from_record(record)]}


def _job(job: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: job.get(name) for name in _JOB_FIELDS}
    return found | {"status": str(getattr(found["status"], "value", found["status"]))}


def from_record(record: Mapping[str, Any]) -> list[MachineRecord]:
    """One MachineRecord per usage interval of a record of `sky.cost_report`.

    An interval opens at the launch attempt and closes when SkyPilot notices that the machine is gone. If the cluster of
    a record never got nodes, its launch failed and nothing was paid, although SkyPilot's own report counts this time as
    paid.
    """
    resources = record.get("resources")
    nodes = record.get("num_nodes") or 1
    price = _usd_per_hour(resources)
    # SkyPilot sets node_names once nodes exist. Records of older releases do not have this field, and such a record
    # does not count as a failed launch.
    failed = "node_names" in record and not record["node_names"] and _ended(record)
    job = _job_of(str(record.get("name") or ""))
    run, idle = _run_of(record), _idle_of(record.get("last_creation_yaml"))
    return [
        MachineRecord(
            cluster=str(record.get("name")),
            start=float(start),
            end=None if end is None else float(end),
            origin=ORIGIN,
            was_up=not failed,
            nodes=nodes,
            usd_per_hour=None if price is None else price * nodes,
            price_source=None if price is None else "SkyPilot catalog, today's price",
            cloud=_lower(_of(resources, "cloud") or record.get("cloud")),
            region=_of(resources, "region") or record.get("region"),
            zone=_of(resources, "zone"),
            instance_type=_of(resources, "instance_type"),
            spot=_of(resources, "use_spot"),
            job=job,
            run=None if job else run,
            idle_seconds=idle,
            disk_gb=_of(resources, "disk_size"),
        )
        for start, end in record.get("usage_intervals") or []
    ]


def _ended(record: Mapping[str, Any]) -> bool:
    status = record.get("status")
    return status is None or str(status) in ("TERMINATED", "None")


def _usd_per_hour(resources: Any) -> float | None:
    """The list price of one node, or None if the lookup fails. SkyPilot's own report counts $0 for such a node."""
    try:
        price = float(resources.get_cost(3600))
    except Exception:  # the type left the catalog, or the record has no resources
        return None
    return price if price > 0 else None


def _job_of(cluster: str) -> str | None:
    """The id of the managed job that a cluster belongs to. It is part of the cluster's name <job>-<id>.

    None if the name has another form.
    """
    name, _, number = cluster.rpartition("-")
    return number if name and number.isdecimal() else None


def _of(resources: Any, name: str) -> Any:
    return getattr(resources, name, None)


def _lower(value: Any) -> str | None:
    return None if value is None else str(value).lower()


def _run_of(record: Mapping[str, Any]) -> str | None:
    """The URL of the run that a cluster was launched for; None if it is not known."""
    with contextlib.suppress(ConfigError):
        return bucket.url(skypilot.variables_of(record), "RUN")
    return None


def _idle_of(task: str | None) -> float | None:
    """Idle seconds until the autostop of a cluster that was launched with `task` (YAML text). None if not known."""
    with contextlib.suppress(yaml.YAMLError, AttributeError, TypeError, ValueError, ConfigError):
        return idle_seconds((yaml.safe_load(task or "") or {}).get("resources") or {})
    return None
