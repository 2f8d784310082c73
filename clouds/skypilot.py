"""Asks SkyPilot: its command for clusters and managed jobs, and its Python package for records and prices.

    clusters()      [{"name": "pretrain-8xa100", "status": "UP", "labels": {...}, ...}, ...]
    jobs()          [{"job_id": 3, "job_name": "pretrain-8xa100-spot", "status": "RUNNING", ...}, ...]

No other module imports SkyPilot, and this one imports it only when a function needs it. If SkyPilot is not installed,
`import sky` succeeds anyway, because it finds the project's folder `sky/` of task files. `package` therefore checks
what it imported.
"""

import contextlib
import importlib
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from clouds.base import Unavailable
from core import secrets
from core.errors import ConfigError
from core.stores.aws import endpoint_of
from core.task import TaskSpec

# Time limit in seconds of a request. A server that hangs, or that a signal has stopped, accepts a request and never
# answers it.
LIST_SECONDS = 300.0
# SkyPilot 0.14.1 prints this, with exit code 1, if the jobs controller is stopped or was never started.
NO_JOBS = "No in-progress managed jobs"
# This option keeps ~/.aws/credentials off nodes on Lambda. A task that may also run on AWS is launched without the
# option, because the option would take the role away from nodes on AWS.
KEEP_AWS_FILES = ("--config", "aws.remote_identity=NO_UPLOAD")
USER_HASH = Path("~/.sky/user_hash")
# Beginnings of the final statuses of a managed job; several begin with FAILED (sky/jobs/state.py of SkyPilot).
_ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def find_sky() -> str:
    """The path of the sky command in this Python's folder or, if there is none, on PATH. Raises ConfigError."""
    found = shutil.which("sky", path=str(Path(sys.executable).parent)) or shutil.which("sky")
    if not found:
        raise ConfigError("the sky command is not installed; run `make setup-launch`")
    return found


def clusters(everyone: bool = False) -> list[dict[str, Any]]:
    """The clusters of this user, or of all users.

    Clusters of managed jobs (`is_managed`) are included if this computer keeps their records. Raises ConfigError if
    SkyPilot cannot list them.
    """
    # --verbose adds the task that a cluster was launched with.
    return listed(["status", "--verbose", *(["--all-users"] if everyone else [])])


def jobs(ended: bool = False, everyone: bool = False) -> list[dict[str, Any]]:
    """The managed jobs of this user, or of all users, the newest first. If `ended` is true, finished jobs are included.

    Raises ConfigError as `clusters` does.
    """
    options = [*([] if ended else ["--skip-finished"]), *(["--all-users"] if everyone else [])]
    found = listed(["jobs", "queue", *options], nothing=NO_JOBS)
    return sorted(found, key=lambda job: job["job_id"], reverse=True)


def user_hash(environment: Mapping[str, str]) -> str:
    """The hash by which SkyPilot tells users apart in the names of machines.

    It is "" until SkyPilot was used on this computer.
    """
    with contextlib.suppress(OSError):
        return environment.get("SKYPILOT_USER_ID") or USER_HASH.expanduser().read_text(encoding="utf-8").strip()
    return ""


def controller_name(environment: Mapping[str, str]) -> str:
    """The name of the cluster that is this user's controller of managed jobs."""
    return f"sky-jobs-controller-{user_hash(environment)}"


