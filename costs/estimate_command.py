"""Runs `cost_report.py estimate TASK.yaml`: prints the expected cost of a launch."""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys

from clouds import catalog, providers
from core import bucket, figures
from core.errors import ConfigError
from core.exit_codes import FAILED, OK
from core.figures import quantity
from core.run import cache
from core.run.reader import read_run
from core.settings.training import TrainingConfig
from core.task import TaskSpec, machine_choice, read_task
from costs import discover, foreseen, render, throughput
from costs.forecast import (
    Assumptions,
    Change,
    Forecast,
    ForecastRow,
    best_change,
    describe,
    dominates,
    forecast_of,
    is_timed,
    preparation_usd,
)
from costs.plan import own as own_runs
from costs.tables import Sheet

ROWS_SHOWN = 20
USAGE = """\
Lists the offers that fit a task, with estimated hours and dollars, the cheapest first. An offer is a machine type in
one place, on spot or on demand. Notes give the source of each figure.

  python cost_report.py estimate sky/pretrain-8xa100.yaml
  python cost_report.py estimate sky/pretrain-8xa100.yaml --gpus A100:2
  python cost_report.py estimate sky/pretrain-8xa100.yaml --tokens 10e9 --like s3://bucket/runs/earlier
"""


def main(arguments: list[str]) -> int:
    """Print the forecast of a task, with a warning if it exceeds --cap (or MAX_USD). Raises ConfigError.

    Returns FAILED if the forecast exceeds --fail-over or its dollars are unknown.
    """
    options = _parser().parse_args(arguments)
    _check(options)
    task = read_task(options.task, os.environ, machine_choice(arguments))
    offers = providers.load(options.offline)
    own, said = _own_runs(options.like, task)
    assume = assumptions(options)
    rates = discover.rates_for(discover.FORECAST_BUCKET)
    forecast = forecast_of(task, offers, assume, rates, options.tokens, own)
    used = {throughput.nearest(own, row.offer, row.nodes, forecast.flops) for row in forecast.rows} - {None}
    if used:
        given = [field.name for field in dataclasses.fields(Assumptions) if getattr(options, field.name) is not None]
        own = throughput.without([own_runs.with_machine_times(each, options.offline) for each in used], given)
        forecast = forecast_of(task, offers, assume, rates, options.tokens, own)
    if not forecast.rows:
        raise ConfigError(f"{options.task}: no offer fits its resources in {offers.source}")
    change = best_change(forecast, offers, assume, rates, own)
    notes = _notes(forecast, change, assume, options.cap or _cap(task)) + _price_notes(forecast, offers, assume) + said
    if options.brief:
        print(_brief(forecast, options.cap or _cap(task)))
    elif options.json:
        print(json.dumps(_document(forecast, assume, notes), indent=1))
    elif options.markdown:
        sys.stdout.write(
            render.markdown_table(_sheet(forecast, options.all)) + "\n\n" + "".join(f"- {n}\n" for n in notes)
        )
    else:
        console = render.console()
        console.print(f"[bold]{task.name}[/bold]: {_work(forecast)}", highlight=False)
        console.print(render.terminal_table(_sheet(forecast, options.all), console.width))
        for note in notes:
            console.print(note, markup=False)
    usd = forecast.rows[0].usd
    if options.store and usd is not None:
        place = bucket.url({**os.environ, **task.envs}, "RUN")
        uri, is_new = foreseen.store(place, task.path, forecast.rows[0])
        kept = "the run has begun, and this forecast of its launch is kept"
        print(f"stored: {uri}" if is_new else f"{uri}: {kept}", file=sys.stderr)
    if options.fail_over is not None and (usd is None or usd > options.fail_over):
        said = "not known" if usd is None else f"${figures.dollars(usd)}"
        print(f"the cheapest offer is {said}, --fail-over is ${figures.dollars(options.fail_over)}", file=sys.stderr)
        return FAILED
    return OK


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for a negative number, and for a sum or an amount of work that is not above zero."""
    for name in ("tokens", "cap", "fail_over", *(field.name for field in dataclasses.fields(Assumptions))):
        value = getattr(options, name)
        above = name in ("tokens", "cap", "fail_over", "prep_bytes_per_second", "source_bytes_per_token")
        if isinstance(value, float) and not (0 < value < math.inf if above else 0 <= value < math.inf):
            what = "a number above zero" if above else "zero or a number above it"
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}, must be {what}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cost_report.py estimate", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", metavar="TASK.yaml", help="a SkyPilot task")
    parser.add_argument("--gpus", metavar="NAME:COUNT", help="use these GPUs instead of the task's")
    parser.add_argument("--num-nodes", metavar="NUMBER", help="use this number of nodes instead of the task's")
    parser.add_argument("--infra", metavar="CLOUD/REGION", help="show only offers of this cloud or region")
    parser.add_argument(
        "--tokens", type=float, help="number of tokens to train on or to prepare; default: as the task's config says"
    )
    parser.add_argument("--like", metavar="RUN_URL", help="use the measured speed and overhead of this run")
    parser.add_argument(
        "--cap", type=float, metavar="USD", help="warn if the forecast exceeds this sum; default: the task's MAX_USD"
    )
    parser.add_argument(
        "--fail-over", type=float, metavar="USD", help="exit with 1 if the forecast exceeds this sum, or is not known"
    )
    parser.add_argument(
        "--store",
        action="store_true",
        help="store the forecast of the cheapest offer with the run that BUCKET and RUN name",
    )
    parser.add_argument("--offline", action="store_true", help="use the price snapshot; do not ask SkyPilot")
    parser.add_argument("--all", action="store_true", help=f"show all offers, not only the first {ROWS_SHOWN}")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--brief", action="store_true", help="print one line about the cheapest offer")
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    add_assumptions(parser)
    return parser


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each assumption. docs/costs.md lists the assumptions."""
    group = parser.add_argument_group("assumptions", "each flag replaces a default; docs/costs.md lists them")
    for field in dataclasses.fields(Assumptions):
        flag = f"--{field.name.replace('_', '-')}"
        kind = str if isinstance(field.default, str) else float
        group.add_argument(flag, type=kind, metavar=str(field.default))


