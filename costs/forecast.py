"""Forecasts the cost of a task on each offer that fits it, from offers and assumptions alone.

forecast = forecast_of(task, catalog, Assumptions(), rates)
forecast.rows[0].usd
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from clouds import aws
from clouds.base import Offer
from clouds.catalog import Catalog, fits
from core import figures
from core.settings.model import flops_per_token, parameters
from core.settings.preparation import FetchConfig, PrepConfig
from core.settings.training import TrainingConfig
from core.settings.tuning import FinetuneConfig
from core.task import MachineRequest, TaskSpec, Workload
from costs import throughput
from costs.model import StorageRates
from costs.throughput import Measured, Throughput

BYTES_PER_TOKEN = 2  # uint16 shards
BYTES_PER_PARAMETER_SAVED = 12  # fp32 weights and two AdamW moments
# A forward pass is a third of a training step: 2 of 6 FLOPs per parameter and token.
EVAL_SPEEDUP = 3.0
UNSAID_IDLE_SECONDS = 600.0
_WORK_PHASE = {
    "prep": "prepare",
    "evaluate": "eval",
    "image": "build",
    "synthesize": "sample",
    "export": "export",
    "serve": "serve",
}
# Stages that take the same time on any machine. For each stage: the field of Assumptions that holds its seconds, and a
# description.
_TIMED = {
    "image": ("build_seconds", "building both images"),
    "synthesize": ("synthesize_seconds", "waiting for an endpoint's answers, without the endpoint's own price"),
    "export": ("export_seconds", "loading, converting and storing the weights"),
    "serve": ("serve_seconds", "serving"),
}


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a forecast. If a figure was measured, a comment names the measurement."""

    provision_seconds: float = 150.0  # instance boot, and SkyPilot's set-up (30-40 s on a prepared image)
    image_seconds: float = 180.0  # pull of a CUDA image of some 6 GB compressed
    setup_seconds: float = 30.0
    ready_seconds: float = 90.0  # imports, first shards, torch.compile, restore
    shutdown_seconds: float | None = None  # idle time until shutdown; None: the task's autostop, else 10 minutes
    checkpoint_blocked_seconds: float = 0.3  # measured with 124M: 0.25-0.33 s for the first save, 0.1 s for later saves
    preemptions_per_hour: float = 0.25  # of spot machines, as in checkpoint.expected_hours_between_failures (4 h)
    prep_bytes_per_second: float = 100e6  # speed of download and upload, which run in parallel; encoding is faster
    source_bytes_per_token: float = 2.8  # sample-10BT of FineWeb-Edu: about 28 GB of parquet for 10B tokens
    epoch_tokens: float = 5e6  # one pass over a set of conversations as large as Alpaca (52,002 conversations)
    evaluate_tokens: float = (
        25e6  # tokens in the validation set of sample-10BT (0.2 %), and in HellaSwag's 40,168 endings with context
    )
    build_seconds: float = 1800.0  # build of both images on 8 cores
    synthesize_seconds: float = 3600.0
    export_seconds: float = 300.0
    serve_seconds: float = 3600.0
    storage_months: float = 1.0
    controller_usd_per_hour: float = 0.2  # SkyPilot's jobs controller, 4 vCPUs on AWS; only a plan counts it
    bucket_cloud: str = aws.Aws.name


@dataclass(frozen=True)
class ForecastRow:
    """One offer and its forecast. `parts` are dollars that add up to `usd`. `usd` is None if the speed is unknown."""

    offer: Offer
    spot: bool
    nodes: int
    usd_per_hour: float
    hours: float | None = None
    usd: float | None = None
    usd_low: float | None = None
    usd_high: float | None = None
    restarts: float = 0.0
    kind: str = "?"
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """A workload on one offer: `amount` tokens at `rate` tokens/s.

    For a stage in _TIMED, `amount` is a number of seconds, and `rate` is the factor by which the stage may be faster.
    """

    workload: Workload
    amount: float
    rate: Throughput

    @property
    def training(self) -> TrainingConfig | None:
        return self.workload.config if isinstance(self.workload.config, TrainingConfig) else None


@dataclass(frozen=True)
class Forecast:
    """Offers that fit a task, the cheapest first. `others` do not fit the task but could do the same work."""

    task: TaskSpec
    tokens: float | None
    flops: float | None
    rows: list[ForecastRow]
    others: list[ForecastRow]
    sources: list[str]
    prices: str