def variables_of(cluster: Mapping[str, Any]) -> dict[str, str]:
    """The variables of the task that a cluster was launched with, by SkyPilot's record of the cluster.

    SkyPilot 0.14.1 records the task's file unchanged. Values that `--env` replaced are only in the recorded command.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(yaml.YAMLError, AttributeError):
        envs = (yaml.safe_load(cluster.get("last_creation_yaml") or "") or {}).get("envs") or {}
        found = {str(name): str(value or "") for name, value in envs.items()}
    with contextlib.suppress(ValueError):
        words = shlex.split(cluster.get("last_creation_command") or "")
        found |= {word.partition("=")[0]: word.partition("=")[2] for flag, word in pairwise(words) if flag == "--env"}
    return found


def has_ended(job: dict[str, Any]) -> bool:
    return str(job.get("status")).startswith(_ENDED)


def listed(command: Sequence[str], nothing: str | None = None) -> list[dict[str, Any]]:
    """The records that `sky COMMAND -o json` prints.

    `nothing` is a text that SkyPilot prints if there are no records. If the command fails and its output contains this
    text, the list is empty. Raises ConfigError with SkyPilot's output if the command fails in another way, prints no
    list, or gets no answer from SkyPilot's server.
    """
    words = [find_sky(), *command, "-o", "json"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=LIST_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"`sky {' '.join(command)}` did not answer within {LIST_SECONDS:.0f} s") from None
    if done.returncode == 0 and (records := records_in(done.stdout)) is not None:
        return records
    said = _COLOUR.sub("", f"{done.stdout}\n{done.stderr}")
    if nothing and nothing in said:
        return []
    why = " ".join(said.split())[-300:] or f"it printed nothing and ended with {done.returncode}"
    raise ConfigError(f"`sky {' '.join(command)}` failed: {secrets.scrub(why)}")


def records_in(output: str) -> list[dict[str, Any]] | None:
    """The first JSON list of objects in SkyPilot's output. None if there is no such list.

    There may be colour codes and other text before the list, such as "Failed to connect ... Starting a local server."
    """
    text = _COLOUR.sub("", output)
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\[", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        if all(isinstance(record, dict) for record in found):
            return found
    return None


def launch_command(
    task: TaskSpec, environment: Mapping[str, str], git_revision: str, options: Sequence[str]
) -> list[str]:
    """The command that launches a task. Raises ConfigError for a required variable that is empty."""
    command = [find_sky(), *(["jobs", "launch"] if task.managed else ["launch"])]
    command += ["--name" if task.managed else "--cluster", task.name, "--yes"]
    if "--dryrun" not in options:
        command += ["--detach-run"]
    given = dict(environment)
    given["GIT_REVISION"] = given.get("GIT_REVISION") or git_revision
    # The node gets the endpoint in this variable, whichever variable holds it on this computer.
    given["BUCKET_ENDPOINT_URL"] = given.get("BUCKET_ENDPOINT_URL") or endpoint_of(given) or ""
    given["SUBMITTED_AT"] = f"{time.time():.0f}"
    for name in task.envs:
        if given.get(name):
            command += ["--env", f"{name}={given[name]}"]
        elif name in task.required:
            raise ConfigError(f"{task.path}: {name} is required and empty; give {name}=... to make, or set it in .env")
    for name in task.secrets:
        if environment.get(name):
            command += ["--secret", name]
    if {request.cloud for request in task.requests} == {"lambda"}:
        command += KEEP_AWS_FILES
    return [*command, *options, task.path]


def package() -> Any:
    """The SkyPilot package. Raises Unavailable if SkyPilot is not installed."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # SkyPilot's database migrations log at every import
    try:
        module = importlib.import_module("sky")
    except ImportError as error:
        raise Unavailable(f"SkyPilot is not installed ({error})") from None
    if not hasattr(module, "__version__"):
        del sys.modules["sky"]  # Python has imported the project's folder sky/ as a namespace package
        raise Unavailable("SkyPilot is not installed")
    return module


def setting(*keys: str) -> Any:
    """An entry of SkyPilot's configuration. None if there is no such entry. Raises Unavailable."""
    package()
    from sky import skypilot_config

    return skypilot_config.get_nested(keys, None)


def catalog_file(cloud: str) -> Path:
    """The file in which SkyPilot 0.14.1 keeps the prices of a cloud on this machine.

    SkyPilot replaces it when it fetches prices again.
    """
    return Path.home() / ".sky" / "catalogs" / "v8" / cloud / "vms.csv"


def catalog_rows(cloud: str) -> list[dict[str, Any]]:
    """Rows of the catalog that SkyPilot keeps on this machine for a cloud. Raises Unavailable."""
    package()
    from sky.catalog import common

    try:
        return common.read_catalog(f"{cloud}/vms.csv").to_dict("records")
    except Exception as error:  # any error of its libraries, such as network or a damaged file
        raise Unavailable(f"SkyPilot has no catalog of {cloud} ({type(error).__name__})") from error