def assumptions(options: argparse.Namespace) -> Assumptions:
    """The defaults, replaced by flags of the same names (`--preemptions-per-hour 0.2`)."""
    names = [field.name for field in dataclasses.fields(Assumptions)]
    return Assumptions(**{name: value for name in names if (value := getattr(options, name)) is not None})


def _own_runs(like: str | None, task: TaskSpec) -> tuple[list[throughput.Measured], list[str]]:
    """Measurements of the run `like` or, for a training, of the runs in BUCKET. Also notes, if these cannot be read.

    Raises ConfigError if the run `like` has measured nothing.
    """
    if like is not None:
        found = throughput.measure(read_run(like, cache_file=cache.path_for(like)))
        if found is None:
            raise ConfigError(f"--like {like}: no segment of this run has trained with metrics")
        return [found], []
    if not isinstance(task.workload.config, TrainingConfig) or not os.environ.get("BUCKET"):
        return [], []
    own = own_runs.in_bucket(os.environ)
    return list(itertools.chain(*own.speeds.values())), [own.said] if own.failed else []


def _cap(task: TaskSpec) -> float | None:
    try:
        return float(task.envs.get("MAX_USD") or os.environ.get("MAX_USD") or "") or None
    except ValueError:
        return None


def _work(forecast: Forecast) -> str:
    stage = forecast.task.workload.stage or "stage ?"
    tokens = "" if is_timed(stage) else ", ? tokens"
    tokens = tokens if forecast.tokens is None else f", {quantity(forecast.tokens)} tokens"
    flops = "" if forecast.flops is None else f", {quantity(forecast.flops)} FLOPs per token"
    nodes = f", {forecast.task.nodes} nodes" if forecast.task.nodes > 1 else ""
    return f"{stage}{tokens}{flops}{nodes}; prices: {forecast.prices}"


def _brief(forecast: Forecast, cap: float | None) -> str:
    best = forecast.rows[0]
    if best.usd is None:
        return f"forecast: dollars not known; ${figures.dollars(best.usd_per_hour)} an hour on {describe(best)}"
    spread = ""
    if best.usd_low is not None and best.usd_high is not None:
        spread = f" (${figures.dollars(best.usd_low)} to ${figures.dollars(best.usd_high)})"
    above = f"; above the cap of ${cap:,.2f}" if cap is not None and best.usd > cap else ""
    return f"forecast: ${figures.dollars(best.usd)}{spread} for {best.hours:.2f} hours of {describe(best)}{above}"


