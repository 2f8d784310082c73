"""Shows a plan in words, tables and JSON: the machine, the model, the dollars, and the command to type."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from core import figures
from core.figures import quantity
from core.loss import law
from core.loss.law import Law
from costs.plan import recipes
from costs.plan.machines import STALE_DAYS, Machine
from costs.plan.planner import EVALUATION, EXPORT, PREPARATION, RESERVE, Answer, Plan
from costs.plan.refit import Refit
from costs.tables import Sheet

ROWS = 3
# The names of a plan's parts as tables print them, for a reader who does not know the documents.
PARTS = {
    "provision": "start of the machine",
    "image": "container image",
    "ready": "set-up, first data, compilation",
    "train": "training",
    "eval": "validation",
    "eval, sample, checkpoint, wait": "validation, samples, checkpoints",
    "checkpoint": "checkpoints",
    "idle until down": "upload and shutdown",
    "restarts and lost work": "restarts and lost work (spot)",
    "jobs controller": "SkyPilot's jobs controller",
    "storage": "storage, the first month",
    "egress": "data to another cloud",
    PREPARATION: "preparation of the tokens, once",
    EVALUATION: "evaluation",
    EXPORT: "export",
    RESERVE: "reserve, spent only if needed",
}
# A task that is not in this table is launched by `make pretrain TASK=…`.
_TARGETS = {"pretrain-8xa100": "make pretrain", "pretrain-8xa100-spot": "make pretrain-spot"}


def command(each: Plan, usd: float, bucket: str = "") -> str:
    """The command that launches a plan."""
    task = Path(each.machine.task).stem
    run = f"{each.candidate.recipe}-{each.candidate.size.lower()}-{usd:g}usd"
    words = [_TARGETS.get(task, f"make pretrain TASK={task}"), f"BUCKET={shlex.quote(bucket or 'my-bucket')}"]
    words += [f"RUN={run}", *each.machine.options, f"CONFIG={each.candidate.config}"]
    words += [f"MAX_USD={each.cap_usd:.2f}", f"TRAIN_ARGS={shlex.quote(' '.join(each.flags))}"]
    return " ".join(words)


def run_command(usd: float, bucket: str, constraints: Mapping[str, str]) -> str:
    """The command that carries out all stages of plan 1. `constraints` are the flags of the question, by name."""
    names = {"gpus": "GPUS", "deadline": "DEADLINE", "on-demand": "ON_DEMAND", "size": "SIZE", "cloud": "CLOUD"}
    words = [f"BUCKET={shlex.quote(bucket or 'my-bucket')}"]
    if constraints.keys() <= names.keys():
        words += [f"{names[name]}={shlex.quote(value or '1')}" for name, value in constraints.items()]
        return " ".join(["make run", f"USD={usd:g}", *words])
    flags = [shlex.quote(f"--{name}={value}" if value else f"--{name}") for name, value in constraints.items()]
    return " ".join([*words, ".venv-launch/bin/python -m launch.run", f"--usd={usd:g}", *flags])


def headline(answer: Answer) -> str:
    best = answer.plans[0]
    model = f"a {best.candidate.size} model ({quantity(best.candidate.parameters)} parameters, embeddings included)"
    time = figures.duration(best.hours * 3600)
    sum_said = f"${figures.dollars(best.usd)} of ${figures.dollars(answer.question.usd)}"
    if best.limit == "money":
        sum_said = f"${figures.dollars(answer.question.usd)}"
    return (
        f"{sum_said} buys {model} trained on {quantity(best.tokens)} tokens, in {time} on "
        f"{best.machine.name}: validation loss {best.loss:.2f} expected, in the range {_losses(best)}"
    )


def plans(answer: Answer) -> Sheet:
    heads = ["", "machine", "hours", "model", "tokens", "loss", "range", "USD"]
    rows = [_row(number, each, answer) for number, each in enumerate(answer.plans[:ROWS], 1)]
    return Sheet("Best plans by expected loss, one per machine (estimates)", heads, rows, 2)


def _row(number: int, each: Plan, answer: Answer) -> list[str]:
    mark = "=" if number <= answer.equal and answer.equal > 1 else ""
    return [
        f"{number}{mark}",
        each.machine.name,
        f"{each.hours:.1f}",
        _model(each),
        quantity(each.tokens),
        f"{each.loss:.2f} ± {each.error:g}" + (" (extrapolated)" if each.is_extrapolated else ""),
        _losses(each),
        figures.dollars(each.usd),
    ]


def _losses(each: Plan) -> str:
    worst = figures.UNKNOWN if each.worst is None else f"{each.worst:.2f}"
    return f"{each.best:.2f}-{worst}"


def _model(each: Plan) -> str:
    return f"{each.candidate.size} {each.candidate.recipe}"


def _range(machine: Machine) -> str:
    usd = figures.dollars(machine.usd)
    return usd if machine.low == machine.high else f"{usd} ({machine.low:.2f}-{machine.high:.2f})"


def _seen(machine: Machine, today: date) -> str:
    if machine.priced is None:
        return "no date"
    return f"{machine.priced}" + (", old" if machine.is_old(today) else "")


def bill(answer: Answer, today: date) -> Sheet:
    """A table with a column per plan: prices of its machine, next best model, and dollars by part with their sum."""
    shown = answer.plans[:ROWS]
    columns = [_rounded(each) for each in shown]
    others = [answer.others.get(each.machine.name) for each in shown]
    rows = [
        ["USD per hour", *(_range(each.machine) for each in shown)],
        ["price seen on", *(_seen(each.machine, today) for each in shown)],
        ["next best model on it", *(f"{_model(each)}, {each.loss:.2f}" if each else "–" for each in others)],
    ]
    for name in PARTS:
        if any(name in column for column in columns):
            rows.append([PARTS[name], *(figures.dollars(c[name]) if name in c else "–" for c in columns)])
    foot = ["all in", *(figures.dollars(each.usd) for each in shown)]
    heads = ["", *(f"plan {number + 1}" for number in range(len(shown)))]
    return Sheet("The same plans in dollars", heads, rows, 1, foot)


def _rounded(each: Plan) -> dict[str, float]:
    amounts = figures.apportion(list(each.parts.values()), 2, each.usd)
    return {name: amount or 0.0 for name, amount in zip(each.parts, amounts, strict=True)}


def refusals(answer: Answer) -> list[str]:
    """One line per reason. It names all machines and models that are refused for this reason."""
    by_reason: dict[str, list[str]] = {}
    for each in answer.refusals:
        by_reason.setdefault(each.why, []).append(each.what)
    return [f"{'; '.join(what)}: {why}" for why, what in by_reason.items()]


LEGEND = 3  # number of notes at the beginning that explain the columns and the prices


def notes(answer: Answer, found: Law, prices: str, today: date) -> list[str]:
    """Notes on how far to trust the figures. The first LEGEND notes explain the table of plans.

    `prices` is the source of the prices.
    """
    shown = answer.plans[:ROWS]
    said = [
        f"loss: expected validation loss on {law.SCALE}, in nats per token; lower is better, and a public GPT-2 124M "
        "reached 3.27 after 10B tokens. Your run is validated on FineWeb-Edu, whose losses are on another scale, "
        "and no conversion is known: use these losses to compare plans. "
        f"±: error of the scaling law that predicts them (fitted {found.date})",
        f"range: loss for ${answer.question.usd:g} if prices, speeds and preemptions are all the best or all the worst "
        "known ones, with the error of the law",
        _prices(prices, any(each.machine.is_old(today) for each in shown)),
    ]
    if answer.equal > 1:
        plans = f"the first {answer.equal} plans" if answer.equal <= ROWS else f"{answer.equal} plans"
        said.append(f"=: {plans} differ by less than their errors; they are ordered by dollars, then by risk")
    if len(answer.plans) > ROWS:
        following = answer.plans[ROWS]
        name = f"{following.machine.name}, {following.candidate.size} {following.candidate.recipe}"
        more = len(answer.plans) - ROWS - 1
        worst = max(each.loss for each in answer.plans[ROWS:])
        rest = f"; {more} more machines up to loss {worst:.2f}" if more else ""
        said.append(f"runner-up: {name}, loss {following.loss:.2f}{rest} (--json has all)")
    used = dict.fromkeys(each.candidate.recipe for each in shown)
    said += [line for recipe, line in recipes.known_to(found).items() if recipe in used]
    untuned = [each for each in shown if each.candidate.recipe == "speedrun" and each.candidate.size != "124M"]
    for size, k in dict.fromkeys((each.candidate.size, each.k) for each in untuned):
        said.append(
            f"speedrun at {size}: the recipe was published at 124M; its rates are not tuned at this size, and its "
            f"multiplier is taken as {k:.2f}"
        )
    said += [_limited(number, each) for number, each in enumerate(shown, 1) if each.limit != "money"]
    risk = [f"plan {number} {each.restarts:.1f}" for number, each in enumerate(shown, 1) if each.machine.spot]
    if risk:
        said.append(f"spot machines may be taken away; restarts expected: {', '.join(risk)}")
    said.append(
        f"reserve: {100 * answer.question.reserve:g} % is kept back and is spent only if the run costs more than "
        "expected; without it, MAX_USD would end such a run before its learning rate has fallen; --reserve changes it"
    )
    return said + sorted({each.speed.source for each in shown})


def _prices(source: str, is_old: bool) -> str:
    if not is_old:
        return f"prices: {source}"
    return (
        f"prices: {source}. Some have no date or are older than {STALE_DAYS} days, so they may be wrong; "
        f"--refuse-stale={STALE_DAYS} leaves them out"
    )


def on_own_sets(answer: Answer, fit: Refit) -> list[str]:
    """The expected losses of the shown plans, converted to the token sets of the user's own runs."""
    said = []
    for url, (offset, error) in fit.offsets.items():
        where = "/".join(url.rstrip("/").split("/")[-2:])
        losses = [
            f"plan {number} {each.loss + offset:.2f} ± {(each.error**2 + error**2) ** 0.5:.2f}"
            for number, each in enumerate(answer.plans[:ROWS], 1)
        ]
        said.append(f"own losses: expected on {where}: {', '.join(losses)}")
    return said


