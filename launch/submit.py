"""Submits a task of sky/ with settings from the environment and .env, and prints the sky command.

    BUCKET=my-bucket python -m launch.submit sky/pretrain-8xa100.yaml [--no-check] [options of sky launch]

First this program runs the checks that cost nothing (launch/check.py), to find wrong settings before a machine is
rented. Then it prints the forecast of the cheapest offer and stores it with the run. The report compares this forecast
with the dollars that the run has cost. `--no-check` skips the checks and the forecast.

Each of the task's `envs` that has a value becomes `--env NAME=value`. Each of its `secrets` becomes `--secret NAME`:
SkyPilot reads the values of secrets from the environment, not from a command line. A task with job_recovery becomes a
managed job. If MANAGED=1 is set, any task becomes a managed job (launch/managed.py).

An interrupted launch is undone. A failed launch ends with a list of what is up (launch/undo.py). MAX_WAIT=MINUTES
limits the time that the launch waits for a machine (launch/waiting.py).
"""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from clouds import skypilot
from core import environment, secrets
from core.console import run_entry
from core.errors import ConfigError
from core.exit_codes import FAILED
from core.run.machine import checkout_revision
from core.stores import credentials
from core.task import TaskSpec, machine_choice, read_task
from launch import check, managed, node_prices, undo
from launch.waiting import Wait

NO_CHECK = "--no-check"
UNTIL_UP = "--retry-until-up"
FORECAST_SECONDS = 60.0
REPOSITORY = Path(__file__).parent.parent


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"usage: python -m launch.submit sky/TASK.yaml [{NO_CHECK}] [options of sky launch]")
    environment.adopt()
    credentials.inline_google_key(os.environ)  # the node has no file with the key
    path, *options = arguments
    return submit(path, options, os.environ)


def submit(path: str, options: list[str], given: Mapping[str, str]) -> int:
    """Check and launch a task with the settings of `given`. Returns the exit code.

    Secrets are read from this process's environment, because SkyPilot reads them there too. Raises ConfigError.
    """
    task = read_task(managed.chosen(path, given), given, machine_choice(options))
    options_of_sky = [option for option in options if option != NO_CHECK]
    minutes = environment.positive(given, "MAX_WAIT")
    if minutes and not task.managed and "--dryrun" not in options and UNTIL_UP not in options:
        options_of_sky.append(UNTIL_UP)
    for name, value in task.derived.items():
        print(f"{name} is {value}, as {task.envs['CONFIG']} says; give another one with {name}=...")
    given = node_prices.declared(task, {**given, **task.derived})
    command = skypilot.launch_command(task, given, checkout_revision(), options_of_sky)
    if NO_CHECK not in options and not launchable(task, {**given, **task.envs}):
        print(
            f"nothing was rented; fix this, or launch all the same with {NO_CHECK} (make: NO_CHECK=1)", file=sys.stderr
        )
        return FAILED
    if NO_CHECK not in options and "--dryrun" not in options:
        foresee(task, options, given)
    print(f"$ {secrets.scrub(shlex.join(['sky', *command[1:]]))}", flush=True)
    if "--dryrun" in options:
        return undo.run(command).code
    launch = undo.Launch(task.name, task.managed, time.time(), _cluster(task, options_of_sky))
    wait = Wait(task, minutes, launch.cluster) if minutes else None
    ended = undo.run(command, wait.goes_on) if wait and not task.managed else undo.run(command)
    if ended.signal:
        return undo.undo(launch, ended.signal)
    if ended.code:
        undo.show_rest(launch)
        return ended.code
    if wait and task.managed and not wait.for_job():
        return undo.undo(launch, signal.SIGTERM)
    more = " MANAGED=1" if os.environ.get("MANAGED") else ""
    print(f"output: make logs TASK={task.name}{more}; what runs: make status; to end it: make down")
    return 0


def launchable(task: TaskSpec, settings: Mapping[str, str]) -> bool:
    """Print the findings of the free checks that are not `ok`. Returns False if one of the findings is an `x`."""
    allowed = True
    for finding in check.all_findings(check.FREE_CHECKS, task, settings):
        allowed = allowed and finding.mark != "x"
        if finding.mark != "ok":
            print(finding, flush=True)
    return allowed


def foresee(task: TaskSpec, options: Sequence[str], given: Mapping[str, str]) -> None:
    """Print the forecast of a launch and store it with the run. If no forecast can be made, the launch goes on."""
    choice = machine_choice(options)
    machine = [f"--gpus={choice.gpus}"] if choice.gpus else []
    machine += [f"--num-nodes={choice.nodes}"] if choice.nodes else []
    machine += [f"--infra={choice.infra}"] if choice.infra else []
    command = [sys.executable, "cost_report.py", "estimate", task.path, "--store", "--brief", *machine]
    environ = {**os.environ, **given}
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=FORECAST_SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"no forecast: it took longer than {FORECAST_SECONDS:g} s", flush=True)
        return
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    line = secrets.scrub(said[-1] if said else "no answer")
    print(line if done.returncode == 0 else f"no forecast: {line}", flush=True)


def _cluster(task: TaskSpec, options: list[str]) -> str:
    """The cluster's name. It is the task's name, unless an option gives another name."""
    for flag, value in itertools.pairwise(options):
        if flag in ("--cluster", "-c"):
            return value
    return task.name


if __name__ == "__main__":
    run_entry(main)
