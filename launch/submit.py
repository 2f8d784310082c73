"""Submits a task of sky/ with settings from the environment and .env, and prints the sky command that does it.

    BUCKET=my-bucket python -m launch.submit sky/pretrain-8xa100.yaml [--no-check] [options of sky launch]

What can be looked at for nothing is looked at first (launch/check.py); a setting that the node would refuse is refused
here, before anything is rented. --no-check launches all the same. Each of the task's `envs` that is set here goes along
as --env NAME=value, each of its `secrets` as --secret NAME: their values come from the environment and never appear in
a command line. A task with job_recovery becomes a managed job.
"""

import os
import shlex
import subprocess
import sys

from core import environment
from core.console import run_entry
from core.errors import ConfigError
from core.exit_codes import FAILED
from core.stores import credentials
from launch import check
from launch.task import read_task, revision, settings_of, sky_command

NO_CHECK = "--no-check"


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"usage: python -m launch.submit sky/TASK.yaml [{NO_CHECK}] [options of sky launch]")
    environment.adopt()
    credentials.inline_google_key(os.environ)  # the node has no such file
    path, *options = arguments
    task = read_task(path)
    command = sky_command(path, task, os.environ, revision(), [each for each in options if each != NO_CHECK])
    if NO_CHECK not in options and not launchable(task, settings_of(task, os.environ)):
        print(
            f"nothing was rented; fix this, or launch all the same with {NO_CHECK} (make: NO_CHECK=1)", file=sys.stderr
        )
        return FAILED
    print(f"$ {shlex.join(['sky', *command[1:]])}", flush=True)
    return subprocess.call(command)


def launchable(task: dict, settings: dict[str, str]) -> bool:
    """Print the findings of the free checks that are not `ok`. False if one of them forbids the launch."""
    allowed = True
    for finding in check.all_findings(check.FREE_CHECKS, task, settings):
        allowed = allowed and finding.mark != "x"
        if finding.mark != "ok":
            print(finding, flush=True)
    return allowed


if __name__ == "__main__":
    run_entry(main)
