"""Writes a task file as a managed job. After a preemption, SkyPilot continues such a job on another machine.

    MANAGED=1 python -m launch.submit sky/finetune.yaml      launches .launch/finetune.yaml

Any task of sky/ can become a managed job; sky/pretrain-8xa100-spot.yaml already is one. In the written file, spot
machines come first. `job_recovery` replaces `autostop`, because a managed job ends its machines itself. Two variables
for the price of the jobs controller are added. The controller costs extra, so a managed job saves money only if the job
takes hours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError, one_line
from core.exit_codes import BAD_NODE, PREEMPTED

FOLDER = Path(".launch")
RECOVERY = {
    "strategy": "EAGER_NEXT_REGION",
    "max_restarts_on_errors": 0,
    "recover_on_exit_codes": [PREEMPTED, BAD_NODE],
}


def chosen(path: str, environment: Mapping[str, str]) -> str:
    """The path of the task file to launch: a managed copy if MANAGED is set, else `path`. Raises ConfigError."""
    if not environment.get("MANAGED"):
        return path
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a task: {one_line(error)}") from None
    if not isinstance(document, dict) or not isinstance(document.get("resources"), dict):
        raise ConfigError(f"{path}: has no resources, so it cannot become a managed job")
    if "job_recovery" in document["resources"]:
        return path
    FOLDER.mkdir(exist_ok=True)
    target = FOLDER / Path(path).name
    text = yaml.safe_dump(as_managed(document), sort_keys=False, width=1000)
    target.write_text(f"# {path} as a managed job, written by launch.managed.\n{text}", encoding="utf-8")
    return str(target)


def as_managed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The task with spot machines first, and with recovery from preemptions instead of autostop."""
    resources = dict(document["resources"])
    resources.pop("autostop", None)
    candidates = resources.pop("any_of", None) or resources.pop("ordered", None)
    if candidates:
        # For a managed job, SkyPilot 0.14.1 tries the machines in `any_of` in arbitrary order.
        resources["ordered"] = sorted(candidates, key=lambda each: not each.get("use_spot", False))
    resources["job_recovery"] = RECOVERY
    envs = {**(document.get("envs") or {}), "SUBMITTED_AT": "", "CONTROLLER_USD_PER_HOUR": ""}
    return {**document, "resources": resources, "envs": envs}
