"""The output of a job: from SkyPilot while it runs, or from the bucket, where every machine's output is kept.

python -m launch.logs sky/pretrain-8xa100.yaml              follows the newest running job of the task
python -m launch.logs --stored sky/pretrain-8xa100.yaml     all output so far of the run that BUCKET and RUN name
python -m launch.logs s3://bucket/runs/gpt2-124m            the same by URL; preempted machines are included
"""

import datetime
import os
import re
import subprocess
import sys

from core import environment, storage
from core.console import run_entry
from core.errors import ConfigError, ObjectNotFound
from core.run import journal
from core.run.folder import RunFolder
from launch import skypilot
from launch.task import is_managed, read_task, settings_of
from launch.work import run_of

# Lines that bring their own time, as those of our programs do.
_TIMED = re.compile(r"\d\d:\d\d:\d\d ")


def main(arguments: list[str]) -> int:
    stored = arguments[:1] == ["--stored"]
    if len(arguments) != 1 + stored:
        raise ConfigError("usage: python -m launch.logs [--stored] sky/TASK.yaml, or python -m launch.logs RUN_URL")
    environment.adopt()
    source = arguments[-1]
    if stored or not source.endswith(".yaml"):
        return show_stored(run_of(source, os.environ))
    task = read_task(source)
    name = task["name"]
    run = settings_of(task, os.environ).get("RUN", "...")
    elsewhere = f"all its output is in the bucket: make logs FROM=bucket RUN={run}"
    command = _of_job(name, elsewhere) if is_managed(task) else _of_cluster(name, elsewhere)
    print(f"$ sky {' '.join(command)}", flush=True)
    code = subprocess.call([skypilot.find_sky(), *command])
    if code:
        print(f"SkyPilot has no more to show; {elsewhere}")
    return code


def _of_job(name: str, elsewhere: str) -> list[str]:
    """Arguments of sky that follow the newest running job of this name. Raises ConfigError if none runs."""
    found = [job for job in skypilot.jobs(ended=True) if job.get("job_name") == name]
    running = [job for job in found if not skypilot.has_ended(job)]
    if not running:
        last = f"job {found[0]['job_id']} has ended ({found[0]['status']})" if found else "there has been none"
        raise ConfigError(f"no managed job {name} is running, {last}; {elsewhere}")
    newest, *others = running
    if others:
        named = ", ".join(f"{job['job_id']} ({job['status']})" for job in others)
        print(f"following job {newest['job_id']}, the newest; also running as {name}: {named} (sky jobs logs ID)")
    return ["jobs", "logs", str(newest["job_id"])]


def _of_cluster(name: str, elsewhere: str) -> list[str]:
    """Arguments of sky that follow the newest job of the cluster. Raises ConfigError if it is gone."""
    if name not in {cluster["name"] for cluster in skypilot.clusters()}:
        raise ConfigError(f"no cluster {name} is up, so it has ended or has another name (make status); {elsewhere}")
    return ["logs", name]


def show_stored(url: str) -> int:
    """Print the logs of a run, by its URL, in order of attempts. Raises ObjectNotFound when there are none."""
    folder = RunFolder(url).logs
    attempts = sorted(storage.list_names(folder))
    if not attempts:
        raise ObjectNotFound(f"{folder}: no machine has written output yet; check RUN and BUCKET")
    for attempt in attempts:
        print(f"--- {attempt}")
        events, problems = journal.read(storage.join(folder, attempt))
        for event in events:
            stamp = f"{datetime.datetime.fromtimestamp(event['time'], datetime.UTC):%H:%M:%S} "
            print(event["line"] if _TIMED.match(event["line"]) else stamp + event["line"])
        for problem in problems:
            print(f"warning: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_entry(main)
