"""Finds all running resources of this project: asks SkyPilot for clusters and managed jobs, then each cloud.

    survey = look()
    survey.found, survey.unasked, survey.exit_code

A source is SkyPilot's list of clusters, its queue of managed jobs, or a cloud for which this computer has credentials.
Each source lists something, lists nothing, or cannot be asked. The clouds are asked even if SkyPilot answers, because
SkyPilot does not know machines that it has lost or that were started elsewhere.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clouds import skypilot
from clouds.base import LABEL, Inventory, Leftover, Ownership, is_controller
from clouds.providers import CLOUDS
from core import secrets
from core.task import read_task

FOUND, UNKNOWN, NOTHING = 1, 2, 0
NO_CLOUD = "no cloud has credentials on this computer, so none could be asked whether a machine is up"
# Each task of this project runs this command, and no other task does.
OUR_COMMAND = "launch/node/container.sh"


@dataclass
class Survey:
    """The running resources of this project.

    `clusters` and `jobs` are SkyPilot's records, or None if SkyPilot could not be asked. `answers` holds a line per
    source. `unasked` holds a sentence for each source, or part of a source, that could not be asked.
    """

    clusters: list[dict[str, Any]] | None = None
    jobs: list[dict[str, Any]] | None = None
    on_clouds: list[Leftover] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    @property
    def found(self) -> list[str]:
        """A line for each running resource. A cluster's machine may have a second line, from the cloud's list."""
        jobs = [f"managed job {job['job_id']} {job['job_name']}: {job['status']}" for job in self.jobs or ()]
        clusters = [f"cluster {cluster['name']}: {cluster['status']}" for cluster in self.clusters or ()]
        return [*jobs, *clusters, *map(str, self.on_clouds)]

    @property
    def exit_code(self) -> int:
        """1 if something is up. 2 if nothing was found but a source could not be asked. 0 if nothing is up."""
        return FOUND if self.found else UNKNOWN if self.unasked else NOTHING

    def lines(self) -> list[str]:
        """The answers of all sources, then a line `!` for each running resource and `?` for each unasked source."""
        return [*self.answers, *(f"!  {each}" for each in self.found), *(f"?  {each}" for each in self.unasked)]

    @property
    def cluster_names(self) -> frozenset[str]:
        """The names that this project's clusters have on their clouds, as SkyPilot lists them."""
        return _on_cloud(self.clusters or ())

    def in_records(self, leftover: Leftover) -> bool:
        """Whether SkyPilot must end this machine: it lists the cluster, or a managed job that would replace it."""
        return leftover.cluster in self.cluster_names or bool(self.jobs)


@functools.cache
def project_tasks() -> dict[str, bool]:
    """The name of each task in sky/, and whether it is a managed job."""
    tasks = [read_task(str(path), os.environ) for path in sorted(Path("sky").glob("*.yaml"))]
    return {task.name: task.managed for task in tasks}


def look(everyone: bool = False, known: Iterable[str] = ()) -> Survey:
    """Ask all sources. `everyone` includes the clusters and jobs of SkyPilot's other users.

    `known` holds cloud names of this project's clusters that SkyPilot may no longer list.
    """
    survey = Survey()
    tasks = project_tasks()
    listed = _ask("SkyPilot's clusters", survey, lambda: skypilot.clusters(everyone))
    queue = _ask("SkyPilot's managed jobs", survey, lambda: skypilot.jobs(everyone=everyone))
    running = [job for job in queue or () if not skypilot.has_ended(job)]
    # A controller that also serves jobs of other projects is not ended.
    is_shared = any(job.get("job_name") not in tasks for job in running)
    ours = [each for each in listed or () if is_ours(each, tasks) or (is_controller(each["name"]) and not is_shared)]
    others = [each for each in listed or () if each not in ours]
    whose = Ownership(tuple(tasks), skypilot.user_hash(os.environ), _on_cloud(ours) | {*known}, _on_cloud(others))
    ask_clouds(whose, survey)
    # A job may have another name than its task. Then only the job's machines show that the job belongs to this project.
    machines = [leftover.cluster for leftover in survey.on_clouds if leftover.mine]
    survey.clusters = None if listed is None else ours
    survey.jobs = None if queue is None else [job for job in running if _is_our_job(job, tasks, machines)]
    survey.answers[:0] = [
        *_answer("SkyPilot's clusters", survey.clusters),
        *_answer("SkyPilot's managed jobs", survey.jobs),
    ]
    return survey


def is_ours(cluster: Mapping[str, Any], tasks: Iterable[str]) -> bool:
    """Whether a cluster belongs to this project: by its name, its label, or the task that it was launched with."""
    key, value = LABEL
    labelled = (cluster.get("labels") or {}).get(key) == value
    return cluster["name"] in tasks or labelled or OUR_COMMAND in (cluster.get("last_creation_yaml") or "")


def _is_our_job(job: Mapping[str, Any], tasks: Iterable[str], machines: Iterable[str]) -> bool:
    return job.get("job_name") in tasks or any(job_of(cluster, [job]) for cluster in machines)


def job_of(cluster: str, jobs: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The managed job whose machines have this cluster name on the cloud."""
    return next((job for job in jobs if cluster.startswith(f"{job.get('job_name')}-{job['job_id']}-")), None)


def _on_cloud(clusters: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(filter(None, (cluster.get("cluster_name_on_cloud") for cluster in clusters)))


def _ask(source: str, survey: Survey, ask: Callable[[], Any]) -> Any:
    """The answer of a source.

    If an error occurs, the answer is None, and a sentence about the error is added to `unasked`.
    """
    try:
        return ask()
    except Exception as error:  # SkyPilot, credentials or network may cause any error
        survey.unasked.append(f"{source}: could not be asked ({brief(error)})")
        return None


def _answer(source: str, found: list | None) -> list[str]:
    return [] if found is None else [f"   {source}: {f'{len(found)} found' if found else 'nothing'}"]


def ask_clouds(whose: Ownership, survey: Survey) -> None:
    """Add the resources that the clouds list to `survey`."""
    configured = 0
    for name, cloud in CLOUDS.items():
        has_keys = _ask(name, survey, cloud.is_configured)
        if has_keys is False:
            survey.answers.append(f"   {name}: not asked, because this computer has no credentials for it")
            continue
        configured += 1
        answer: Inventory | None = _ask(name, survey, functools.partial(cloud.leftovers, whose)) if has_keys else None
        if answer is None:
            continue
        survey.on_clouds += answer.found
        survey.unasked += answer.unasked
        if answer.found or not answer.unasked:
            survey.answers += _answer(name, list(answer.found))
    if not configured:
        survey.unasked.append(NO_CLOUD)


def brief(error: Exception) -> str:
    return secrets.scrub(" ".join(str(error).split()))[:300] or type(error).__name__
