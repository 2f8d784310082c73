"""Ends the jobs and clusters of this project, then asks the clouds whether anything is left.

    python -m launch.down             only show what is running
    python -m launch.down --down      cancel managed jobs, take clusters down, delete leftovers, show what is left

The steps are independent: a step that fails is reported, and the next ones still run. SkyPilot's list may be
incomplete, so the clouds are also asked for instances, spot requests and volumes with this project's label, or with the
name of one of its tasks. Exits with 1 if something is up, if a step failed, or if a source could not be asked. Machines
are ended through SkyPilot only, because the label does not show whether a machine is a colleague's.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from clouds import skypilot
from clouds.base import LABEL, Leftover
from clouds.providers import CLOUDS
from core import environment, secrets
from core.console import run_entry
from core.errors import ConfigError
from core.task import read_task

# A cancelled job ends its machine, which takes the controller a minute or two.
WAIT_SECONDS = 300.0
POLL_SECONDS = 5.0
Source = Callable[[Sequence[str]], Iterable[Leftover]]


def main(arguments: list[str]) -> int:
    if set(arguments) - {"--down"}:
        raise ConfigError("usage: python -m launch.down [--down]")
    environment.adopt()
    names = project_tasks()
    failures: list[str] = []
    if "--down" in arguments:
        names, failures = end_all(names)
    deadline = time.monotonic() + (WAIT_SECONDS if "--down" in arguments else 0)
    waiting_for: list[str] = []
    while True:
        found, unknown = look(names, {"records": leftovers_in_records, **cloud_sources()})
        if not found or time.monotonic() >= deadline:
            break
        # In every round, because a volume can be deleted only when its machine is gone.
        for leftover in found:
            if leftover.end:
                with _step(str(leftover), failures):
                    print(f"ending {leftover}", flush=True)
                    leftover.end()
        if waiting_for != (waiting_for := [str(leftover) for leftover in found]):
            print(f"waiting until it is gone: {'; '.join(waiting_for)}", flush=True)
        time.sleep(POLL_SECONDS)
    for problem in dict.fromkeys([*failures, *unknown]):
        print(f"?  {problem}")
    for leftover in found:
        print(f"!  {leftover}")
    if found:
        print(f"{len(found)} left and maybe billed: run `make down` again, or end them in the cloud's console")
    elif failures or unknown:
        print("nothing was found, but not everything could be asked or ended; see the lines that begin with ?")
    else:
        print("nothing is left: no job, cluster, instance, spot request or volume")
    return 1 if found or failures or unknown else 0


def project_tasks() -> dict[str, bool]:
    """The name of each task in sky/, and whether it is a managed job."""
    tasks = [read_task(str(path), os.environ) for path in sorted(Path("sky").glob("*.yaml"))]
    return {task.name: task.managed for task in tasks}


def end_all(names: Mapping[str, bool]) -> tuple[dict[str, bool], list[str]]:
    """End all jobs and clusters. Returns `names`, with the names of the clusters in the clouds added, and the failures.

    Managed jobs come first, because a running job would replace a machine that it loses.
    """
    names = dict(names)
    failures: list[str] = []
    with _step("managed jobs", failures):
        if jobs := jobs_of(names):
            _sky(["jobs", "cancel", "--yes", *(str(job["job_id"]) for job in jobs)])
    with _step("clusters", failures):
        try:
            ours = clusters_of(names)
        except ConfigError:
            # SkyPilot skips the names that it does not know.
            _sky(["down", "--yes", *(name for name, managed in names.items() if not managed)])
            raise
        names |= {cluster["cluster_name_on_cloud"]: False for cluster in ours if cluster.get("cluster_name_on_cloud")}
        if ours:
            _sky(["down", "--yes", *(cluster["name"] for cluster in ours)])
    return names, failures


@contextmanager
def _step(what: str, failures: list[str]) -> Iterator[None]:
    """Run one step of `down`. An error is reported but not raised, because the next step may still end something."""
    try:
        yield
    except Exception as error:  # SkyPilot, credentials, network: any error of a library
        failures.append(f"{what}: {_brief(error)}")
        print(f"?  {failures[-1]}", flush=True)


def _sky(arguments: list[str]) -> None:
    """Run a sky command and show its output. Raises ConfigError if it fails."""
    print(f"$ sky {' '.join(arguments)}", flush=True)
    if code := subprocess.call([skypilot.find_sky(), *arguments]):
        raise ConfigError(f"`sky {' '.join(arguments)}` ended with {code}; see its output above")


def jobs_of(names: Iterable[str]) -> list[dict]:
    """Managed jobs of our tasks that have not ended; several may share a name. Raises ConfigError."""
    return [job for job in skypilot.jobs() if job.get("job_name") in set(names) and not skypilot.has_ended(job)]


def clusters_of(names: Iterable[str]) -> list[dict]:
    """This user's clusters of our tasks, by name or label, because `sky launch` without -c invents a name."""
    key, value = LABEL
    return [c for c in skypilot.clusters() if c["name"] in set(names) or (c.get("labels") or {}).get(key) == value]


def look(names: Iterable[str], sources: Mapping[str, Source] | None = None) -> tuple[list[Leftover], list[str]]:
    """The leftovers that `sources` (by default the clouds) report, and a sentence for each source without an answer."""
    found: list[Leftover] = []
    unknown: list[str] = []
    for name, ask in (cloud_sources() if sources is None else sources).items():
        try:
            found += ask(tuple(names))
        except Exception as error:  # credentials, network: any error of a library
            unknown.append(f"{name}: could not be asked ({_brief(error)})")
    return found, unknown


def cloud_sources() -> dict[str, Source]:
    """For the name of each cloud, the function that asks it for leftovers."""
    return {name: cloud.leftovers for name, cloud in CLOUDS.items()}


def leftovers_in_records(names: Sequence[str]) -> list[Leftover]:
    """Jobs and clusters that SkyPilot lists. A job still has a machine if its cancellation is only scheduled."""
    found = [Leftover(f"managed job {job['job_id']} {job['job_name']}: {job['status']}") for job in jobs_of(names)]
    return found + [Leftover(f"cluster {cluster['name']}: {cluster['status']}") for cluster in clusters_of(names)]


def _brief(error: Exception) -> str:
    return secrets.scrub(" ".join(str(error).split()))[:300] or type(error).__name__


if __name__ == "__main__":
    run_entry(main)
