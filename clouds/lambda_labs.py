"""Implements the provider Lambda: facts and price of this machine, free capacity, and leftovers.

A Lambda machine does not report its instance type, so the type is inferred from the GPUs. Lambda's API has neither
labels nor a list of past machines.
"""

import dataclasses
import json
import random
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from clouds import catalog
from clouds.base import Billing, Cloud, Finding, Inventory, Leftover, MachineFacts, Offer, Ownership
from core import secrets, web
from core.errors import ConfigError
from core.run.machine import Price
from core.task import TaskSpec

API = "https://cloud.lambdalabs.com/api/v1"
KEYS = Path("~/.lambda_cloud/lambda_keys")
# Lambda allows one request per second. SkyPilot uses the same key, so a request may need several attempts.
ATTEMPTS = 6
LONGEST_PAUSE_SECONDS = 30.0
REQUEST_SECONDS = 30.0


class LambdaLabs(Cloud):
    """Lambda's on-demand cloud. A type has the same price in all regions."""

    name = "lambda"
    key_file = str(KEYS)
    # Lambda bills by the minute, from the moment when the machine has passed its health checks until its termination.
    billing = Billing(unit_seconds=60.0, least_seconds=60.0, from_ready=True)

    def offers(self) -> tuple[Offer, ...]:
        return catalog.snapshot(self.name)

    def facts(self, known: MachineFacts, environment: Mapping[str, str]) -> MachineFacts:
        types = {offer.instance_type for offer in self._offers_with(known)}
        return dataclasses.replace(known, instance_type=types.pop() if len(types) == 1 else None, spot=False)

    def price(self, facts: MachineFacts) -> Price | None:
        """The price of this machine's type.

        If the type is unknown, this is the price of all types with these GPUs. None if their prices differ.
        """
        prices = {
            offer.usd_on_demand
            for offer in self._offers_with(facts)
            if not facts.instance_type or offer.instance_type == facts.instance_type
        }
        usd = prices.pop() if len(prices) == 1 else None
        return Price(usd, catalog.SNAPSHOT) if usd else None

    def _offers_with(self, facts: MachineFacts) -> list[Offer]:
        """Offers with the same number and kind of GPUs as this machine."""
        offers = [offer for offer in self.offers() if offer.accelerators == len(facts.gpus)]
        healthy = [gpu for gpu in facts.gpus if not gpu.fault]
        return [offer for offer in offers if all(catalog.has_accelerator(offer, gpu) for gpu in healthy[:1])]

    def capacity_findings(self, task: TaskSpec) -> Iterator[Finding]:
        wanted = [request for request in task.requests if request.cloud in (None, self.name) and request.accelerator]
        types = get("instance-types") if wanted else None
        for request in wanted if types is not None else ():
            gpu = request.accelerator or ""
            prefix = f"gpu_{request.accelerators}x_{gpu.lower().replace('-', '_')}"
            regions = sorted(
                region["name"]
                for name, entry in types.items()
                if name.startswith(prefix) and ("80gb" in name) == ("80GB" in gpu)
                for region in entry["regions_with_capacity_available"]
            )
            machine = f"{gpu}:{request.accelerators}"
            if regions:
                yield Finding("ok", f"capacity: lambda has {machine} now in {', '.join(regions)}")
            else:
                yield Finding("!", f"capacity: lambda has no {machine} now")

    def is_configured(self) -> bool:
        return KEYS.expanduser().exists()

    def leftovers(self, whose: Ownership) -> Inventory:
        """All instances, of all users, except those that SkyPilot lists for this user's other projects."""
        listed = [each for each in get("instances") or () if each.get("status") != "terminated"]
        found = [_leftover(each, whose) for each in listed if _cluster_of(each) not in whose.others]
        return Inventory(tuple(found))


def _cluster_of(instance: Mapping[str, Any]) -> str:
    """The cluster of an instance. SkyPilot names instances CLUSTER-head and CLUSTER-worker."""
    name = instance.get("name") or ""
    return name.removesuffix("-head").removesuffix("-worker")


def _leftover(instance: Mapping[str, Any], whose: Ownership) -> Leftover:
    name, cluster = instance.get("name") or "", _cluster_of(instance)
    mine = whose.is_mine(cluster, labelled=False)
    place = f"lambda {instance['region']['name']}: {instance['instance_type']['name']} {instance['id']}"
    why = "" if mine else ", not known to SkyPilot here; if it is yours, end it in Lambda's console"
    end = partial(get, "instance-operations/terminate", {"instance_ids": [instance["id"]]})
    return Leftover(f"{place} {name!r} ({instance.get('status') or '?'}){why}", mine=mine, cluster=cluster, end=end)


def get(path: str, body: Mapping[str, Any] | None = None) -> Any:
    """`data` in the answer of Lambda's API. If `body` is given, the request is a POST. None if there is no key.

    If Lambda refuses a request because there were too many, the request is repeated.
    """
    keys = KEYS.expanduser()
    if not keys.exists():
        return None
    import urllib.error  # imported here: both imports take 40 ms, and a report sends no request to Lambda
    import urllib.request

    headers = {"Authorization": f"Bearer {_key(keys)}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{API}/{path}", data, headers)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return json.loads(web.fetch(request, REQUEST_SECONDS)[1])["data"]
        except urllib.error.HTTPError as error:
            if error.code != 429 or attempt == ATTEMPTS:
                raise
            asked = error.headers.get("Retry-After") or ""
            pause = float(asked) if asked.isdecimal() else 2.0 ** (attempt - 1) * random.uniform(1.0, 1.3)
        time.sleep(min(pause, LONGEST_PAUSE_SECONDS))


def _key(path: Path) -> str:
    """The `api_key` in the file. As in SkyPilot 0.14.1, only lines with ` = ` count. Raises ConfigError."""
    pairs = [line.strip().split(" = ") for line in path.read_text(encoding="utf-8-sig").splitlines() if " = " in line]
    key = {pair[0]: pair[1] for pair in pairs}.get("api_key", "")
    if not key:
        raise ConfigError(f"{path}: holds no `api_key = ...` line, with a blank on both sides of the =")
    return secrets.register(key)