def forecast_of(
    task: TaskSpec,
    catalog: Catalog,
    assume: Assumptions,
    rates: StorageRates | None,
    tokens: float | None = None,
    own: Sequence[Measured] = (),
) -> Forecast:
    """The forecast of a task. Measurements of the user's `own` runs are preferred to published and assumed values."""
    workload = task.workload
    sources = {f"assumed: {workload.assumed}"} if workload.assumed else set()
    if tokens is None:
        tokens = _tokens(workload, assume)
        if workload.stage == "evaluate" or _epochs(workload):
            sources.add(f"assumed: {tokens:,.0f} tokens; give --tokens")
    if assume.shutdown_seconds is None:
        idle = task.idle_seconds
        assume = dataclasses.replace(assume, shutdown_seconds=UNSAID_IDLE_SECONDS if idle is None else idle)
    flops = _flops_per_token(workload)
    timed = getattr(assume, _TIMED[workload.stage][0]) if workload.stage in _TIMED else None

    def row(offer: Offer, spot: bool) -> ForecastRow:
        found = ForecastRow(offer, spot, task.nodes, (offer.usd_spot if spot else offer.usd_on_demand) * task.nodes)
        measured = throughput.nearest(own, offer, task.nodes, flops)
        if timed:
            rate = Throughput(0.5, 1.0, 2.0, "assumed", f"{_TIMED[workload.stage][1]}: {timed:.0f} s, assumed")
        elif not tokens:
            return found
        elif workload.stage == "prep":
            source = BYTES_PER_TOKEN if isinstance(workload.config, FetchConfig) else assume.source_bytes_per_token
            each = assume.prep_bytes_per_second / source * task.nodes
            said = f"preparation: limited by the network, at {assume.prep_bytes_per_second / 1e6:.0f} MB/s per node"
            rate = Throughput(each / 2, each, each * 2, "assumed", f"{said}, assumed")
        else:
            rate = throughput.rate_of(offer, task.nodes, flops, measured)
        if rate is None:
            return found
        sources.add(rate.source)
        if workload.stage == "evaluate" and rate.kind != "measured":
            rate = rate.times(EVAL_SPEEDUP)
        return price(found, Effort(workload, timed or tokens, rate), assume, rates, measured)

    fitting = [(offer, request.spot) for request in task.requests for offer in catalog.offers if fits(offer, request)]
    rows = sorted(_merged(row(offer, spot) for offer, spot in dict.fromkeys(fitting)), key=_by_dollars)
    named = sorted(sources)
    other = [pair for pair in _alternatives(task, catalog) if pair not in set(fitting)]
    others = sorted((row(offer, spot) for offer, spot in other), key=_by_dollars)
    return Forecast(task, tokens, flops, rows, others, named, catalog.source)


def is_timed(stage: str | None) -> bool:
    """Whether the time of a stage is an assumption that does not depend on a number of tokens."""
    return stage in _TIMED


def _flops_per_token(workload: Workload) -> float | None:
    """FLOPs of a training step per token, including the forward pass of a teacher. None if no model is known."""
    teacher = flops_per_token(workload.teacher) / EVAL_SPEEDUP if workload.teacher else 0.0
    return flops_per_token(workload.model) + teacher if workload.model else None


def _tokens(workload: Workload, assume: Assumptions) -> float | None:
    """The number of tokens for which the settings ask, or None if it is unknown."""
    settings = workload.config
    if isinstance(settings, PrepConfig):
        return float(settings.data.train_tokens) or _tokens_of_source(settings.source.place)
    if isinstance(settings, FetchConfig):
        return _tokens_of_shards(settings.source.train_url)
    if workload.stage == "evaluate":
        return assume.evaluate_tokens
    if not isinstance(settings, TrainingConfig):
        return None
    epochs = _epochs(workload)
    if settings.train.epochs and not epochs:
        return None  # only the data's manifest has the number of tokens in a pass
    return epochs * assume.epoch_tokens if epochs else float(settings.train.steps) * settings.batch.tokens_per_step


def _epochs(workload: Workload) -> float:
    """Number of passes over data of unknown size. It is 0 if the settings give a number of steps."""
    return workload.config.train.epochs if isinstance(workload.config, FinetuneConfig) else 0.0


def _eval_tokens(train: TrainingConfig, assume: Assumptions) -> float:
    """Tokens of one validation. Fine-tuning validates on a fraction of its conversations."""
    held_out = getattr(train.data, "val_fraction", None)
    return train.train.eval_tokens if held_out is None else held_out * assume.epoch_tokens