def _limited(number: int, each: Plan) -> str:
    why = "the deadline ends it" if each.limit == "deadline" else "it has all the tokens that it may take"
    return f"plan {number}: {why}, so that ${figures.dollars(each.usd)} are enough"


def document(answer: Answer, found: Law, source: str, today: date, said: Sequence[str], bucket: str) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "format": "cost-plan",
        "version": 1,
        "currency": "USD",
        "date": today.isoformat(),
        "question": dataclasses.asdict(answer.question),
        "headline": headline(answer),
        "loss_scale": law.SCALE,
        "law": {"date": found.date, "constants": dict(found.constants)},
        "prices": source,
        "equal": answer.equal,
        "plans": [_plain(each, answer, bucket) for each in answer.plans],
        "refused": [dataclasses.asdict(each) for each in answer.refusals],
        "notes": list(said),
    }


def _plain(each: Plan, answer: Answer, bucket: str) -> Mapping[str, Any]:
    machine, candidate = each.machine, each.candidate
    other = answer.others.get(machine.name)
    return {
        "machine": {
            "name": machine.name,
            "cloud": machine.offer.cloud,
            "region": machine.offer.region,
            "instance_type": machine.offer.instance_type,
            "gpus": machine.gpus,
            "spot": machine.spot,
            "usd_per_hour": machine.usd,
            "usd_per_hour_low": machine.low,
            "usd_per_hour_high": machine.high,
            "priced": machine.priced and machine.priced.isoformat(),
            "task": machine.task,
            "options": list(machine.options),
        },
        "recipe": candidate.recipe,
        "size": candidate.size,
        "parameters": candidate.parameters,
        "non_embedding": candidate.non_embedding,
        "multiplier": each.k,
        "tokens": each.tokens,
        "steps": each.steps,
        "hours": each.hours,
        "usd": each.usd,
        "usd_spent": each.spent,
        "parts": dict(each.parts),
        "restarts": each.restarts,
        "loss": each.loss,
        "loss_error": each.error,
        "loss_best": each.best,
        "loss_worst": each.worst,
        "extrapolated": each.is_extrapolated,
        "limited_by": each.limit,
        "speed": {"tokens_per_second": each.speed.expected, "kind": each.speed.kind, "source": each.speed.source},
        "max_usd": each.cap_usd,
        "machines_usd": each.machines_usd,
        "config": candidate.config,
        "flags": list(each.flags),
        "command": command(each, answer.question.usd, bucket),
        "next_size": other and {"size": other.candidate.size, "recipe": other.candidate.recipe, "loss": other.loss},
    }
