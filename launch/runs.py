"""Shows jobs, clusters and the cost of a run, shows the output of a run, and downloads a run.

    python -m launch.runs status [sky/TASK.yaml | RUN_URL]
    python -m launch.runs logs                            follow what this project launched last
    python -m launch.runs logs sky/TASK.yaml              follow the newest running job of the task
    python -m launch.runs logs --stored sky/TASK.yaml     all output of the run that BUCKET and RUN name
    python -m launch.runs logs RUN_URL                    the same, by URL; includes preempted machines
    python -m launch.runs pull sky/TASK.yaml | RUN_URL [FOLDER]

`pull` downloads metrics, ledger, logs and the newest complete checkpoint to pulled/RUN, or to FOLDER. Existing files
are kept. The copy is a run folder: `python cost_report.py pulled/gpt2-124m` reads it.
"""

import datetime
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clouds import skypilot
from core import bucket, environment, output, secrets, storage, untrusted
from core.console import progress, run_entry, set_up_logging
from core.errors import ConfigError, ObjectNotFound, RunError
from core.run import journal, timeline
from core.run.folder import RunFolder
from core.storage import ObjectInfo
from core.task import read_task
from launch import managed
from launch.left import NOTHING, UNKNOWN, is_ours, look, project_tasks
from launch.spent import run_lines

FOLDERS = ("ledger", "metrics", "course", "evaluations", "serving", "exports/ledger", "logs", "preflight", "machines")
FOLDERS += ("refused",)
# Objects that differ between two runs, even if both had the same URL.
IDENTITY = ("run.json", "start.jsonl")
LISTINGS = 3
# The beginning of a line that already contains its time, as the log lines of this project do.
_TIMED = re.compile(r"\d\d:\d\d:\d\d ")
_CHECKPOINT = re.compile(r"/checkpoints/(step-\d+)/")
USAGE = "usage: python -m launch.runs status|logs|pull sky/TASK.yaml|RUN_URL (make status, make logs, make pull)"


def main(arguments: list[str]) -> int:
    commands = {"status": status, "logs": logs, "pull": pull}
    if not arguments or arguments[0] not in commands:
        raise ConfigError(USAGE)
    environment.adopt()
    return commands[arguments[0]](arguments[1:])


def run_of(source: str, variables: Mapping[str, str]) -> str:
    """The URL of a run. `source` is this URL, or a task file. Raises ConfigError.

    For a task file, the variable RUN_URL, or BUCKET and RUN, names the run.
    """
    if not source.endswith(".yaml"):
        return source
    return bucket.url({**variables, **read_task(source, variables).envs}, "RUN")


# --- status ----------------------------------------------------------------------------------------------------


def status(arguments: list[str]) -> int:
    """Print the running resources that SkyPilot and the clouds list, and the dollars of a run if one is named.

    Returns 2 if a source could not be asked, else 0. Running resources do not change the exit code here, unlike in
    launch.down.
    """
    print("$ sky status --refresh", flush=True)
    try:
        code = subprocess.call([skypilot.find_sky(), "status", "--refresh"])
    except ConfigError as error:  # SkyPilot is not installed; the clouds may list machines
        print(f"?  {error}")
        code = UNKNOWN
    survey = look(everyone=bool(os.environ.get("ALL")))
    print("\nSkyPilot and the clouds say:", *survey.lines(), sep="\n")
    if survey.exit_code == NOTHING:
        print("nothing of this project is up")
    if arguments and (not arguments[0].endswith(".yaml") or os.environ.get("BUCKET") or os.environ.get("RUN_URL")):
        print("", *run_lines(run_of(arguments[0], os.environ)), sep="\n")
    return UNKNOWN if survey.unasked else code


# --- logs ------------------------------------------------------------------------------------------------------


def logs(arguments: list[str]) -> int:
    """Show a job's output: from SkyPilot while the job runs, or from the bucket, which keeps all output."""
    stored = arguments[:1] == ["--stored"]
    if not arguments:
        return _follow(_of_newest(), "all output of a run is in the bucket: make logs FROM=bucket RUN=...")
    if len(arguments) != 1 + stored:
        raise ConfigError("usage: python -m launch.runs logs [[--stored] sky/TASK.yaml], or ... logs RUN_URL")
    source = arguments[-1]
    if stored or not source.endswith(".yaml"):
        return show_stored(run_of(source, os.environ))
    task = read_task(managed.chosen(source, os.environ), os.environ)
    elsewhere = f"all its output is in the bucket: make logs FROM=bucket RUN={task.envs.get('RUN') or '...'}"
    return _follow(_of_job(task.name, elsewhere) if task.managed else _of_cluster(task.name, elsewhere), elsewhere)


