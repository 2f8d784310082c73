"""Finds the machines that a task of sky/ can launch, with their prices and the options of make that choose them."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from clouds.base import Offer
from clouds.catalog import Catalog, fits
from core.task import MachineRequest, TaskSpec, read_task
from costs.forecast import UNSAID_IDLE_SECONDS
from costs.plan.recipes import ROOT

STALE_DAYS = 30


@dataclass(frozen=True)
class Wanted:
    """The user's constraints. None and False accept anything. `gpus` is NAME or NAME:COUNT."""

    on_demand: bool = False
    gpus: str | None = None
    cloud: str | None = None
    stale_days: int | None = None


@dataclass(frozen=True)
class Refusal:
    """A machine or model that a plan does not use, and the reason."""

    what: str
    why: str


@dataclass(frozen=True)
class Machine:
    """A machine that a launch of `task` with `options` rents.

    `usd` is the expected price in dollars per hour. `low` and `high` are the range of prices over zones and regions.
    `priced` is the day of the price, or None if it has no date. `idle_seconds` is the time from the run's end to the
    machine's shutdown.
    """

    task: str
    options: tuple[str, ...]
    offer: Offer
    spot: bool
    usd: float
    low: float
    high: float
    priced: date | None
    idle_seconds: float = 0.0

    @property
    def gpus(self) -> str:
        return f"{self.offer.accelerator}:{self.offer.accelerators}"

    @property
    def name(self) -> str:
        market = "spot" if self.spot else "on demand"
        return f"{self.offer.accelerators} x {self.offer.accelerator}, {self.offer.cloud} {market}"

    def is_old(self, today: date, days: int = STALE_DAYS) -> bool:
        return self.priced is None or (today - self.priced).days > days


def tasks(folder: Path = ROOT / "sky") -> list[TaskSpec]:
    """The tasks of this project that pretrain on GPUs. Raises ConfigError."""
    found = [read_task(str(path), {"BUCKET": "plan"}) for path in sorted(folder.glob("pretrain*.yaml"))]
    return [task for task in found if any(request.accelerator for request in task.requests)]


def machines(
    catalog: Catalog, tasks: Sequence[TaskSpec], wanted: Wanted, today: date
) -> tuple[list[Machine], list[Refusal]]:
    """All machines with GPUs that a task launches, and a refusal for each machine that no task launches.

    A managed task launches spot machines. Any other task launches on-demand machines.
    """
    kinds: dict[tuple[str, str, int], list[Offer]] = {}
    for offer in catalog.offers:
        if offer.accelerator and _is_wanted(offer, wanted):
            kinds.setdefault((offer.cloud, offer.accelerator, offer.accelerators), []).append(offer)
    found, refused = [], []
    for offers in kinds.values():
        for spot in (False,) if wanted.on_demand else (False, True):
            if not any(_price(offer, spot) for offer in offers):
                continue
            each = _launched(catalog, offers, spot, tasks)
            if isinstance(each, Machine) and wanted.stale_days is not None and each.is_old(today, wanted.stale_days):
                seen = f"of {each.priced}" if each.priced else "without a date"
                each = Refusal(each.name, f"its price is {seen}, and --refuse-stale={wanted.stale_days} asks for newer")
            (found if isinstance(each, Machine) else refused).append(each)
    return found, refused


def _is_wanted(offer: Offer, wanted: Wanted) -> bool:
    name, _, count = (wanted.gpus or "").partition(":")
    return (
        wanted.cloud in (None, offer.cloud)
        and (not name or name.lower() == (offer.accelerator or "").lower())
        and (not count or int(count) == offer.accelerators)
    )


def _launched(catalog: Catalog, offers: Sequence[Offer], spot: bool, tasks: Iterable[TaskSpec]) -> Machine | Refusal:
    """The machine that the first fitting task launches, or a refusal. Tasks that name these GPUs are tried first."""
    cloud, gpu, count = offers[0].cloud, offers[0].accelerator or "", offers[0].accelerators
    kind = [task for task in tasks if task.managed is spot]
    for task in sorted(kind, key=lambda task: not any(_asks_for(each, gpu, count) for each in task.requests)):
        requests = [each for each in _with_gpus(task, gpu, count) if each.cloud in (None, cloud)]
        allowed = [[offer for offer in offers if fits(offer, request)] for request in requests]
        allowed = [each for each in allowed if each]
        if not allowed:
            continue
        # For a managed job, SkyPilot tries the requests in their order. For a machine on demand, SkyPilot takes the
        # cheapest place.
        first = allowed[0] if spot else [min((o for each in allowed for o in each), key=lambda o: _price(o, spot))]
        prices = sorted(_price(offer, spot) for offer in first)
        kept = [o for each in allowed for o in each if o.instance_type == first[0].instance_type]
        everywhere = sorted(_price(offer, spot) for offer in kept)
        usd = statistics.median(prices)
        nearest = min(first, key=lambda offer: abs(_price(offer, spot) - usd))
        days = [catalog.price_date(offer, spot) for offer in first]
        path = f"sky/{Path(task.path).name}"
        priced = None if None in days else min(days)
        idle = UNSAID_IDLE_SECONDS if task.idle_seconds is None else task.idle_seconds
        options = _options(task, gpu, count, cloud)
        return Machine(path, options, nearest, spot, usd, everywhere[0], everywhere[-1], priced, idle)
    market = "spot" if spot else "on demand"
    cheapest = min(price for offer in offers if (price := _price(offer, spot)))
    limits = [each.max_usd_per_hour for task in kind for each in _with_gpus(task, gpu, count) if each.max_usd_per_hour]
    what, why = f"{count} x {gpu}, {cloud} {market}", "no task in sky/ asks for it there"
    if limits and cheapest > max(limits):
        path = next(t.path for t in kind if any(each.max_usd_per_hour == max(limits) for each in t.requests))
        what += f" (${cheapest:.2f} an hour)"
        why = f"above max_hourly_cost: {max(limits):g} of sky/{Path(path).name}; raise it there"
    return Refusal(what, why)


def _price(offer: Offer, spot: bool) -> float:
    """Dollars per hour, or 0 if there is no offer."""
    return (offer.usd_spot if spot else offer.usd_on_demand) or 0.0


def _asks_for(request: MachineRequest, gpu: str, count: int) -> bool:
    return ((request.accelerator or "").lower(), request.accelerators) == (gpu.lower(), count)


def _with_gpus(task: TaskSpec, gpu: str, count: int) -> list[MachineRequest]:
    """The requests of a task that is launched with GPUS=gpu:count, in the task's main market (spot or on demand)."""
    changed = [dataclasses.replace(each, accelerator=gpu, accelerators=count) for each in task.requests]
    return [each for each in dict.fromkeys(changed) if each.spot is task.managed]


def _options(task: TaskSpec, gpu: str, count: int, cloud: str) -> tuple[str, ...]:
    """The options of make that restrict a task to these GPUs and this cloud."""
    options = []
    if not all(_asks_for(request, gpu, count) for request in task.requests):
        options.append(f"GPUS={gpu}:{count}")
    if any(request.cloud != cloud for request in task.requests):
        options.append(f"INFRA={cloud}")
    return tuple(options)
