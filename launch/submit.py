"""Submits a task of sky/ with settings from the environment and .env, and prints the sky command that does it.

    BUCKET=my-bucket python -m launch.submit sky/pretrain-8xa100.yaml [--dryrun] [more options of sky launch]

Each of the task's `envs` that is set here goes along as --env NAME=value, each of its `secrets` as --secret NAME: their
values come from the environment and never stand in a command line. A task with job_recovery becomes a managed job.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.console import run_entry
from core.errors import ConfigError

DOTENV = Path(".env")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("usage: python -m launch.submit sky/TASK.yaml [options of sky launch]")
    environment = with_dotenv(os.environ, DOTENV)
    path, *options = arguments
    command = sky_command(path, read_task(path), environment, revision(), options)
    print(f"$ {shlex.join(['sky', *command[1:]])}", flush=True)
    return subprocess.call(command, env={**environment})


def sky_command(
    path: str, task: Mapping[str, Any], environment: Mapping[str, str], git_revision: str, options: list[str]
) -> list[str]:
    """The sky command line. Raises ConfigError for a required setting that is empty."""
    managed = is_managed(task)
    command = [find_sky(), *(["jobs", "launch"] if managed else ["launch"])]
    command += ["--name" if managed else "--cluster", task["name"], "--yes"]
    if "--dryrun" not in options:
        command += ["--detach-run"]
    given = dict(environment)
    given.setdefault("GIT_REVISION", git_revision)
    for name, default in (task.get("envs") or {}).items():
        if given.get(name):
            command += ["--env", f"{name}={given[name]}"]
        elif default is None:
            raise ConfigError(f"{path}: {name} is required and empty; give {name}=... to make, or set it in .env")
    for name in task.get("secrets") or {}:
        if environment.get(name):
            command += ["--secret", name]
    return [*command, *options, path]


def read_task(path: str) -> dict[str, Any]:
    """A task file as plain values. Raises ConfigError."""
    try:
        task = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in Path("sky").glob("*.yaml")))
        raise ConfigError(f"{path}: no such task; there are {known}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(task, dict) or "name" not in task or "resources" not in task:
        raise ConfigError(f"{path}: is no task (name and resources are missing)")
    return task


def is_managed(task: Mapping[str, Any]) -> bool:
    return "job_recovery" in task["resources"]


def candidates(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of `resources`, each with what stands beside them."""
    resources = dict(task["resources"])
    alternatives = resources.pop("any_of", None) or resources.pop("ordered", None) or [{}]
    return [{**resources, **alternative} for alternative in alternatives]


def with_dotenv(environment: Mapping[str, str], path: Path) -> dict[str, str]:
    """`environment` over the NAME=value lines of a file, if it is there. Raises ConfigError with its line."""
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"{path}:{number}: is no NAME=value line")
        if value[:1] in ("'", '"') and value[-1:] == value[:1]:
            value = value[1:-1]
        found[name] = value
    return {**found, **environment}


def find_sky() -> str:
    """SkyPilot's command beside this Python, or the one on PATH. Raises ConfigError."""
    found = shutil.which("sky", path=str(Path(sys.executable).parent)) or shutil.which("sky")
    if not found:
        raise ConfigError("the sky command is not installed; run `make setup-launch`")
    return found


def revision() -> str:
    """The commit of the working tree, with + when it has changes; empty outside of git."""
    ask = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    run_entry(main)