def _follow(command: list[str], elsewhere: str) -> int:
    print(f"$ sky {' '.join(command)}", flush=True)
    code = subprocess.call([skypilot.find_sky(), *command])
    if code:
        print(f"SkyPilot has no more to show; {elsewhere}")
    return code


def _of_newest() -> list[str]:
    """Arguments of sky that follow this project's newest running job or cluster. Raises ConfigError if none is up."""
    tasks = project_tasks()
    jobs = [job for job in skypilot.jobs() if job.get("job_name") in tasks and not skypilot.has_ended(job)]
    clusters = [each for each in skypilot.clusters() if is_ours(each, tasks) and not each.get("is_managed")]
    found = [(_seconds(job, "submitted_at"), f"managed job {job['job_name']}", _of_number(job)) for job in jobs]
    found += [(_seconds(each, "launched_at"), f"cluster {each['name']}", ["logs", each["name"]]) for each in clusters]
    if not found:
        raise ConfigError(
            "nothing of this project runs; all output of a run is in the bucket: make logs FROM=bucket RUN=..."
        )
    (_, what, command), *others = sorted(found, key=lambda each: each[0], reverse=True)
    if others:
        print(f"following {what}, the newest; also up: {', '.join(each[1] for each in others)} (make logs TASK=...)")
    return command


def _seconds(record: Mapping[str, Any], key: str) -> float:
    return timeline.moment(record.get(key)) or 0.0


def _of_number(job: Mapping[str, Any]) -> list[str]:
    return ["jobs", "logs", str(job["job_id"])]


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
    return _of_number(newest)


def _of_cluster(name: str, elsewhere: str) -> list[str]:
    """Arguments of sky that follow the newest job of the cluster. Raises ConfigError if it is gone."""
    if name not in {cluster["name"] for cluster in skypilot.clusters()}:
        raise ConfigError(f"no cluster {name} is up, so it has ended or has another name (make status); {elsewhere}")
    return ["logs", name]


def show_stored(url: str) -> int:
    """Print the logs of a run in the order of attempts. Raises ObjectNotFound if there are none."""
    folder = RunFolder(url).logs
    attempts = sorted(storage.list_names(folder))
    if not attempts:
        raise ObjectNotFound(f"{folder}: no machine has written output yet; check RUN and BUCKET")
    for attempt in attempts:
        print(f"--- {output.visible(attempt)}")
        for events, problems in journal.stream(storage.join(folder, attempt)):
            hide = secrets.scrubber()  # `scrub` would read the environment for each line, which takes most of the time
            sys.stdout.write("".join(_shown(event, hide) + "\n" for event in events))
            for problem in problems:
                print(f"warning: {output.visible(problem)}", file=sys.stderr)
    return 0


def _shown(event: Mapping[str, Any], hide: Callable[[str], str]) -> str:
    """A stored line with its time (UTC) before it. If the line begins with a time already, none is added.

    Terminal control characters are escaped. `hide` hides secrets.
    """
    line = output.visible(hide(str(event.get("line", ""))))
    if _TIMED.match(line):
        return line
    time = timeline.moment(event.get("time"))
    return f"{datetime.datetime.fromtimestamp(time or 0, datetime.UTC):%H:%M:%S} {line}"


# --- pull ------------------------------------------------------------------------------------------------------


