"""Turns a sum of dollars into a budget for a run: asks `cost_report.py plan`, and looks for the tokens in the bucket.

    budget, lines = make("20", ["--deadline=6h"], environment)

The plan is made by another program (costs/plan/). This module runs that program and reads its JSON.
"""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clouds.base import Cloud
from clouds.providers import CLOUDS
from core import bucket, storage
from core.data import manifest
from core.errors import ConfigError, DataError, LauncherError
from core.figures import quantity
from core.run import course
from core.run.budget import Budget
from core.run.folder import RunFolder
from core.settings.training import PretrainConfig
from core.task import read_task

ROOT = Path(__file__).parents[1]
PREPARE = "sky/prep-data.yaml"
# The name and the tokens of the whole token set that PREPARE makes, and the pattern of names of smaller sets.
WHOLE, TOKENS_OF_WHOLE = "fineweb-edu-10bt", 9.9e9
PART = re.compile(r"fineweb-edu-\d+m\Z")
VOCABULARY = "gpt2"
VALIDATION_TOKENS = 10_485_760  # the tokens that a training run reads at each validation
# The trainer decides by MAX_USD when the learning rates fall. The plan's number of steps is only an estimate, so
# train.steps is MORE_STEPS times this number.
BY_MONEY = "--optimizer.schedule=wsd"
MORE_STEPS = 2
PLAN_SECONDS = 120.0
_MAKE_OPTIONS = {"GPUS": "--gpus", "INFRA": "--infra"}


def make(usd: str, options: Sequence[str], environment: Mapping[str, str]) -> tuple[Budget, list[str]]:
    """The budget of the first plan for a sum, and lines on what the plan buys.

    CONFIG in `environment` replaces the plan's model, TRAIN_ARGS adds settings. Raises LauncherError.
    """
    _check_clouds()
    known = _ready_tokens(environment)
    wanted = [f"--usd={usd}", *options]
    if known is not None:
        wanted.append("--prepared")
        if not environment.get("CONFIG"):  # CONFIG may be smaller than all models of a plan
            wanted.append(f"--unique-tokens={known[1]}")
    document = ask(wanted)
    plan = document["plans"][0]
    settings, tokens, forecast = _training(plan, document["loss_scale"], environment)
    data, missing = known[0] if known else "", 0
    if not known:
        data, missing = _place(tokens, environment)
    budget = Budget(
        usd=float(usd),
        machines_usd=plan["machines_usd"],
        task=plan["machine"]["task"],
        options=_sky_options(plan["machine"]["options"]),
        settings={**settings, "DATA": data} | {name: environment.get(name, "") for name in ("PREP_ARGS", "EVAL_ARGS")},
        train_tokens=missing,
        forecast=forecast,
        began_at=time.time(),
    )
    headline = document["headline"] if "loss" in forecast else f"${usd} for {settings['CONFIG']} on {_machine(plan)}"
    return budget, [headline, *_lines(plan)]


def add(base: Budget, folder: RunFolder, usd: str, environment: Mapping[str, str]) -> tuple[Budget, list[str]]:
    """A budget for another run that continues from the trunk of `folder`, on the same machine and data."""
    added = number("ADD_USD", usd)
    if not course.trunks(course.read(folder)):
        raise ConfigError(f"{folder}: its training had no cooldown, so there is no step for a new run to begin with")
    forecast, steps = dict(base.forecast), []
    if "loss" in forecast:
        fixed = [f"--{key}={forecast[key]}" for key in ("gpus", "cloud", "size", "recipe")]
        document = ask([f"--usd={base.usd + added:g}", "--prepared", *fixed])
        same = [each for each in document["plans"] if each["machine"]["spot"] == forecast["spot"]]
        if same:
            _, _, forecast = _training(same[0], document["loss_scale"], {})
            steps = [f"--train.steps={MORE_STEPS * same[0]['steps']}"]
    replaced = ("--run.branch_from=", *(["--train.steps="] if steps else []))
    kept = [each for each in base.settings["TRAIN_ARGS"].split() if not each.startswith(replaced)]
    arguments = [*kept, *steps, f"--run.branch_from={folder}@trunk", *environment.get("TRAIN_ARGS", "").split()]
    budget = replace(
        base,
        usd=added,
        machines_usd=added * base.machines_usd / base.usd,
        settings={**base.settings, "TRAIN_ARGS": " ".join(arguments)},
        train_tokens=0,
        forecast=forecast,
        began_at=time.time(),
        number=1,
    )
    return budget, [f"${added:g} more for {folder}: the new run goes on from the step before the learning rates fell"]


def ask(arguments: Sequence[str]) -> dict[str, Any]:
    """The answer of `cost_report.py plan`. Raises ConfigError with the error message of the plan."""
    command = [sys.executable, str(ROOT / "cost_report.py"), "plan", "--json", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PLAN_SECONDS)
        if done.returncode == 0:
            return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the plan was not ready in {PLAN_SECONDS:.0f} s; try `make plan`") from None
    except ValueError as error:
        raise ConfigError(f"the plan is not JSON ({error}); try `make plan`") from error
    raise ConfigError((done.stderr.strip().splitlines() or ["the plan failed"])[-1].removeprefix("error: "))


def _check_clouds() -> None:
    """Raises ConfigError if no cloud can rent a machine. `make plan` alone needs no cloud."""
    if not any(map(_may_rent, CLOUDS.values())):
        raise ConfigError(
            f"no cloud has credentials on this computer ({', '.join(CLOUDS)} were tried); set up one (docs/launch.md), "
            "or run `make plan` to see what the sum would buy"
        )


