"""Runs `cost_report.py plan --usd=20`: prints the runs with the lowest expected loss for a sum of dollars."""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime

from clouds import providers
from clouds.catalog import Catalog
from core import figures, urls
from core.errors import ConfigError
from core.loss import law
from costs import discover, estimate_command, render
from costs.plan import chart, machines, own, planner, recipes, refit, stages, view
from costs.plan.machines import Wanted
from costs.plan.own import Own
from costs.plan.planner import PREPARATION, Answer, Buyer, Prices, Question

MOST_USD = 100_000.0  # above this sum, every plan already has all the tokens that it may take
USAGE = """\
Finds the machine, model size, number of tokens and recipe with the lowest expected validation loss for a sum of
dollars. The sum covers all costs: start, image, data, training, validation, checkpoints, shutdown, restarts,
storage, egress.

  python cost_report.py plan --usd=20
  python cost_report.py plan --usd=20 --deadline=6h --on-demand
  python cost_report.py plan --usd=100 --gpus=A100:8 --size=350M
  python cost_report.py plan --usd=20 --offline --json
  python cost_report.py plan --usd=20 --svg=loss-for-dollars.svg

This command rents nothing. It prints the command that carries out the best plan.
"""


def main(arguments: list[str]) -> None:
    """Print the plans for a sum. Raises LauncherError.

    If the sum is too small, the error names the smallest sum that works.
    """
    options = _parser().parse_args(arguments)
    today = datetime.now(UTC).date()
    usd = _dollars(options.usd)
    wanted = Wanted(options.on_demand, options.gpus, options.cloud, _days(options.refuse_stale))
    question = Question(
        usd,
        _share(options.reserve),
        _tokens(options.unique_tokens),
        _hours(options.deadline),
    )
    size = _one_of("--size", options.size, recipes.SIZES)
    recipe = _one_of("--recipe", options.recipe, tuple(recipes.RECIPES))
    catalog = providers.dated(options.offline)
    _check_machines(wanted, catalog)
    found, refused = machines.machines(catalog, machines.tasks(), wanted, today)
    mine = _own(options)
    assume, rates = estimate_command.assumptions(options), discover.rates_for(discover.FORECAST_BUCKET)
    prices = Prices(assume, rates, mine.speeds, stages.beside(catalog, assume, is_prepared=options.prepared))
    buyers, unable = planner.buyers(found, prices, size, recipe)
    fit = refit.refit(law.load(), mine.losses)
    fitted = fit.law

    def ask(dollars: float) -> Answer:
        return planner.plan(dataclasses.replace(question, usd=dollars), buyers, [*refused, *unable], fitted)

    answer = ask(usd)
    if not answer.plans:
        raise ConfigError(_nothing(answer, buyers))
    if options.svg:
        path = urls.local_path(options.svg, "--svg")
        try:
            path.write_text(chart.draw(chart.frontier(ask), law.SCALE), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--svg={options.svg}: cannot be written: {error.strerror}") from error
        print(f"wrote {path}", file=sys.stderr)
    losses = [*fit.notes, *view.on_own_sets(answer, fit)]
    notes = [*view.notes(answer, fitted, catalog.source, today), mine.said, *losses, *_beside(prices)]
    if options.json:
        document = view.document(answer, fitted, catalog.source, today, notes, os.environ.get("BUCKET", ""))
        print(json.dumps(document, indent=1))
    else:
        _show(answer, notes, today, _constraints(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cost_report.py plan", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--usd", default="", metavar="SUM", help="dollars for all costs, such as 20")
    add("--deadline", metavar="TIME", help="longest time from launch to shutdown: 90min, 6h, 2d")
    add("--on-demand", action="store_true", help="plan without spot machines")
    add("--gpus", metavar="NAME[:COUNT]", help="plan with these GPUs only, as in the catalog: A100-80GB:8")
    add("--cloud", metavar="NAME", help="plan with machines of this cloud only")
    add("--size", metavar="SIZE", help=f"plan this model size only: {', '.join(recipes.SIZES)}")
    add("--recipe", metavar="NAME", help=f"plan this recipe only: {', '.join(recipes.RECIPES)}")
    add(
        "--unique-tokens",
        default="10e9",
        metavar="N",
        help="number of tokens in the data set; default: 10e9, as in FineWeb-Edu 10BT",
    )
    add(
        "--prepared",
        action="store_true",
        help="leave out the preparation, because the tokens are already in the bucket",
    )
    add("--reserve", default="0.1", metavar="SHARE", help="share of the sum that the plan does not spend; default 0.1")
    add(
        "--like",
        action="append",
        default=[],
        metavar="RUN_URL",
        help="use the measured speed and overhead of this run; repeatable",
    )
    add("--refuse-stale", metavar="DAYS", help="refuse prices that are older than this number of days, or have no date")
    add("--offline", action="store_true", help="use the price snapshot, and do not read the runs in BUCKET")
    add("--svg", metavar="FILE", help="also draw loss against dollars, from $5 to $500, by machine")
    add("--json", action="store_true", help="print everything as JSON")
    estimate_command.add_assumptions(parser)
    return parser


def _show(answer: Answer, notes: Sequence[str], today: date, given: Mapping[str, str]) -> None:
    console = render.console()
    console.print(f"[bold]{view.headline(answer)}[/bold]", highlight=False)
    console.print(render.terminal_table(view.plans(answer)))
    for line in notes[: view.LEGEND]:
        console.print(line, markup=False)
    usd, bucket = answer.question.usd, os.environ.get("BUCKET", "")
    everything = view.run_command(usd, bucket, given)
    console.print("`make check` tests whether keys, quotas and the bucket allow a launch.", markup=False)
    for what, command in (
        ("To do all of plan 1 (rents machines): prepare, train, evaluate, export:", everything),
        ("To launch only its training:", view.command(answer.plans[0], usd, bucket)),
    ):
        console.print(what, markup=False)
        # The command is not printed by the console, which would break its line: the user is to copy it.
        console.file.write(f"  {command}\n")
    console.print()
    console.print(render.terminal_table(view.bill(answer, today)))
    for line in notes[view.LEGEND :]:
        console.print(line, markup=False)
    if answer.refusals:
        console.print("not planned:", markup=False)
    for line in view.refusals(answer):
        console.print(f"  {line}", markup=False)
    console.print("next (rents machines):", markup=False)  # repeated, since a terminal shows the end of a long output
    console.file.write(f"  {everything}\n")


def _constraints(options: argparse.Namespace) -> dict[str, str]:
    """The given flags that `make run` must get too, by name. A flag without a value has the value ""."""
    names = ("deadline", "gpus", "cloud", "size", "recipe", "refuse_stale")
    found = {name.replace("_", "-"): value for name in names if (value := getattr(options, name)) is not None}
    return found | ({"on-demand": ""} if options.on_demand else {})


def _beside(prices: Prices) -> list[str]:
    """Notes on costs that the dollars do not include."""
    said = ["a pushed container image is assumed (make image); without IMAGE, each node builds it, which takes longer"]
    if PREPARATION not in prices.beside:
        said.append("the tokens count as prepared, so the dollars do not include their preparation")
    return said


def _own(options: argparse.Namespace) -> Own:
    """The results of the user's own runs. The runs of --like have precedence."""
    mine = Own(said="own runs: not read (--offline)") if options.offline else own.in_bucket(os.environ)
    named = own.named(options.like)
    if not named.speeds and not named.losses:
        return mine
    seen = {each.url for each in named.losses}
    others = [each for each in mine.losses if each.url not in seen]
    return Own({**mine.speeds, **named.speeds}, [*named.losses, *others], named.said)


def _dollars(text: str) -> float:
    if not text:
        raise ConfigError("--usd is empty; give the dollars to spend, such as --usd=20 (make plan USD=20)")
    usd = _number(text)
    if usd is None or usd <= 0:
        raise ConfigError(
            f"--usd is {text!r}, must be a number of dollars above zero without a currency, such as --usd=20"
        )
    if usd > MOST_USD:
        raise ConfigError(f"--usd is {text!r}, above {MOST_USD:,.0f}; the models planned here cannot use as much")
    return usd


def _share(text: str) -> float:
    share = _number(text)
    if share is None or not 0 <= share < 1:
        raise ConfigError(f"--reserve is {text!r}, must be a share from 0 to below 1, such as 0.1")
    return share


def _tokens(text: str) -> float:
    tokens = _number(text)
    if tokens is None or tokens <= 0:
        raise ConfigError(f"--unique-tokens is {text!r}, must be a number above zero, such as 10e9")
    return tokens


def _number(text: str) -> float | None:
    """A finite number, or None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _hours(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(min|h|d)", text.strip())
    hours = float(match[1]) * {"min": 1 / 60, "h": 1.0, "d": 24.0}[match[2]] if match else 0.0
    if not hours:
        raise ConfigError(f"--deadline is {text!r}, must be a time above zero such as 90min, 6h or 2d")
    return hours


def _days(text: str | None) -> int | None:
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise ConfigError(f"--refuse-stale is {text!r}, must be a whole number of days")


def _one_of(flag: str, text: str | None, known: Sequence[str]) -> str | None:
    found = next((each for each in known if text is not None and each.lower() == text.lower()), None)
    if text is not None and found is None:
        raise ConfigError(f"{flag} is {text!r}, must be one of {', '.join(known)}")
    return found


def _check_machines(wanted: Wanted, catalog: Catalog) -> None:
    """Raises ConfigError if the catalog has no prices, or no price of a machine that meets the constraints."""
    priced = [each for each in catalog.offers if each.accelerator and (each.usd_on_demand or each.usd_spot)]
    if not priced:
        raise ConfigError(f"no machine has a price in {catalog.source}; run `sky check`, or give --offline")
    clouds = sorted({each.cloud for each in priced})
    if wanted.cloud not in (None, *clouds):
        raise ConfigError(f"--cloud is {wanted.cloud!r}, must be one of {', '.join(clouds)}")
    if wanted.gpus is None:
        return
    name, separator, count = wanted.gpus.partition(":")
    kinds = sorted({f"{each.accelerator}:{each.accelerators}" for each in priced if wanted.cloud in (None, each.cloud)})
    matches = [
        kind for kind in kinds if kind.lower() == wanted.gpus.lower() or kind.partition(":")[0].lower() == name.lower()
    ]
    if (separator and not count.isdecimal()) or not (
        any(kind.lower() == wanted.gpus.lower() for kind in matches) if separator else matches
    ):
        raise ConfigError(f"--gpus is {wanted.gpus!r}, must be one of {', '.join(matches or kinds)}, or a name alone")


def _nothing(answer: Answer, buyers: Sequence[Buyer]) -> str:
    """A sentence with the reason why no plan is possible."""
    question = answer.question
    if answer.least is not None and answer.least[0] > question.usd:
        usd, what = answer.least
        least = f"the least that works is ${math.ceil(usd * 100) / 100:.2f}: {what}"
        return f"--usd={question.usd:g} is less than any plan here needs; {least}"
    fastest = min(buyers, key=lambda each: each.hours.at(each.least_tokens), default=None)
    if fastest and question.deadline_hours is not None:
        hours = fastest.hours.at(fastest.least_tokens)
        if hours > question.deadline_hours:
            shortest = f"the shortest takes {math.ceil(hours * 60)}min, on {fastest.machine.name}"
            return f"--deadline: no run here is as short; {shortest}"
    reasons = Counter(each.why for each in answer.refusals).most_common(1)
    if not reasons:
        return "no plan is possible; no machine with GPUs meets --gpus, --cloud and --on-demand together"
    why, count = reasons[0]
    return f"no plan is possible; {count} of {figures.counted(len(answer.refusals), 'machine')}: {why}"
