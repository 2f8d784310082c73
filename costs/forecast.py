"""What a task would cost on each machine that fits it. Pure, given the offers and the assumptions.

plan = forecast(task, catalog, assumptions)
plan.rows[0].usd
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from clouds.prices import Catalog, Offer
from core import figures
from core.settings.model import flops_per_token, parameters
from core.settings.preparation import PrepConfig
from core.settings.training import TrainingConfig
from core.settings.tuning import FinetuneConfig
from core.task import Task, Want, Work
from costs import throughput
from costs.model import StorageRates
from costs.throughput import Measured, Rate

BYTES_PER_TOKEN = 2  # uint16 shards
BYTES_PER_PARAMETER_SAVED = 12  # fp32 weights and two AdamW moments
# A forward pass is a third of a training step: 2 of 6 FLOPs per parameter and token.
EVAL_SPEEDUP = 3.0
UNSAID_IDLE_SECONDS = 600.0
_WORK = {"prep": "prepare", "evaluate": "eval", "image": "build"}


@dataclass(frozen=True)
class Assumptions:
    """What a forecast takes for granted. Each is an assumption unless its comment names a measurement."""

    provision_seconds: float = 150.0  # instance boot and SkyPilot's set-up; its part was 30-40 s on a prepared image
    image_seconds: float = 180.0  # pull of a CUDA image of some 6 GB compressed
    setup_seconds: float = 30.0
    ready_seconds: float = 90.0  # imports, first shards, torch.compile, restore
    shutdown_seconds: float | None = None  # idle until shut down; None: as the task's autostop says, else 10 minutes
    checkpoint_blocked_seconds: float = 0.3  # first save of 124M measured at 0.25-0.33 s, later ones at 0.1 s
    preemptions_per_hour: float = 0.25  # spot; what checkpoint.expected_hours_between_failures takes for granted, too
    prep_bytes_per_second: float = 100e6  # download and upload in parallel; encoding is faster than that
    source_bytes_per_token: float = 2.8  # sample-10BT of FineWeb-Edu: about 28 GB of parquet for 10B tokens
    epoch_tokens: float = 5e6  # of a set of conversations, about the size of Alpaca's 52,002
    evaluate_tokens: float = 25e6  # validation set of sample-10BT (0.2 %), and HellaSwag's 40,168 endings in context
    build_seconds: float = 1800.0  # both images on 8 cores
    storage_months: float = 1.0
    bucket_cloud: str = "aws"


@dataclass(frozen=True)
class Row:
    """One offer. Dollars are None if the speed on it is not known; `parts` add up to `usd`."""

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
class Job:
    """What there is to do, `amount` at `rate`: tokens, or for images the seconds themselves."""

    work: Work
    amount: float
    rate: Rate

    @property
    def training(self) -> TrainingConfig | None:
        return None if self.work.config is None or self.work.stage == "prep" else self.work.config


@dataclass(frozen=True)
class Plan:
    """Offers that fit, cheapest first; `others` do not fit the task but could do the same work."""

    task: Task
    tokens: float | None
    flops: float | None
    rows: list[Row]
    others: list[Row]
    sources: list[str]
    prices: str


def forecast(
    task: Task,
    catalog: Catalog,
    assume: Assumptions,
    rates: StorageRates | None,
    tokens: float | None = None,
    measured: Measured | None = None,
) -> Plan:
    work = task.work
    sources = {f"assumed: {work.assumed}"} if work.assumed else set()
    if tokens is None:
        tokens = _tokens(work, assume)
        if work.stage == "evaluate" or _epochs(work):
            sources.add(f"assumed: {tokens:,.0f} tokens; give --tokens")
    if assume.shutdown_seconds is None:
        idle = task.idle_seconds
        assume = dataclasses.replace(assume, shutdown_seconds=UNSAID_IDLE_SECONDS if idle is None else idle)
    flops = flops_per_token(work.model) if work.model else None

    def row(offer: Offer, spot: bool) -> Row:
        found = Row(offer, spot, task.nodes, (offer.usd_spot if spot else offer.usd_on_demand) * task.nodes)
        if work.stage == "image":
            rate = Rate(0.5, 1.0, 2.0, "assumed", f"building both images: {assume.build_seconds:.0f} s, assumed")
        elif not tokens:
            return found
        elif work.stage == "prep":
            each = assume.prep_bytes_per_second / assume.source_bytes_per_token * task.nodes
            said = f"preparation: limited by the network, at {assume.prep_bytes_per_second / 1e6:.0f} MB/s per node"
            rate = Rate(each / 2, each, each * 2, "assumed", f"{said}, assumed")
        else:
            rate = throughput.rate_of(offer, task.nodes, flops, measured)
        if rate is None:
            return found
        sources.add(rate.source)
        if work.stage == "evaluate" and rate.kind != "measured":
            rate = rate.times(EVAL_SPEEDUP)
        return _price(found, Job(work, tokens or assume.build_seconds, rate), assume, rates, measured)

    fitting = [(offer, want.spot) for want in task.wants for offer in catalog.offers if fits(offer, want)]
    rows = sorted(_merged(row(offer, spot) for offer, spot in dict.fromkeys(fitting)), key=_by_dollars)
    named = sorted(sources)
    other = [pair for pair in _alternatives(task, catalog) if pair not in set(fitting)]
    others = sorted((row(offer, spot) for offer, spot in other), key=_by_dollars)
    return Plan(task, tokens, flops, rows, others, named, catalog.source)


def _tokens(work: Work, assume: Assumptions) -> float | None:
    """What the settings say."""
    settings = work.config
    if isinstance(settings, PrepConfig):
        return _tokens_of_source(settings.source.place)
    if work.stage == "evaluate":
        return assume.evaluate_tokens
    if settings is None:
        return None
    epochs = _epochs(work)
    return epochs * assume.epoch_tokens if epochs else float(settings.train.steps) * settings.batch.tokens_per_step


def _epochs(work: Work) -> float:
    """Passes over data of which a forecast does not know the size; 0 where the settings give the steps."""
    return work.config.train.epochs if isinstance(work.config, FinetuneConfig) else 0.0


def _eval_tokens(train: TrainingConfig, assume: Assumptions) -> float:
    """Of one validation. What is held out of conversations is a share of them."""
    held_out = getattr(train.data, "val_fraction", None)
    return train.train.eval_tokens if held_out is None else held_out * assume.epoch_tokens


def fits(offer: Offer, want: Want) -> bool:
    """Whether an offer is what the task asks for, by SkyPilot's rules for these fields."""
    price = offer.usd_spot if want.spot else offer.usd_on_demand
    if price is None or (want.max_usd_per_hour is not None and price > want.max_usd_per_hour):
        return False
    for wanted, there in (
        (want.cloud, offer.cloud),
        (want.region, offer.region),
        (want.zone, offer.zone),
        (want.instance_type, offer.instance_type),
    ):
        if wanted is not None and wanted != there:
            return False
    if want.accelerator is not None:
        if want.accelerator.lower() != (offer.accelerator or "").lower() or want.accelerators != offer.accelerators:
            return False
    elif want.instance_type is None and offer.accelerator is not None:
        return False  # nobody means a GPU machine who asks for processors only
    return _enough(offer.vcpus, want.cpus) and _enough(offer.memory_gb, want.memory_gb)