def _may_rent(cloud: Cloud) -> bool:
    try:
        return cloud.is_configured()
    except Exception:  # a cloud's library may raise any error, which SkyPilot explains better
        return True


def _training(
    plan: Mapping[str, Any], scale: str, environment: Mapping[str, str]
) -> tuple[dict[str, str], float, dict[str, Any]]:
    """The settings of the training, the number of its tokens, and the plan's forecast."""
    machine = plan["machine"]
    expected = {key: machine[key] for key in ("gpus", "cloud", "spot")} | {"parts": plan["parts"]}
    more = environment.get("TRAIN_ARGS", "").split()
    if config := environment.get("CONFIG"):
        settings = {"CONFIG": config, "TRAIN_ARGS": " ".join([BY_MONEY, *more])}
        task = read_task(machine["task"], {**environment, **settings})
        if not isinstance(task.workload.config, PretrainConfig):
            raise ConfigError(task.workload.problem or f"CONFIG is {config!r}, must be a config of pretraining")
        length = task.workload.config.train.steps * task.workload.config.batch.tokens_per_step
        return settings, float(length), expected
    flags, tokens = list(plan["flags"]), plan["tokens"]
    if plan["limited_by"] == "money":
        steps = f"--train.steps={MORE_STEPS * plan['steps']}"
        flags = [*(each for each in flags if not each.startswith("--train.steps=")), steps]
        tokens = tokens * plan["usd"] / plan["usd_spent"]
    keys = ("loss", "loss_error", "loss_best", "loss_worst", "tokens", "steps", "hours", "usd", "size", "recipe")
    forecast = expected | {key: plan[key] for key in keys} | {"loss_scale": scale}
    return {"CONFIG": plan["config"], "TRAIN_ARGS": " ".join([*flags, BY_MONEY, *more])}, tokens, forecast


# --- tokens ----------------------------------------------------------------------------------------------------


def _ready_tokens(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """(name, training tokens) of the set that DATA names, or of the whole default set if DATA is empty.

    None if the set does not exist. Raises DataError for a set that no plan can train on.
    """
    name = environment.get("DATA") or WHOLE
    url = bucket.url({**environment, "DATA": name}, "DATA")
    if not manifest.exists(url):
        return None
    found = manifest.read(url)
    if found.tokenizer.name != VOCABULARY:
        raise DataError(
            f"{url}: holds tokens of the vocabulary {found.tokenizer.name!r}, but the models of a plan read "
            f"{VOCABULARY!r}; give DATA=NAME of another set, or of one that does not exist and will be prepared"
        )
    found.split("val", url)
    return name, found.split("train", url).tokens


def _place(tokens: float, environment: Mapping[str, str]) -> tuple[str, int]:
    """The name of a set with this many tokens, and the number of tokens to prepare for it.

    The number is 0 if the set exists.
    """
    if tokens >= TOKENS_OF_WHOLE:
        tokens = TOKENS_OF_WHOLE
    else:
        ready = []
        for name in [] if environment.get("DATA") else _parts(environment):
            count = _tokens_in(bucket.url({**environment, "DATA": name}, "DATA"))
            ready += [(count, name)] if count >= tokens else []
        if ready:
            return min(ready)[1], 0
    count = math.ceil(tokens / 1e6)
    whole = tokens >= TOKENS_OF_WHOLE
    return environment.get("DATA") or (WHOLE if whole else f"fineweb-edu-{count}m"), count * 1_000_000


def _parts(environment: Mapping[str, str]) -> list[str]:
    folder = storage.join(bucket.root(environment), bucket.FOLDERS["DATA"])
    return [name for name in storage.list_names(folder) if PART.match(name)]


def _tokens_in(url: str) -> int:
    try:
        return manifest.read(url).split("train", url).tokens
    except LauncherError:
        return 0


def preparation_arguments(tokens: int) -> str:
    """The flags that prepare this many training tokens.

    If the source has no more tokens than that, there are no flags, and all documents are taken.
    """
    if tokens >= TOKENS_OF_WHOLE:
        return ""
    fraction = max(0.002, min(0.2, 1.2 * VALIDATION_TOKENS / tokens))
    return f"--data.train_tokens={tokens} --data.val_fraction={fraction:.4f}"


# --- words -----------------------------------------------------------------------------------------------------


def _lines(plan: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {usd:.2f}" for name, usd in plan["parts"].items() if usd >= 0.005)
    hourly = f"${plan['machine']['usd_per_hour']:.2f} an hour"
    return [f"by line, in dollars: {parts}", f"machine: {_machine(plan)}, {hourly}"]


def _machine(plan: Mapping[str, Any]) -> str:
    return plan["machine"]["name"]


def _sky_options(options: Sequence[str]) -> tuple[str, ...]:
    """GPUS=A100:8 → --gpus A100:8, as `make` translates it."""
    found: list[str] = []
    for option in options:
        name, _, value = option.partition("=")
        found += [_MAKE_OPTIONS[name], value]
    return tuple(found)


def number(name: str, text: str) -> float:
    """`text` as a sum in dollars. Raises ConfigError with a message that names the setting `name`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {text!r}, must be a number of dollars above zero without a currency, such as 10")
    return value


def describe_tokens(budget: Budget) -> str:
    """A sentence about the data of a budget."""
    data = budget.settings["DATA"]
    if not budget.train_tokens:
        return f"tokens: data/{data} has them"
    return f"tokens: {quantity(budget.train_tokens)} are to be prepared as data/{data}"
