"""Offers of machines with their prices: from SkyPilot's catalog where it is installed, else from the snapshot.

catalog = load(offline=True)
[offer for offer in catalog.offers if offer.accelerator == "A100"]
"""

import csv
import functools
import logging
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds import skypilot
from clouds.base import Unavailable

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "catalog"
CLOUDS = ("aws", "lambda")
# Commits of skypilot-org/skypilot-catalog, also in costs/catalog/README.md.
# AWS Local Zones (use1-atl2-az1) have to be opted in to; SkyPilot does not launch there.
_LOCAL_ZONE = re.compile(r"^\w+-[a-z]+\d+-az\d+$")
SNAPSHOT = "price snapshot of SkyPilot's catalog (AWS 00148f2, Lambda 0f40703), not today's prices"


@dataclass(frozen=True)
class Offer:
    """One instance type in one zone. A price is None where there is no such offer."""

    cloud: str
    region: str
    zone: str | None
    instance_type: str
    accelerator: str | None
    accelerators: int
    vcpus: float | None
    memory_gb: float | None
    arch: str | None
    usd_on_demand: float | None
    usd_spot: float | None


@dataclass(frozen=True)
class Catalog:
    """`source` says whose prices these are, for the reader of a forecast."""

    offers: tuple[Offer, ...]
    source: str


def load(offline: bool = False) -> Catalog:
    """SkyPilot's own catalog if it is installed and has one, else the snapshot."""
    if not offline:
        try:
            rows = {cloud: skypilot.catalog_rows(cloud) for cloud in CLOUDS}
            found = tuple(offer for cloud in CLOUDS for offer in _offers(cloud, rows[cloud]))
            return Catalog(found, "SkyPilot's catalog on this machine")
        except Unavailable as error:
            log.info("prices: %s; using the snapshot", error)
    return snapshot()


@functools.cache
def snapshot() -> Catalog:
    return Catalog(
        tuple(offer for cloud in CLOUDS for offer in _offers(cloud, _rows(FOLDER / cloud / "vms.csv"))), SNAPSHOT
    )


def on_demand_price(cloud: str, region: str, instance_type: str) -> float | None:
    """Dollars per hour of one node by the snapshot, or None if it has no such offer."""
    found = [
        offer.usd_on_demand
        for offer in snapshot().offers
        if offer.cloud == cloud.lower() and offer.region == region and offer.instance_type == instance_type
    ]
    known = [price for price in found if price is not None]
    return min(known) if known else None


def spot_range(offers: Iterable[Offer]) -> tuple[float, float, float] | None:
    """Lowest, median and highest spot price of some offers, or None without any."""
    prices = sorted(offer.usd_spot for offer in offers if offer.usd_spot is not None)
    return (prices[0], statistics.median(prices), prices[-1]) if prices else None


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _offers(cloud: str, rows: Iterable[Mapping[str, Any]]) -> Iterable[Offer]:
    for row in rows:
        if _LOCAL_ZONE.match(str(row.get("AvailabilityZone"))):
            continue
        count = _number(row.get("AcceleratorCount"))
        yield Offer(
            cloud=cloud,
            region=str(row["Region"]),
            zone=_text(row.get("AvailabilityZone")),
            instance_type=str(row["InstanceType"]),
            accelerator=_text(row.get("AcceleratorName")),
            accelerators=int(count) if count else 0,
            vcpus=_number(row.get("vCPUs")),
            memory_gb=_number(row.get("MemoryGiB")),
            arch=_text(row.get("Arch")),
            usd_on_demand=_price(row.get("Price")),
            usd_spot=_price(row.get("SpotPrice")),
        )


def _number(value: Any) -> float | None:
    """CSV has text, SkyPilot's table has floats with NaN for nothing."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _price(value: Any) -> float | None:
    number = _number(value)
    return number if number and number > 0 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