def _enough(there: float | None, wanted: tuple[float, bool] | None) -> bool:
    if wanted is None:
        return True
    amount, or_more = wanted
    return there is not None and (there >= amount if or_more else there == amount)


def _price(row: Row, job: Job, assume: Assumptions, rates: StorageRates | None, measured: Measured | None) -> Row:
    parts, restarts = _parts(row, job, job.rate.expected, assume, measured)
    around = _around(row, job, assume, rates)
    slow, _ = _parts(row, job, job.rate.low, assume, measured, unlucky=2.0)
    fast, _ = _parts(row, job, job.rate.high, assume, measured, unlucky=0.0)
    per_second = row.usd_per_hour / 3600
    fixed = sum(around.values())
    return dataclasses.replace(
        row,
        hours=sum(parts.values()) / 3600,
        usd=sum(parts.values()) * per_second + fixed,
        usd_low=sum(fast.values()) * per_second + fixed,
        usd_high=sum(slow.values()) * per_second + fixed,
        restarts=restarts,
        kind=job.rate.kind,
        parts={name: seconds * per_second for name, seconds in parts.items()} | around,
    )


def _parts(
    row: Row, job: Job, speed: float, assume: Assumptions, measured: Measured | None, unlucky: float = 1.0
) -> tuple[dict[str, float], float]:
    """Seconds of machine time by phase, and the restarts expected; `unlucky` multiplies the preemptions."""
    work = job.amount / speed
    same = measured is not None and measured.instance_type == row.offer.instance_type
    imports = 0.0 if job.work.stage in ("prep", "image") else assume.ready_seconds
    ready = measured.ready_seconds if same else assume.setup_seconds + imports
    image = 0.0 if job.work.stage == "image" else assume.image_seconds
    parts = {"provision": assume.provision_seconds, "image": image, "ready": ready}
    parts[_WORK.get(job.work.stage, "train")] = work
    train = job.training
    interval = _checkpoint_seconds(train, speed) if train else 0.0
    if same:
        parts["eval, sample, checkpoint, wait"] = work * measured.overhead_share
    elif train:
        steps = job.amount / train.batch.tokens_per_step
        if train.train.eval_every:
            looks = steps / train.train.eval_every * _eval_tokens(train, assume)
            parts["eval"] = looks / (speed * EVAL_SPEEDUP)
        parts["checkpoint"] = work / interval * assume.checkpoint_blocked_seconds
    parts["idle until down"] = assume.shutdown_seconds or 0.0
    restarts = assume.preemptions_per_hour * unlucky * sum(parts.values()) / 3600 if row.spot else 0.0
    if restarts:
        start = assume.provision_seconds + image + ready
        parts["restarts and lost work"] = restarts * (start + interval / 2)
    return {name: seconds for name, seconds in parts.items() if seconds}, restarts


