"""Lists the cloud providers, and looks up their offers together.

CLOUDS["aws"].leftovers(whose)
load(offline=True).offers
"""

import functools
import logging

from clouds import catalog
from clouds.aws import Aws
from clouds.base import Cloud, Unavailable
from clouds.catalog import Catalog
from clouds.lambda_labs import LambdaLabs

log = logging.getLogger(__name__)
CLOUDS: dict[str, Cloud] = {cloud.name: cloud for cloud in (Aws(), LambdaLabs())}


def cloud_named(name: str | None) -> Cloud | None:
    """The provider with this name, in upper or lower case. None if no such provider is listed."""
    return CLOUDS.get((name or "").lower())


def load(offline: bool = False) -> Catalog:
    """SkyPilot's catalog on this machine. The snapshot if there is no such catalog, or if `offline` is true."""
    if not offline:
        try:
            offers = tuple(offer for name in CLOUDS for offer in catalog.of_skypilot(name))
            return Catalog(offers, "SkyPilot's catalog on this machine")
        except Unavailable as error:
            log.info("prices: %s; using the snapshot", error)
    return snapshot()


def dated(offline: bool = False) -> Catalog:
    """GPU offers with the days of their prices.

    The offers of a cloud come from SkyPilot's file for that cloud or, if there is none, from the snapshot.
    """
    offers, sources, fetched = [], [], {}
    for name, cloud in CLOUDS.items():
        found = None if offline else catalog.on_disk(name)
        if found and found[0]:
            offers += found[0]
            fetched[name] = found[1]
            sources.append(f"SkyPilot's catalog on this machine ({name}, {found[1]})")
        else:
            offers += cloud.offers()
    if len(fetched) < len(CLOUDS):
        sources.append(catalog.SNAPSHOT)
    return Catalog(tuple(offers), "; ".join(sources), fetched)


def snapshot() -> Catalog:
    """The offers of all providers in clouds/catalog."""
    return Catalog(tuple(offer for cloud in CLOUDS.values() for offer in cloud.offers()), catalog.SNAPSHOT)


@functools.cache  # a report calls this function for every phase of every segment
def on_demand_price(cloud: str, region: str, instance_type: str) -> float | None:
    """Dollars per hour of one node in the snapshot. None if the snapshot has no such offer."""
    provider = cloud_named(cloud)
    prices = [
        offer.usd_on_demand
        for offer in (provider.offers() if provider else ())
        if (offer.region, offer.instance_type) == (region, instance_type) and offer.usd_on_demand is not None
    ]
    return min(prices, default=None)
