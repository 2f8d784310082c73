"""Runs the best plan for a sum of dollars: prepares the tokens, trains, evaluates, exports and reports, under one cap.

    BUCKET=my-bucket python -m launch.run --usd=20 [--deadline=6h] [--on-demand] [--gpus=NAME:COUNT] [--size=350M] ...
    BUCKET=my-bucket RUN=first python -m launch.run --add-usd=10

The first command asks `cost_report.py plan`, which takes the same options, and stores the plan in the run's folder. It
then launches one stage after the other and waits for each. Machines and managed jobs go on without this computer. After
Ctrl-C or a reboot, the same command reads the state of the run from the bucket and goes on. --add-usd trains a finished
run further. It makes another run, which begins at the last step before the learning rates of the first run fell.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from core import bucket, environment, storage
from core.console import run_entry
from core.errors import ConfigError
from core.exit_codes import FAILED
from core.run import budget as budgets
from core.run.budget import Budget
from core.run.folder import RunFolder
from core.stores import credentials
from launch import plan
from launch.drive import Driver
from launch.outcome import conclude
from launch.stages import end_of, stages
from launch.submit import NO_CHECK

USAGE = "usage: python -m launch.run --usd=SUM [options of `cost_report.py plan`], or RUN=... --add-usd=SUM (make run)"


def main(arguments: list[str]) -> int:
    environment.adopt()
    credentials.inline_google_key(os.environ)
    sums = {name: value for name in ("usd", "add-usd") if (value := _value(arguments, name)) is not None}
    options = [each for each in arguments if not each.startswith(("--usd=", "--add-usd=")) and each != NO_CHECK]
    if len(sums) != 1 or not all(each.startswith("--") for each in options):
        raise ConfigError(USAGE)
    if os.environ.get("RUN_URL") or os.environ.get("DATA_URL"):
        raise ConfigError(
            "RUN_URL and DATA_URL do not name the folders of all stages; give BUCKET, RUN and DATA instead"
        )
    if "usd" in sums:
        name, budget = _first(sums["usd"], options, os.environ)
    else:
        name, budget = _added(sums["add-usd"], os.environ)
    folder = _folder(name, os.environ)
    driver = Driver(folder, budget, arguments)
    for stage in stages(name, budget, os.environ):
        if code := driver.carry_out(stage):
            return code
    conclude(folder, budget)
    if driver.failed:
        print(f"without its {' and '.join(driver.failed)}; the same command tries again", file=sys.stderr)
        return FAILED
    return 0


def _value(arguments: Sequence[str], name: str) -> str | None:
    return next((each.partition("=")[2] for each in arguments if each.startswith(f"--{name}=")), None)


def _folder(name: str, given: Mapping[str, str]) -> RunFolder:
    return RunFolder(bucket.url({**given, "RUN": name}, "RUN"))


# --- the budget ------------------------------------------------------------------------------------------------


def _first(usd: str, options: Sequence[str], given: Mapping[str, str]) -> tuple[str, Budget]:
    """The run's name and its budget. If the run has begun, the budget is read from the bucket.

    Otherwise it comes from a new plan.
    """
    name = given.get("RUN") or f"{_short(usd)}usd"
    folder = _folder(name, given)
    known = budgets.newest(folder)
    if known is not None:
        if plan.number("USD", usd) != known.usd:
            raise ConfigError(
                f"USD is {usd}, but {folder} has begun with ${known.usd:g}; to spend more on it give ADD_USD=10 and "
                f"RUN={name}, or give another RUN for a separate run"
            )
        print(f"{folder} has begun with ${known.usd:g} and goes on", flush=True)
        return name, known
    _check_unused(folder)
    made, said = plan.make(usd, options, given)
    return name, _begin(folder, made, said)


def _added(usd: str, given: Mapping[str, str]) -> tuple[str, Budget]:
    """Name and budget of the run that goes on from RUN with more money."""
    if not given.get("RUN"):
        raise ConfigError("RUN is empty; name the run that is to go on, such as ADD_USD=10 RUN=20usd")
    base = _folder(given["RUN"], given)
    known = budgets.newest(base)
    if known is None:
        raise ConfigError(f"{base}: holds no run that `make run` has begun; check RUN and BUCKET")
    name = f"{given['RUN']}-plus-{_short(usd)}usd"
    folder = _folder(name, given)
    if (begun := budgets.newest(folder)) is not None:
        print(f"{folder} has begun with ${begun.usd:g} and goes on", flush=True)
        return name, begun
    if not end_of(base.url, known.began_at):
        raise ConfigError(f"{base}: its training has not ended; follow it by `make run USD={known.usd:g}` first")
    _check_unused(folder)
    made, said = plan.add(known, base, usd, given)
    return name, _begin(folder, made, said)


def _short(usd: str) -> str:
    """20.00 → 20, so that equal sums have one name.

    If the text is not a number, it is returned unchanged, and a later check refuses it.
    """
    try:
        return f"{float(usd):g}"
    except ValueError:
        return usd.strip()


def _check_unused(folder: RunFolder) -> None:
    if storage.exists(folder.description) or folder.segment_numbers():
        raise ConfigError(f"{folder}: holds a run that `make run` has not begun; give another RUN")


def _begin(folder: RunFolder, made: Budget, said: Sequence[str]) -> Budget:
    print(*said, plan.describe_tokens(made), f"run: {folder}", sep="\n", flush=True)
    budgets.begin(folder, made)
    return made


if __name__ == "__main__":
    run_entry(main)
