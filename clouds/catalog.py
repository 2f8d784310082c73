"""Reads offers of machines from price catalogs, and matches them with requests and GPUs.

offers = snapshot("aws")
[offer for offer in offers if fits(offer, request)]
"""

import csv
import functools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from clouds import skypilot
from clouds.base import Gpu, Offer
from core.task import MachineRequest

FOLDER = Path(__file__).parent / "catalog"
# One line per cloud: the commit of skypilot-org/skypilot-catalog, or the day on which `make prices` read the prices.
SOURCE = FOLDER / "source.txt"
_ORIGINS = ", ".join(SOURCE.read_text(encoding="utf-8").splitlines())
SNAPSHOT = f"price snapshot of SkyPilot's catalog ({_ORIGINS}), not today's prices"
# AWS Local Zones (such as use1-atl2-az1) are left out: an account must opt in to use them, and SkyPilot does not launch
# machines there.
_LOCAL_ZONE = re.compile(r"^\w+-[a-z]+\d+-az\d+$")


@dataclass(frozen=True)
class Extra:
    """A price other than a machine's: for a GB of disk a month, an address an hour, or a GB that leaves the cloud."""

    usd: float
    source: str


@dataclass(frozen=True)
class Catalog:
    """Offers of all clouds. `source` names the origin of the prices; a forecast prints it.

    `fetched` holds, by cloud, the day on which SkyPilot fetched the prices. A cloud whose prices are from the snapshot
    is not in `fetched`, because each of these prices has its own date.
    """

    offers: tuple[Offer, ...]
    source: str
    fetched: Mapping[str, date] = field(default_factory=dict)

    def price_date(self, offer: Offer, spot: bool) -> date | None:
        """The day on which a price was last seen at the provider, or None if that day is not known."""
        if offer.cloud in self.fetched:
            return self.fetched[offer.cloud]
        usd = offer.usd_spot if spot else offer.usd_on_demand
        key = (offer.cloud, offer.instance_type, "spot" if spot else "on demand")
        return next(
            (day for region, price, day in _seen().get(key, ()) if region in ("", offer.region) and price == usd), None
        )


@functools.cache
def snapshot(cloud: str) -> tuple[Offer, ...]:
    """Offers of one cloud from the CSV file in clouds/catalog."""
    with (FOLDER / cloud / "vms.csv").open(newline="", encoding="utf-8") as file:
        return tuple(_offers(cloud, csv.DictReader(file)))


@functools.cache
def _seen() -> dict[tuple[str, str, str], list[tuple[str, float, date]]]:
    """Prices that were seen at the provider.

    For each cloud, type and market, the result holds the region (empty means all regions), the price and the day.
    """
    found: dict[tuple[str, str, str], list[tuple[str, float, date]]] = {}
    with (FOLDER / "seen.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = (row["cloud"], row["instance_type"], row["market"])
            found.setdefault(key, []).append((row["region"], float(row["usd"]), date.fromisoformat(row["date"])))
    return found


@functools.cache
def extras(cloud: str) -> Mapping[str, Extra]:
    """A cloud's prices for `disk`, `address` and `leaving`. Empty if the file has no rows for the cloud."""
    with (FOLDER / "extras.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["cloud"] == cloud]
    dated = {row["what"]: f"{row['source']}, since {row['since']}" if row["since"] else row["source"] for row in rows}
    return {row["what"]: Extra(float(row["usd"]), dated[row["what"]]) for row in rows}


def on_disk(cloud: str) -> tuple[tuple[Offer, ...], date] | None:
    """GPU offers of one cloud from the file that SkyPilot keeps on this computer, and the day of that file.

    None if there is no such file. Unlike `of_skypilot`, this function needs no network and does not import SkyPilot,
    which is slow.
    """
    path = skypilot.catalog_file(cloud)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            offers = tuple(_offers(cloud, (row for row in csv.DictReader(file) if row.get("AcceleratorName"))))
        return offers, datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
    except (OSError, UnicodeDecodeError, csv.Error, KeyError):
        return None


def of_skypilot(cloud: str) -> tuple[Offer, ...]:
    """Offers of one cloud from SkyPilot's catalog on this machine. Raises Unavailable."""
    return tuple(_offers(cloud, skypilot.catalog_rows(cloud)))


def fits(offer: Offer, request: MachineRequest) -> bool:
    """Whether an offer meets a request, by the rules of SkyPilot."""
    price = offer.usd_spot if request.spot else offer.usd_on_demand
    if price is None or (request.max_usd_per_hour is not None and price > request.max_usd_per_hour):
        return False
    for wanted, offered in (
        (request.cloud, offer.cloud),
        (request.region, offer.region),
        (request.zone, offer.zone),
        (request.instance_type, offer.instance_type),
    ):
        if wanted is not None and wanted != offered:
            return False
    if request.accelerator is not None:
        accelerator = (request.accelerator.lower(), request.accelerators)
        if accelerator != ((offer.accelerator or "").lower(), offer.accelerators):
            return False
    elif request.instance_type is None and offer.accelerator is not None:
        return False  # a request for processors alone does not match machines with GPUs
    return _enough(offer.vcpus, request.cpus) and _enough(offer.memory_gb, request.memory_gb)


def has_accelerator(offer: Offer, gpu: Gpu) -> bool:
    """Whether a GPU is the accelerator of an offer: "NVIDIA A100-SXM4-80GB" is an A100-80GB, not an A100."""
    kind, eighty, _ = (offer.accelerator or "?").partition("-80GB")
    if kind == "A100" and gpu.memory_mib is not None and bool(eighty) != (gpu.memory_mib > 60_000):
        return False
    return re.search(rf"\b{re.escape(kind)}\b", gpu.name) is not None  # whole words must match: an A10 is not an A100


def spot_range(offers: Iterable[Offer]) -> tuple[float, float, float] | None:
    """The lowest, the median and the highest spot price of some offers. None if there is no spot offer among them."""
    prices = sorted(offer.usd_spot for offer in offers if offer.usd_spot is not None)
    return (prices[0], statistics.median(prices), prices[-1]) if prices else None


def _enough(offered: float | None, wanted: tuple[float, bool] | None) -> bool:
    if wanted is None:
        return True
    amount, or_more = wanted
    return offered is not None and (offered >= amount if or_more else offered == amount)


def _offers(cloud: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Offer]:
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
    """The value of a cell. A CSV file holds text. SkyPilot's table holds floats, in which NaN means an empty cell."""
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