def price(
    row: ForecastRow, effort: Effort, assume: Assumptions, rates: StorageRates | None, measured: Measured | None
) -> ForecastRow:
    """The row with the hours and dollars of a workload on its offer.

    Hours and dollars are linear in the amount of work.
    """
    parts, restarts = _parts(row, effort, effort.rate.expected, assume, measured)
    others = _other_usd(row, effort, assume, rates)
    slow, _ = _parts(row, effort, effort.rate.low, assume, measured, unlucky=2.0)
    fast, _ = _parts(row, effort, effort.rate.high, assume, measured, unlucky=0.0)
    per_second = row.usd_per_hour / 3600
    fixed = sum(others.values())
    return dataclasses.replace(
        row,
        hours=sum(parts.values()) / 3600,
        usd=sum(parts.values()) * per_second + fixed,
        usd_low=sum(fast.values()) * per_second + fixed,
        usd_high=sum(slow.values()) * per_second + fixed,
        restarts=restarts,
        kind=effort.rate.kind,
        parts={name: seconds * per_second for name, seconds in parts.items()} | others,
    )


def _parts(
    row: ForecastRow, effort: Effort, speed: float, assume: Assumptions, measured: Measured | None, unlucky: float = 1.0
) -> tuple[dict[str, float], float]:
    """Seconds of machine time by phase, and the expected restarts. `unlucky` multiplies the preemptions."""
    work = effort.amount / speed
    same = measured is not None and measured.instance_type == row.offer.instance_type
    imports = 0.0 if effort.workload.stage in ("prep", "image") else assume.ready_seconds
    ready = measured.ready_seconds if same else assume.setup_seconds + imports
    # The start that was measured on a run includes the pull of the image.
    image = 0.0 if effort.workload.stage == "image" or same else assume.image_seconds
    provision, shutdown = assume.provision_seconds, assume.shutdown_seconds or 0.0
    if same and measured.provision_seconds is not None:
        provision = measured.provision_seconds
    if same and measured.shutdown_seconds is not None:
        shutdown = measured.shutdown_seconds
    parts = {"provision": provision, "image": image, "ready": ready}
    parts[_WORK_PHASE.get(effort.workload.stage, "train")] = work
    train = effort.training
    interval = _checkpoint_seconds(train, speed) if train else 0.0
    if same:
        parts["eval, sample, checkpoint, wait"] = work * measured.overhead_share
    elif train:
        steps = effort.amount / train.batch.tokens_per_step
        if train.train.eval_every:
            evaluated = steps / train.train.eval_every * _eval_tokens(train, assume)
            parts["eval"] = evaluated / (speed * EVAL_SPEEDUP)
        parts["checkpoint"] = work / interval * assume.checkpoint_blocked_seconds
    parts["idle until down"] = shutdown
    restarts = assume.preemptions_per_hour * unlucky * sum(parts.values()) / 3600 if row.spot else 0.0
    if restarts:
        start = provision + image + ready
        parts["restarts and lost work"] = restarts * (start + interval / 2)
    return {name: seconds for name, seconds in parts.items() if seconds}, restarts


def _checkpoint_seconds(train: TrainingConfig, speed: float) -> float:
    """Seconds of training between checkpoints.

    If the settings do not fix this interval, it is the longest interval that the trainer may choose.
    """
    every = train.checkpoint.every_steps
    return every * train.batch.tokens_per_step / speed if every else train.checkpoint.max_lost_seconds


def _other_usd(row: ForecastRow, effort: Effort, assume: Assumptions, rates: StorageRates | None) -> dict[str, float]:
    """Dollars that are not machine time: storage of the objects, and egress of the tokens to another cloud."""
    if rates is None or effort.workload.stage in _TIMED:
        return {}
    moved = effort.amount * BYTES_PER_TOKEN
    stored = 0.0 if effort.workload.stage == "evaluate" else moved
    if effort.training and effort.workload.model:
        size = parameters(effort.workload.model) * BYTES_PER_PARAMETER_SAVED
        stored += (effort.training.checkpoint.keep_last + effort.training.checkpoint.keep_best) * size
    found = {"storage": stored / 1e9 * rates.usd_per_gb_month * assume.storage_months}
    if effort.workload.stage != "prep" and row.offer.cloud != assume.bucket_cloud:
        found["egress"] = moved / 1e9 * rates.usd_per_gb_egress
    return found


def _tokens_of_source(place: str) -> float | None:
    """Tokens of a sample of FineWeb, from its name: sample/10BT and sample-10BT have about 10 billion GPT-2 tokens."""
    match = re.search(r"\bsample[/-](\d+)BT/", place)
    return float(match.group(1)) * 1e9 if match else None


def _tokens_of_shards(pattern: str) -> float | None:
    """Tokens of A. Karpathy's shards of FineWeb-Edu, of 100 million each, from the pattern of their names.

    "edu_fineweb_train_0000??.bin" names 99 shards, because number 0 is the validation set.
    """
    match = re.search(r"/edu_fineweb_train_(\d*)(\?+)\.bin$", pattern)
    return (10 ** len(match.group(2)) - 1) * 1e8 if match else None


