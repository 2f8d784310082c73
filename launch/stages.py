"""Defines the stages of a run with a budget: preparation, training, evaluation, export. Each is a task of sky/.

    for stage in stages(name, budget, environment):
        stage.is_done(), stage.progress(), stage.cap()

The progress of a stage is read from the bucket alone, so that any computer can go on with the run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core import bucket, storage
from core.data import manifest, sets
from core.errors import DataError, RunError
from core.run.budget import Budget
from core.run.folder import RunFolder
from core.run.model import Segment
from core.run.reader import Detail, read_run, spent_usd_at_most
from launch import plan
from launch.plan import PREPARE

EVALUATE, EXPORT_TASK = "sky/evaluate.yaml", "sky/export.yaml"
PREPARATION, TRAINING, EVALUATION, EXPORT = "preparation", "training", "evaluation", "export"
# The cap of a preparation is this multiple of its expected dollars, and at least this sum. A preparation costs only
# cents.
PREPARATION_TIMES, PREPARATION_LEAST_USD = 3.0, 0.25
# With fewer dollars than this, a machine would end before its program has begun.
LEAST_USD = 0.02
# Each stage has its own values of these variables, so a stage does not take the values of the user. USD_PER_HOUR, for
# example, is the price of the machine that trains.
_OF_STAGES = (
    "USD_PER_HOUR",
    "CONFIG",
    "TRAIN_ARGS",
    "PREP_ARGS",
    "EVAL_ARGS",
    "MAX_USD",
    "RUN",
    "DATA",
    "GPUS",
    "INFRA",
)
_ENDED = ("finished", "cap")


@dataclass(frozen=True)
class Stage:
    """A stage. `ledger` is the folder with the ledger of its machines.

    `cap` returns the dollars that MAX_USD would be if the stage were launched now. `progress` returns a number that
    grows while the stage progresses; `work` names the unit of that number. If `is_needed` is false, the next stage
    follows even if this stage fails.
    """

    name: str
    task: str
    options: tuple[str, ...]
    settings: Callable[[], Mapping[str, str]]
    ledger: str
    is_done: Callable[[], bool]
    progress: Callable[[], int]
    work: str
    cap: Callable[[], float]
    is_needed: bool = True


def stages(run: str, budget: Budget, environment: Mapping[str, str]) -> list[Stage]:
    """The stages of a run in order."""
    given = {name: value for name, value in environment.items() if name not in _OF_STAGES}
    given |= {"RUN": run, "DATA": budget.settings["DATA"]}
    folder = RunFolder(bucket.url(given, "RUN"))
    data_url = bucket.url(given, "DATA")
    found = [
        _training(budget, folder, environment.get("USD_PER_HOUR", ""), given),
        _evaluation(budget, folder, data_url, given),
        _export(budget, folder, given),
    ]
    if budget.train_tokens:
        found.insert(0, _preparation(run, budget, folder, data_url, given))
    return found


def spent(folder: RunFolder) -> float:
    """Upper bound of the dollars of all stages so far. Raises RunError if a price is unknown."""
    usd = spent_usd_at_most(folder.url)
    if usd is None:
        raise RunError(
            f"{folder}: a machine of this run has no known price, so its budget cannot be kept; see `make status`"
        )
    return usd


def last_segment(ledger: str, since: float) -> Segment | None:
    """The newest segment that started after `since` (unix time). None if there is no such segment."""
    try:
        segments = read_run(ledger, Detail.MONEY).segments
    except RunError:
        return None
    return segments[-1] if segments and (segments[-1].started_at or 0.0) >= since else None


def end_of(ledger: str, since: float) -> str:
    """The reason why the newest segment since `since` has ended.

    "" if there is no such segment, or if it has not ended.
    """
    segment = last_segment(ledger, since)
    return str((segment and segment.end and segment.end.get("reason")) or "")


def newest_step(folder: RunFolder) -> int:
    """The step of the newest complete checkpoint. 0 if there is none."""
    markers = [info.uri.split("/")[-2] for info in storage.list_objects(folder.checkpoints) if info.name == "COMPLETE"]
    return max((int(name.removeprefix("step-")) for name in markers if name.startswith("step-")), default=0)


def _preparation(run: str, budget: Budget, folder: RunFolder, data_url: str, given: Mapping[str, str]) -> Stage:
    # PREP_ARGS comes last, because later settings replace earlier settings.
    arguments = f"{plan.preparation_arguments(budget.train_tokens)} {budget.settings.get('PREP_ARGS', '')}".strip()
    cap = max(PREPARATION_LEAST_USD, PREPARATION_TIMES * _expected(budget, PREPARATION))
    cap = min(cap, budget.machines_usd / 2)
    # The preparation's folder is below the run's folder, because a node's key may be limited to the run.
    settings = {**given, "RUN": f"{run}/{PREPARATION}", "PREP_ARGS": arguments}
    parts = storage.join(data_url, "parts")
    return Stage(
        name=PREPARATION,
        task=PREPARE,
        options=(),
        settings=lambda: settings,
        ledger=folder.preparation,
        is_done=lambda: manifest.exists(data_url),
        progress=lambda: len(storage.list_names(parts)),
        work="parts",
        cap=lambda: cap,
    )


def _training(budget: Budget, folder: RunFolder, price: str, given: Mapping[str, str]) -> Stage:
    settings = {**given, **{name: budget.settings[name] for name in ("CONFIG", "TRAIN_ARGS")}, "USD_PER_HOUR": price}
    return Stage(
        name=TRAINING,
        task=budget.task,
        options=budget.options,
        settings=lambda: settings,
        ledger=folder.url,
        is_done=lambda: end_of(folder.url, budget.began_at) in _ENDED,
        progress=lambda: newest_step(folder),
        work="steps",
        # The trainer counts the cost of the preparation under this cap, so only evaluation and export are subtracted.
        cap=lambda: budget.machines_usd - _expected(budget, EVALUATION) - _expected(budget, EXPORT),
    )


def _evaluation(budget: Budget, folder: RunFolder, data_url: str, given: Mapping[str, str]) -> Stage:
    def settings() -> Mapping[str, str]:
        tasks = budget.settings.get("EVAL_ARGS") or ("" if _has_hellaswag(data_url) else "--tasks=perplexity")
        return {**given, "EVAL_ARGS": tasks}

    return Stage(
        name=EVALUATION,
        task=EVALUATE,
        options=(),
        settings=settings,
        ledger=folder.evaluations,
        is_done=lambda: end_of(folder.evaluations, budget.began_at) == "finished",
        progress=lambda: len(storage.list_objects(folder.evaluations)),
        work="objects",
        cap=lambda: budget.machines_usd - spent(folder) - _expected(budget, EXPORT),
        is_needed=False,
    )


def _export(budget: Budget, folder: RunFolder, given: Mapping[str, str]) -> Stage:
    return Stage(
        name=EXPORT,
        task=EXPORT_TASK,
        options=(),
        settings=lambda: given,
        ledger=folder.exports,
        is_done=lambda: end_of(folder.exports, budget.began_at) == "finished",
        progress=lambda: len(storage.list_objects(folder.exports)),
        work="objects",
        cap=lambda: budget.machines_usd - spent(folder),
        is_needed=False,
    )


def _expected(budget: Budget, part: str) -> float:
    """The dollars that the plan expects for a part of the bill."""
    return float(budget.forecast.get("parts", {}).get(part, 0.0))


def _has_hellaswag(data_url: str) -> bool:
    try:
        sets.info_of(data_url, "hellaswag")
        return True
    except DataError:
        return False


def in_cents(usd: float) -> str:
    """The value of MAX_USD for a cap: dollars with two decimals, rounded down."""
    return f"{math.floor(usd * 100 + 1e-6) / 100:.2f}"


def with_cap(stage: Stage) -> dict[str, str]:
    return {**stage.settings(), "MAX_USD": in_cents(stage.cap())}
