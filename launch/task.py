"""A task file of sky/: its parts, its settings, and the sky command that launches it.

task = read_task("sky/pretrain-8xa100.yaml")
settings_of(task, os.environ)["RUN"]      gpt2-124m
"""

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError
from launch.skypilot import find_sky


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
        raise ConfigError(f"{path}: is not a task: name and resources are missing")
    return task


def is_managed(task: Mapping[str, Any]) -> bool:
    return "job_recovery" in task["resources"]


def candidates(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of `resources`, each with the settings that all of them share."""
    resources = dict(task["resources"])
    alternatives = resources.pop("any_of", None) or resources.pop("ordered", None) or [{}]
    return [{**resources, **alternative} for alternative in alternatives]


def settings_of(task: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, with the task's own values for its `envs` that are absent or empty there."""
    defaults = {name: str(value) for name, value in (task.get("envs") or {}).items() if value is not None}
    given = {name: value for name, value in environment.items() if value or name not in defaults}
    return {**defaults, **given}


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
    given["GIT_REVISION"] = given.get("GIT_REVISION") or git_revision
    given["SUBMITTED_AT"] = f"{time.time():.0f}"
    for name, default in (task.get("envs") or {}).items():
        if given.get(name):
            command += ["--env", f"{name}={given[name]}"]
        elif default is None:
            raise ConfigError(f"{path}: {name} is required and empty; give {name}=... to make, or set it in .env")
    for name in _secrets(task, environment):
        command += ["--secret", name]
    return [*command, *options, path]


def _secrets(task: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """The secrets to send. The user's own AWS keys go along only where the bucket has no keys of its own."""
    given = [name for name in task.get("secrets") or {} if environment.get(name)]
    own = any(name.startswith("BUCKET_") for name in given)
    return [name for name in given if not (own and name.startswith("AWS_"))]


def revision() -> str:
    """The commit of the working tree, with + when it has changes; empty outside of git."""
    ask = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
