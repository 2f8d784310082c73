"""Ends this user's machines and jobs of this project, and says whether anything is left.

    python -m launch.down             look only
    python -m launch.down --down      cancel managed jobs, take clusters down, end machines, wait until they are gone

On a terminal, the program asks once before it ends anything. YES=1 answers this question with yes. ALL=1 also ends
machines that other users of the same account started, if they have this project's label. If a step fails, the failure
is reported and the next steps are still taken. The exit code is 0 if every source says that nothing is up, 1 if
something is up, and 2 if nothing was found but a source could not be asked.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clouds import skypilot
from clouds.base import Leftover, is_controller
from core import environment
from core.console import run_entry
from core.errors import ConfigError
from launch import left, spent
from launch.left import FOUND, Survey, brief, look

# Seconds to wait until everything is gone. The controller needs a minute or two to end the machine of a cancelled job.
# Only then is the controller itself ended.
WAIT_SECONDS = 600.0
POLL_SECONDS = 5.0


def main(arguments: list[str]) -> int:
    if set(arguments) - {"--down"}:
        raise ConfigError("usage: python -m launch.down [--down]")
    environment.adopt()
    everyone = bool(os.environ.get("ALL"))
    survey = look(everyone)
    wanted = endings(survey, everyone) if "--down" in arguments else []
    if not wanted or not agreed(wanted):
        return conclude(survey)
    rest = end(survey, everyone)
    print(*["what it cost:", *spent.lines(survey)], sep="\n   ")
    return conclude(rest)


def endings(survey: Survey, everyone: bool) -> list[str]:
    """A line for each job, cluster and other resource that `end` ends."""
    jobs = [f"managed job {job['job_id']} {job['job_name']}" for job in survey.jobs or ()]
    clusters = [f"cluster {cluster['name']}" for cluster in survey.clusters or ()]
    if survey.clusters is None:
        clusters = ["each cluster that has the name of a task in sky/, because SkyPilot could not list clusters"]
    return [*jobs, *clusters, *(str(each) for each in survey.on_clouds if _may_end(each, everyone))]


def agreed(wanted: list[str]) -> bool:
    """Ask on the terminal whether to end everything that was found. YES=1 answers yes, also if there is no terminal."""
    print(*["to end:", *wanted], sep="\n   ", flush=True)
    if os.environ.get("YES"):
        return True
    if not sys.stdin.isatty():
        print("nothing was ended: there is no terminal to ask on; give YES=1")
        return False
    try:
        answer = input("End all of it? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("nothing was ended")
    return False


def end(survey: Survey, everyone: bool) -> Survey:
    """End everything, wait until it is gone, and return the last survey."""
    known = survey.cluster_names
    end_in_skypilot(survey)
    deadline = time.monotonic() + WAIT_SECONDS
    waiting_for: list[str] = []
    while True:
        survey = look(everyone, known)
        rest = endings(survey, everyone) if survey.found else []
        if not rest or time.monotonic() >= deadline:
            return survey
        end_rest(survey, everyone)
        if waiting_for != (waiting_for := rest):
            print(f"waiting until it is gone: {'; '.join(waiting_for)}", flush=True)
        time.sleep(POLL_SECONDS)


def end_in_skypilot(survey: Survey) -> None:
    """Cancel jobs and take clusters down. Jobs come first: a running job would replace a machine that is taken away."""
    if survey.jobs:
        with _step("managed jobs"):
            _sky(["jobs", "cancel", "--yes", *(str(job["job_id"]) for job in survey.jobs)])
    if survey.clusters is None:
        with _step("clusters"):
            # SkyPilot ignores names that it does not know.
            _sky(["down", "--yes", *(name for name, managed in left.project_tasks().items() if not managed)])
    elif names := [each["name"] for each in survey.clusters if not _ends_with_its_job(each)]:
        with _step("clusters"):
            _sky(["down", "--yes", *names])


def end_rest(survey: Survey, everyone: bool) -> None:
    """End the controller once its jobs have ended, and end the resources that SkyPilot does not end.

    The caller repeats this step, because a volume can be deleted only once its machine is gone, and a controller is
    needed until its jobs are gone.
    """
    for cluster in survey.clusters or ():
        if is_controller(cluster["name"]) and survey.jobs == []:
            with _step(f"cluster {cluster['name']}"):
                # The answer to a question that SkyPilot asks even with --yes.
                _sky(["down", cluster["name"]], typed="delete\n")
    for leftover in survey.on_clouds:
        if _may_end(leftover, everyone) and not survey.in_records(leftover):
            with _step(str(leftover)):
                print(f"ending {leftover}", flush=True)
                leftover.end()


def conclude(survey: Survey) -> int:
    """Print the answers of all sources. Returns the exit code."""
    print(*survey.lines(), sep="\n")
    if survey.exit_code == FOUND:
        print(f"{len(survey.found)} up and maybe billed: `make down` ends yours, the cloud's console ends the rest")
    elif survey.unasked:
        print("nothing was found, but not everything could be asked: see the lines that begin with ?")
    else:
        print("nothing is left: no job, cluster, machine or volume")
    return survey.exit_code


def _may_end(leftover: Leftover, everyone: bool) -> bool:
    return leftover.end is not None and (leftover.mine or (everyone and leftover.labelled))


def _ends_with_its_job(cluster: dict[str, Any]) -> bool:
    return bool(cluster.get("is_managed")) or is_controller(cluster["name"])


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Run one step. An error is printed and not raised, because the next step may still end something."""
    try:
        yield
    except Exception as error:  # SkyPilot, credentials or network may cause any error
        print(f"?  {what}: {brief(error)}", flush=True)


def _sky(arguments: list[str], typed: str | None = None) -> None:
    """Run a sky command and show its output. Raises ConfigError if it fails."""
    print(f"$ sky {' '.join(arguments)}", flush=True)
    code = subprocess.run([skypilot.find_sky(), *arguments], input=typed, text=True).returncode
    if code:
        raise ConfigError(f"`sky {' '.join(arguments)}` ended with {code}; see its output above")


if __name__ == "__main__":
    run_entry(main)