def _checkpoint_seconds(train: TrainingConfig, speed: float) -> float:
    """Training time between checkpoints. By time, the trainer chooses an interval up to the loss it may risk."""
    every = train.checkpoint.every_steps
    return every * train.batch.tokens_per_step / speed if every else train.checkpoint.max_lost_seconds


def _around(row: Row, job: Job, assume: Assumptions, rates: StorageRates | None) -> dict[str, float]:
    """Dollars that are not machine time: keeping the objects, and moving the tokens out of another cloud."""
    if rates is None or job.work.stage == "image":
        return {}
    moved = job.amount * BYTES_PER_TOKEN
    stored = 0.0 if job.work.stage == "evaluate" else moved
    if job.training and job.work.model:
        size = parameters(job.work.model) * BYTES_PER_PARAMETER_SAVED
        stored += job.training.checkpoint.keep_last * size
    found = {"storage": stored / 1e9 * rates.usd_per_gb_month * assume.storage_months}
    if job.work.stage != "prep" and row.offer.cloud != assume.bucket_cloud:
        found["egress"] = moved / 1e9 * rates.usd_per_gb_egress
    return found


def _tokens_of_source(place: str) -> float | None:
    """FineWeb and FineWeb-Edu name their samples by GPT-2 tokens: sample/10BT and sample-10BT are about 10 billion."""
    match = re.search(r"\bsample[/-](\d+)BT/", place)
    return float(match.group(1)) * 1e9 if match else None


