"""Finds two prices per hour that a node cannot find out itself.

A node passes both prices to the cap (core/run/paid.py). The first is the price of a machine that ends in its set-up,
before a program of this project knows the machine's type. The second is the price of the controller of a managed job.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from clouds import catalog, sky_records, skypilot
from clouds.aws import Aws
from clouds.base import Offer, Unavailable
from clouds.providers import CLOUDS
from core.task import TaskSpec

# The machine type that SkyPilot 0.14.1 chooses on AWS for a controller: at least 4 processors, with 4 GB of memory
# each.
CONTROLLER_TYPE = "m6i.xlarge"


def for_nodes(task: TaskSpec) -> dict[str, str]:
    """The variables USD_PER_HOUR_AT_MOST and, for a managed job, CONTROLLER_USD_PER_HOUR.

    A variable whose price is unknown is left out.
    """
    found = {"USD_PER_HOUR_AT_MOST": at_most(task, [offer for cloud in CLOUDS.values() for offer in cloud.offers()])}
    if task.managed:
        found["CONTROLLER_USD_PER_HOUR"] = controller_usd_per_hour()
    return {name: f"{usd:g}" for name, usd in found.items() if usd}


def at_most(task: TaskSpec, offers: Iterable[Offer]) -> float | None:
    """The highest price of a machine that fits the task, times the number of nodes. None if no price is known.

    The on-demand price is used, because it is an upper bound of the spot price.
    """
    prices = [
        min(filter(None, (offer.usd_on_demand, request.max_usd_per_hour)))
        for offer in offers
        for request in task.requests
        if catalog.fits(offer, request) and offer.usd_on_demand
    ]
    return max(prices) * task.nodes if prices else None


def controller_usd_per_hour() -> float | None:
    """The price of this user's controller of managed jobs.

    The price comes from SkyPilot's records or, if there are none, from SkyPilot's catalog. None if the controller is
    part of SkyPilot's server, or if no price is known.
    """
    try:
        if skypilot.setting("jobs", "controller", "consolidation_mode"):
            return None
        records = sky_records.machine_records([skypilot.controller_name(os.environ)])
        priced = [each for each in sorted(records, key=lambda each: each.start) if each.usd_per_hour]
        if priced:
            return priced[-1].usd_per_hour
        offers = [each for each in catalog.of_skypilot(Aws.name) if each.instance_type == CONTROLLER_TYPE]
    except Unavailable:
        return None
    return max((offer.usd_on_demand for offer in offers if offer.usd_on_demand), default=None)


def declared(task: TaskSpec, given: Mapping[str, str]) -> dict[str, Any]:
    """`given`, with each price for which the task has a variable that the user has not set."""
    wanted = {name: usd for name, usd in for_nodes(task).items() if name in task.envs and not given.get(name)}
    return {**given, **wanted}