def preparation_usd(catalog: Catalog, tokens: float, assume: Assumptions) -> tuple[Offer, float] | None:
    """The cheapest on-demand machine with at least 8 vCPUs, and the dollars for preparing the tokens on it once."""
    fit = [
        offer for offer in catalog.offers if fits(offer, MachineRequest(cloud=assume.bucket_cloud, cpus=(8.0, True)))
    ]
    if not fit:
        return None
    offer = min(fit, key=lambda each: each.usd_on_demand)
    rate = assume.prep_bytes_per_second / assume.source_bytes_per_token
    effort = Effort(Workload("prep", None), tokens, Throughput(rate, rate, rate, "assumed", ""))
    parts, _ = _parts(ForecastRow(offer, False, 1, offer.usd_on_demand), effort, rate, assume, None)
    return offer, sum(parts.values()) / 3600 * offer.usd_on_demand


def _alternatives(task: TaskSpec, catalog: Catalog) -> Iterable[tuple[Offer, bool]]:
    """Pairs (offer, whether on spot) of all machines with GPUs, which could do the work of a task with GPUs.

    For a task without GPUs, they are the pairs of machines without GPUs that have at least as many vCPUs.
    """
    gpu_work = any(request.accelerator for request in task.requests)
    least = min((request.cpus[0] for request in task.requests if request.cpus), default=0.0)
    for offer in catalog.offers:
        if bool(offer.accelerator) != gpu_work or (not gpu_work and (offer.vcpus or 0.0) < least):
            continue
        for spot, price in ((False, offer.usd_on_demand), (True, offer.usd_spot)):
            if price is not None:
                yield offer, spot


def _merged(rows: Iterable[ForecastRow]) -> list[ForecastRow]:
    """`rows` without duplicates. On-demand offers cost the same in all zones of a region, so they become one row."""
    found: dict[object, ForecastRow] = {}
    for row in rows:
        zone = row.offer.zone if row.spot else None
        key = (row.offer.cloud, row.offer.region, zone, row.offer.instance_type, row.spot, row.usd_per_hour)
        found.setdefault(key, dataclasses.replace(row, offer=dataclasses.replace(row.offer, zone=zone)))
    return list(found.values())


def _by_dollars(row: ForecastRow) -> tuple[bool, float]:
    """The sort key: rows by expected dollars, then rows without expected dollars by price per hour."""
    return row.usd is None, row.usd_per_hour if row.usd is None else row.usd


@dataclasses.dataclass(frozen=True)
class Change:
    """One change to a task, and the expected dollars after it."""

    what: str
    usd: float


def dominates(row: ForecastRow) -> str | None:
    """A phrase that names the largest part of an offer's dollars. None if the dollars are unknown."""
    if not row.parts or not row.usd:
        return None
    name, usd = max(row.parts.items(), key=lambda item: item[1])
    return f"{name}, {100 * usd / row.usd:.0f} % of ${figures.dollars(row.usd, figures.places_for(row.usd))}"


def best_change(
    forecast: Forecast, catalog: Catalog, assume: Assumptions, rates: StorageRates | None, own: Sequence[Measured] = ()
) -> Change | None:
    """The single change with the lowest expected dollars. None if no change is cheaper than the best offer."""
    now = forecast.rows[0] if forecast.rows else None
    if now is None or now.usd is None:
        return None
    changes = [Change(f"take {describe(row)}", row.usd) for row in forecast.others[:1] if row.usd is not None]
    settings = {
        "an image that is already on the machine": {"image_seconds": 0.0},
        "shutting down immediately after the end": {"shutdown_seconds": 0.0},
    }
    for what, fields in settings.items():
        changed = dataclasses.replace(assume, **fields)
        again = forecast_of(forecast.task, catalog, changed, rates, forecast.tokens, throughput.without(own, fields))
        if again.rows and again.rows[0].usd is not None:
            changes.append(Change(what, again.rows[0].usd))
    changes.append(Change("half as many validations", now.usd - now.parts.get("eval", 0.0) / 2))
    if "egress" in now.parts:
        changes.append(Change("a bucket without egress charges (Cloudflare R2)", now.usd - now.parts["egress"]))
    best = min(changes, key=lambda change: change.usd)
    return best if best.usd < now.usd else None


def describe(row: ForecastRow) -> str:
    where = row.offer.zone or row.offer.region
    return f"{row.offer.cloud} {row.offer.instance_type} in {where}, {'spot' if row.spot else 'on demand'}"