def preparation_usd(catalog: Catalog, tokens: float, assume: Assumptions) -> tuple[Offer, float] | None:
    """The cheapest on-demand machine of 8 processors and what preparing so many tokens on it once would cost."""
    fit = [offer for offer in catalog.offers if fits(offer, Want(cloud=assume.bucket_cloud, cpus=(8.0, True)))]
    if not fit:
        return None
    offer = min(fit, key=lambda each: each.usd_on_demand)
    rate = assume.prep_bytes_per_second / assume.source_bytes_per_token
    job = Job(Work("prep", None), tokens, Rate(rate, rate, rate, "assumed", ""))
    parts, _ = _parts(Row(offer, False, 1, offer.usd_on_demand), job, rate, assume, None)
    return offer, sum(parts.values()) / 3600 * offer.usd_on_demand


def _alternatives(task: Task, catalog: Catalog) -> Iterable[tuple[Offer, bool]]:
    """Any machine with GPUs (or, for a task without, processors of the same number), on demand and spot."""
    gpu_work = any(want.accelerator for want in task.wants)
    least = min((want.cpus[0] for want in task.wants if want.cpus), default=0.0)
    for offer in catalog.offers:
        if bool(offer.accelerator) != gpu_work or (not gpu_work and (offer.vcpus or 0.0) < least):
            continue
        for spot, price in ((False, offer.usd_on_demand), (True, offer.usd_spot)):
            if price is not None:
                yield offer, spot


def _merged(rows: Iterable[Row]) -> list[Row]:
    """On demand has one price per region: its zones are one row."""
    found: dict[object, Row] = {}
    for row in rows:
        zone = row.offer.zone if row.spot else None
        key = (row.offer.cloud, row.offer.region, zone, row.offer.instance_type, row.spot, row.usd_per_hour)
        found.setdefault(key, dataclasses.replace(row, offer=dataclasses.replace(row.offer, zone=zone)))
    return list(found.values())


def _by_dollars(row: Row) -> tuple[bool, float]:
    """Unknown dollars last, then by price."""
    return row.usd is None, row.usd_per_hour if row.usd is None else row.usd


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing to do, and the expected dollars after it."""

    what: str
    usd: float


def dominates(row: Row) -> str | None:
    """The largest part of an offer's dollars, in words."""
    if not row.parts or not row.usd:
        return None
    name, usd = max(row.parts.items(), key=lambda item: item[1])
    return f"{name}, {100 * usd / row.usd:.0f} % of ${figures.dollars(row.usd, figures.places_for(row.usd))}"


def best_change(
    plan: Plan, catalog: Catalog, assume: Assumptions, rates: StorageRates | None, measured: Measured | None
) -> Change | None:
    """The change with the lowest expected dollars, if it is below the plan's best; each alone, not combined."""
    now = plan.rows[0] if plan.rows else None
    if now is None or now.usd is None:
        return None
    changes = [Change(f"take {describe(row)}", row.usd) for row in plan.others[:1] if row.usd is not None]
    settings = {
        "an image that is already on the machine": {"image_seconds": 0.0},
        "shutting down at once when done": {"shutdown_seconds": 0.0},
    }
    for what, fields in settings.items():
        changed = dataclasses.replace(assume, **fields)
        again = forecast(plan.task, catalog, changed, rates, plan.tokens, measured)
        if again.rows and again.rows[0].usd is not None:
            changes.append(Change(what, again.rows[0].usd))
    changes.append(Change("half as many validations", now.usd - now.parts.get("eval", 0.0) / 2))
    if "egress" in now.parts:
        changes.append(Change("a bucket without egress charges (Cloudflare R2)", now.usd - now.parts["egress"]))
    best = min(changes, key=lambda change: change.usd)
    return best if best.usd < now.usd else None


def describe(row: Row) -> str:
    where = row.offer.zone or row.offer.region
    return f"{row.offer.cloud} {row.offer.instance_type} in {where}, {'spot' if row.spot else 'on demand'}"
