"""Asks a run that trains with schedule wsd to begin its cooldown now (make anneal RUN=…).

    python -m launch.anneal RUN_URL | sky/TASK.yaml

Writes one small object into the run's folder. The trainer looks for this object every few seconds. The cooldown takes
the usual share of the steps, or fewer steps if the dollars left under the cap pay for fewer.
"""

import os

from core import environment
from core.console import run_entry
from core.errors import ConfigError, ObjectNotFound, RunError
from core.run import course
from core.run.folder import RunFolder, read_description
from launch.runs import run_of


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError("usage: python -m launch.anneal RUN_URL|sky/TASK.yaml (make anneal BUCKET=… RUN=…)")
    environment.adopt()
    print(ask(RunFolder(run_of(arguments[0], os.environ))))
    return 0


def ask(folder: RunFolder) -> str:
    """Request the cooldown. Returns a sentence for the user.

    Raises RunError for a run that has no cooldown to begin.
    """
    try:
        config = read_description(folder)["config"]
    except ObjectNotFound as error:
        raise RunError(f"{folder}: there is no run here; check RUN and BUCKET") from error
    changes = course.read(folder)
    schedule = (config.get("optimizer") or {}).get("schedule")
    if schedule != "wsd" and not any(each.kind == "extend" for each in changes):
        raise RunError(
            f"{folder}: its optimizer.schedule is {schedule}, which fixes every learning rate from the start; "
            "only a run with optimizer.schedule=wsd can be annealed at any time"
        )
    if changes and changes[-1].is_cooldown:
        last = changes[-1]
        raise RunError(
            f"{folder}: its cooldown is decided: it begins after step {last.step} and ends at step {last.end}"
        )
    course.request_anneal(folder)
    return f"{folder}: the cooldown is requested; the run's log says when it begins (make logs)"


if __name__ == "__main__":
    run_entry(main)
