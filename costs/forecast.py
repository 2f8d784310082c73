"""What a task would cost on each machine that fits it. Pure, given the offers and the assumptions.

plan = forecast(task, catalog, assumptions)
plan.rows[0].usd
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from core.schema import PrepConfig, TrainConfig
from costs import throughput
from costs.model import StorageRates
from costs.prices import Catalog, Offer
from costs.task import Task, Want
from costs.throughput import Measured
from costs.units import flops_per_token

BYTES_PER_TOKEN = 2  # uint16 shards
BYTES_PER_PARAMETER_SAVED = 12  # fp32 weights and two AdamW moments
# A forward pass is a third of a training step: 2 of 6 FLOPs per parameter and token.
EVAL_SPEEDUP = 3.0
UNSAID_IDLE_SECONDS = 600.0


@dataclass(frozen=True)
class Assumptions:
    """What a forecast takes for granted. Each is an assumption unless its comment names a measurement."""

    provision_seconds: float = 150.0  # instance boot and SkyPilot's set-up; its part was 30-40 s on a prepared image
    image_seconds: float = 180.0  # pull of a CUDA image of some 6 GB compressed
    setup_seconds: float = 30.0
    ready_seconds: float = 90.0  # imports, first shards, torch.compile, restore
    shutdown_seconds: float | None = None  # idle until shut down; None: as the task's autostop says, else 10 minutes
    checkpoint_blocked_seconds: float = 0.3  # first save of 124M measured at 0.25-0.33 s, later ones at 0.1 s
    preemptions_per_hour: float = 0.25  # spot; what checkpoint.mean_hours_between_failures takes for granted, too
    prep_bytes_per_second: float = 100e6  # download and upload in parallel; encoding is faster than that
    source_bytes_per_token: float = 2.8  # sample-10BT of FineWeb-Edu: about 28 GB of parquet for 10B tokens
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
    settings = task.work.config
    train = settings if isinstance(settings, TrainConfig) else None
    if tokens is None and train:
        tokens = float(train.train.steps) * train.batch.tokens
    if tokens is None and isinstance(settings, PrepConfig):
        tokens = _tokens_of_source(settings.source.url)
    if assume.shutdown_seconds is None:
        idle = task.idle_seconds
        assume = dataclasses.replace(assume, shutdown_seconds=UNSAID_IDLE_SECONDS if idle is None else idle)
    flops = flops_per_token({"model": dataclasses.asdict(train.model)}) if train else None
    prepares = task.work.stage == "prep" or isinstance(settings, PrepConfig)
    sources: set[str] = set()

    def row(offer: Offer, spot: bool) -> Row:
        found = Row(offer, spot, task.nodes, (offer.usd_spot if spot else offer.usd_on_demand) * task.nodes)
        speed = None
        if prepares and tokens:
            rate = assume.prep_bytes_per_second / assume.source_bytes_per_token * task.nodes
            speed = (rate / 2, rate, rate * 2, "assumed")
            sources.add("preparation: assumed to be limited by the network, at "
                        f"{assume.prep_bytes_per_second / 1e6:.0f} MB/s per node")  # fmt: skip
        elif tokens:
            speed = _speed(offer, task.nodes, flops, measured, sources)
        if speed is None:
            return found
        return _price(found, tokens, speed, train, assume, rates, measured, prepares)

    fitting = [(offer, want.spot) for want in task.wants for offer in catalog.offers if fits(offer, want)]
    rows = [row(offer, spot) for offer, spot in dict.fromkeys(fitting)]
    named = sorted(sources)
    others = [row(offer, spot) for offer, spot in _alternatives(task, catalog) if (offer, spot) not in set(fitting)]
    key = _by_dollars
    return Plan(task, tokens, flops, sorted(_merged(rows), key=key), sorted(others, key=key), named, catalog.source)


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


def _speed(
    offer: Offer, nodes: int, flops: float | None, measured: Measured | None, sources: set[str]
) -> tuple[float, float, float, str] | None:
    """Low, expected and high tokens/s, and how that is known."""
    gpus = offer.accelerators * nodes
    if measured and offer.instance_type == measured.instance_type:
        scale = measured.flops_per_token / flops if flops and measured.flops_per_token else 1.0
        if gpus and measured.gpus:
            scale *= gpus / measured.gpus
        rate = measured.tokens_per_second * scale
        sources.add(f"{offer.instance_type}: measured by {measured.run}")
        return rate * 0.9, rate, rate * 1.1, "measured"
    published = throughput.tokens_per_second(offer.accelerator, gpus, flops)
    if published is None:
        return None
    speed, rate = published
    sources.add(f"{offer.accelerator}: MFU {speed.expected:.0%} ({speed.low:.0%} to {speed.high:.0%}), {speed.source}")
    return rate * speed.low / speed.expected, rate, rate * speed.high / speed.expected, speed.kind


def _price(
    row: Row,
    tokens: float,
    speed: tuple[float, float, float, str],
    train: TrainConfig | None,
    assume: Assumptions,
    rates: StorageRates | None,
    measured: Measured | None,
    prepares: bool,
) -> Row:
    low, expected, high, kind = speed
    parts, restarts = _parts(row, tokens, expected, train, assume, measured, prepares)
    around = _around(row, tokens, train, assume, rates, prepares)
    slow, _ = _parts(row, tokens, low, train, assume, measured, prepares, unlucky=2.0)
    fast, _ = _parts(row, tokens, high, train, assume, measured, prepares, unlucky=0.0)
    per_second = row.usd_per_hour / 3600
    fixed = sum(around.values())
    return dataclasses.replace(
        row,
        hours=sum(parts.values()) / 3600,
        usd=sum(parts.values()) * per_second + fixed,
        usd_low=sum(fast.values()) * per_second + fixed,
        usd_high=sum(slow.values()) * per_second + fixed,
        restarts=restarts,
        kind=kind,
        parts={name: seconds * per_second for name, seconds in parts.items()} | around,
    )


def _parts(
    row: Row,
    tokens: float,
    speed: float,
    train: TrainConfig | None,
    assume: Assumptions,
    measured: Measured | None,
    prepares: bool,
    unlucky: float = 1.0,
) -> tuple[dict[str, float], float]:
    """Seconds of machine time by phase, and the restarts expected; `unlucky` multiplies the preemptions."""
    work = tokens / speed
    same = measured is not None and measured.instance_type == row.offer.instance_type
    ready = measured.ready_seconds if same else assume.setup_seconds + (0.0 if prepares else assume.ready_seconds)
    start = assume.provision_seconds + assume.image_seconds + ready
    parts = {
        "provision": assume.provision_seconds,
        "image": assume.image_seconds,
        "ready": ready,
        "prepare" if prepares else "train": work,
    }
    interval = _checkpoint_seconds(train, speed) if train else 0.0
    if same:
        parts["eval, sample, checkpoint, wait"] = work * measured.overhead_share
    elif train:
        steps = tokens / train.batch.tokens
        if train.train.eval_every:
            parts["eval"] = steps / train.train.eval_every * train.train.eval_tokens / (speed * EVAL_SPEEDUP)
        parts["checkpoint"] = work / interval * assume.checkpoint_blocked_seconds
    parts["idle until down"] = assume.shutdown_seconds or 0.0
    restarts = assume.preemptions_per_hour * unlucky * sum(parts.values()) / 3600 if row.spot else 0.0
    if restarts:
        parts["restarts and lost work"] = restarts * (start + interval / 2)
    return parts, restarts


def _checkpoint_seconds(train: TrainConfig, speed: float) -> float:
    """Training time between checkpoints. By time, the trainer chooses an interval up to the loss it may risk."""
    every = train.checkpoint.every
    return every * train.batch.tokens / speed if every else train.checkpoint.max_lost_seconds


def _around(
    row: Row, tokens: float, train: TrainConfig | None, assume: Assumptions, rates: StorageRates | None, prepares: bool
) -> dict[str, float]:
    """Dollars that are not machine time: keeping the objects, and moving the tokens out of another cloud."""
    if rates is None:
        return {}
    stored = tokens * BYTES_PER_TOKEN
    if train:
        stored += train.checkpoint.keep * parameters(train) * BYTES_PER_PARAMETER_SAVED
    found = {"storage": stored / 1e9 * rates.usd_per_gb_month * assume.storage_months}
    if not prepares and row.offer.cloud != assume.bucket_cloud:
        found["egress"] = tokens * BYTES_PER_TOKEN / 1e9 * rates.usd_per_gb_egress
    return found


def _tokens_of_source(url: str) -> float | None:
    """FineWeb and FineWeb-Edu name their samples by GPT-2 tokens: sample/10BT is about 10 billion."""
    match = re.search(r"sample/(\d+)BT/", url)
    return float(match.group(1)) * 1e9 if match else None


def preparation_usd(catalog: Catalog, tokens: float, assume: Assumptions) -> tuple[Offer, float] | None:
    """The cheapest on-demand machine of 8 processors and what preparing so many tokens on it once would cost."""
    fit = [offer for offer in catalog.offers if fits(offer, Want(cloud=assume.bucket_cloud, cpus=(8.0, True)))]
    if not fit:
        return None
    offer = min(fit, key=lambda each: each.usd_on_demand)
    rate = assume.prep_bytes_per_second / assume.source_bytes_per_token
    parts, _ = _parts(Row(offer, False, 1, offer.usd_on_demand), tokens, rate, None, assume, None, prepares=True)
    return offer, sum(parts.values()) / 3600 * offer.usd_on_demand


def parameters(train: TrainConfig) -> int:
    """Of GPT-2 with a tied embedding, without biases and norms, which do not matter for dollars."""
    model = train.model
    return (model.vocab_rows + model.context) * model.width + 12 * model.layers * model.width**2


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