def _sheet(forecast: Forecast, everything: bool) -> Sheet:
    heads = [
        "cloud",
        "region or zone",
        "instance",
        "market",
        "speed",
        "USD/h",
        "hours",
        "USD",
        "from",
        "to",
        "restarts",
    ]
    shown = forecast.rows if everything else forecast.rows[:ROWS_SHOWN]
    rows = [[*_where(row), row.kind, *_dollars(row)] for row in shown]
    left = len(forecast.rows) - len(shown)
    foot = [f"{left} more: --all", *[""] * (len(heads) - 1)] if left else ()
    spare = ("restarts", "speed", "hours", "USD/h", "cloud")
    return Sheet("Offers that fit, by expected dollars (an estimate)", heads, rows, 5, foot, spare)


def _where(row: ForecastRow) -> list[str]:
    offer = row.offer
    return [offer.cloud, offer.zone or offer.region, offer.instance_type, "spot" if row.spot else "on demand"]


def _dollars(row: ForecastRow) -> list[str]:
    hours = figures.UNKNOWN if row.hours is None else f"{row.hours:.2f}"
    amounts = [_usd(usd) for usd in (row.usd, row.usd_low, row.usd_high)]
    return [figures.dollars(row.usd_per_hour), hours, *amounts, f"{row.restarts:.2f}" if row.spot else "–"]


def _usd(usd: float | None) -> str:
    return figures.dollars(usd, figures.places_for(usd or 0.0))


def _notes(forecast: Forecast, change: Change | None, assume: Assumptions, cap: float | None) -> list[str]:
    best, workload = forecast.rows[0], forecast.task.workload
    notes = list(forecast.sources)
    if workload.problem:
        notes.append(f"the settings of the task's program are not known: {workload.problem}")
    if forecast.tokens is None and not is_timed(workload.stage):
        notes.append("the amount of work is not known, so only prices per hour are shown; give --tokens")
    elif best.usd is None:
        notes.append(
            "the machine's speed is not known, so only prices per hour are shown; give --like RUN_URL of an earlier run"
        )
    if (main_part := dominates(best)) is not None:
        parts = ", ".join(f"{name} {_usd(usd)}" for name, usd in best.parts.items() if usd >= best.usd / 1000)
        notes.append(f"dominated by {main_part} on {describe(best)}: {parts}")
    if change is not None:
        notes.append(f"the single change that would save most: {change.what}: ${_usd(change.usd)} instead")
    if best.usd is not None:
        notes.append(
            f"assumed per start: provision {assume.provision_seconds:.0f} s, image {assume.image_seconds:.0f} s, "
            f"set-up and first step {assume.setup_seconds + assume.ready_seconds:.0f} s; on spot "
            f"{assume.preemptions_per_hour:g} preemptions an hour; `--NAME VALUE` changes a value (docs/costs.md)"
        )
    if cap is not None and best.usd is not None and best.usd > cap:
        notes.append(
            f"warning: the cheapest offer is expected to cost ${figures.dollars(best.usd)}, "
            f"above the cap of ${cap:,.2f}"
        )
    return notes


def _price_notes(forecast: Forecast, offers: catalog.Catalog, assume: Assumptions) -> list[str]:
    notes = []
    spot = catalog.spot_range(row.offer for row in forecast.rows if row.spot)
    if spot and spot[0] * 1.5 < spot[1]:
        notes.append(
            f"spot prices of the offers above: lowest {spot[0]:.2f}, median {spot[1]:.2f}, highest {spot[2]:.2f}; "
            "a launch may have to pay the median instead of the lowest"
        )
    trains = bool(forecast.tokens) and forecast.task.workload.stage == "pretrain"
    prep = preparation_usd(offers, forecast.tokens, assume) if trains else None
    if prep is not None:
        offer, usd = prep
        notes.append(
            f"the dollars above do not include the preparation of these tokens; it costs about ${_usd(usd)} once, on a "
            f"{offer.instance_type} in {offer.region} (assumed: {assume.prep_bytes_per_second / 1e6:.0f} MB/s)"
        )
    return notes


def _document(forecast: Forecast, assume: Assumptions, notes: list[str]) -> dict:
    return {
        "format": "cost-estimate",
        "version": 1,
        "currency": "USD",
        "task": forecast.task.path,
        "stage": forecast.task.workload.stage,
        "tokens": forecast.tokens,
        "flops_per_token": forecast.flops,
        "prices": forecast.prices,
        "assumptions": dataclasses.asdict(assume),
        "offers": [dataclasses.asdict(row) for row in forecast.rows],
        "notes": notes,
    }