def pull(arguments: list[str]) -> int:
    """Download a run."""
    set_up_logging()
    if len(arguments) not in (1, 2) or not arguments[0]:
        raise ConfigError("usage: python -m launch.runs pull RUN_URL|sky/TASK.yaml [FOLDER] (make pull BUCKET=… RUN=…)")
    run_url = RunFolder(run_of(arguments[0], os.environ)).url
    folder = arguments[1] if len(arguments) == 2 else f"pulled/{name_of(run_url)}"
    for listing in range(LISTINGS):
        wanted = choose(run_url, storage.list_objects(run_url))
        try:
            for info in wanted:  # before anything is written
                local_path(info, run_url, folder)
            # The objects that identify the run come first, so that an interrupted copy is recognised too.
            marks = [info for info in wanted if info.name in IDENTITY]
            check_same_run(marks, run_url, folder)
            missing = fetch(marks, run_url, folder) + fetch(wanted, run_url, folder)
            break
        except ObjectNotFound:  # a running job has merged the objects of a journal since the listing
            if listing == LISTINGS - 1:
                raise
    steps = {match[1] for info in wanted if (match := _CHECKPOINT.search(info.uri))}
    found = f"{len(missing)} of {len(wanted)} objects fetched to {folder}"
    print(f"{run_url}: {found}; checkpoint: {', '.join(steps) or 'none yet'}")
    return 0


def name_of(run_url: str) -> str:
    """The run's name: the part after `runs/` in its URL, else the last part."""
    _, found, name = run_url.rpartition("/runs/")
    return name if found else run_url.rpartition("/")[2]


def local_path(info: ObjectInfo, run_url: str, folder: str) -> Path:
    """The path of an object's local copy. Raises DataError for a name that leads out of `folder`."""
    return untrusted.inside(Path(folder), info.uri.removeprefix(f"{run_url}/"), run_url)


def check_same_run(marks: list[ObjectInfo], run_url: str, folder: str) -> None:
    """Raises RunError if `folder` holds a copy of another run, such as a deleted run that had the same URL.

    The start object of a segment contains the time, and a run never changes or deletes it. All start objects in a copy
    must therefore be equal to the start objects of the run.
    """
    remedy = f"remove that folder, or pull into another one: python -m launch.runs pull {shlex.quote(run_url)} FOLDER"
    there = {local_path(info, run_url, folder): info for info in marks}
    places = [
        f"{below}{name}"
        for below in ("", "evaluations/", "serving/", "exports/")
        for name in ("run.json", "ledger/*/start.jsonl")
    ]
    ours = sorted(path for place in places for path in Path(folder).glob(place))
    if gone := [path for path in ours if path not in there]:
        raise RunError(f"{folder}: is a copy of another run: {run_url} has no {gone[0].relative_to(folder)}; {remedy}")
    # Only the newest start object of each ledger is compared, because there may be thousands.
    newest = {(path.name, path.parent.parent): path for path in ours}
    for path in newest.values():
        if path.read_bytes() != storage.read_bytes(there[path].uri):
            raise RunError(f"{folder}: is a copy of another run: {path} differs from {there[path].uri}; {remedy}")


def fetch(wanted: list[ObjectInfo], run_url: str, folder: str) -> list[ObjectInfo]:
    """Download the objects that `folder` lacks, and return them."""

    def path_of(info: ObjectInfo) -> Path:
        return local_path(info, run_url, folder)

    def is_there(path: Path, info: ObjectInfo) -> bool:
        return path.exists() and path.stat().st_size == info.size

    missing = [info for info in wanted if not is_there(path_of(info), info)]
    with progress("pull", sum(info.size for info in missing), "bytes") as bar, ThreadPoolExecutor(8) as pool:

        def one(info: ObjectInfo) -> None:
            path = path_of(info)
            path.parent.mkdir(parents=True, exist_ok=True)
            bar.advance(storage.download(info.uri, path))

        list(pool.map(one, missing))
    return missing


def choose(run_url: str, objects: list[ObjectInfo]) -> list[ObjectInfo]:
    """run.json, the objects of FOLDERS, and the newest complete checkpoint. Raises ObjectNotFound without run.json."""
    root = run_url.rstrip("/")
    if not any(info.uri == f"{root}/run.json" for info in objects):
        raise ObjectNotFound(f"{root}/run.json: there is no run here; check RUN and BUCKET")
    markers = [info.uri for info in objects if info.name == "COMPLETE" and info.uri.startswith(f"{root}/checkpoints/")]
    complete = sorted(match[1] for uri in markers if (match := _CHECKPOINT.search(uri)))
    prefixes = [f"{root}/{folder}/" for folder in FOLDERS]
    prefixes += [f"{root}/checkpoints/{complete[-1]}/"] if complete else []
    described = {f"{root}/run.json", f"{root}/exports/run.json"}
    return [info for info in objects if info.uri in described or info.uri.startswith(tuple(prefixes))]


if __name__ == "__main__":
    run_entry(main, shows=True)
