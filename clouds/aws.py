"""Implements the provider AWS: facts of this machine, prices, spot notices, quotas, leftovers, instances and the bill.

boto3 is needed on the user's computer only, for credentials, quotas and leftovers. All other requests use botocore. A
cost report needs the permissions ec2:DescribeInstances, ec2:DescribeSpotPriceHistory and ce:GetCostAndUsage.
"""

import dataclasses
import datetime
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from clouds import catalog, ec2
from clouds.base import (
    Bill,
    Billing,
    Cloud,
    Finding,
    Instance,
    Interruption,
    Inventory,
    MachineFacts,
    Offer,
    Ownership,
    SpotHistory,
    Unavailable,
)
from clouds.metadata import Metadata
from core import storage
from core.errors import one_line
from core.run.machine import Machine, Price
from core.stores import aws as bucket_place
from core.stores import credentials
from core.task import MachineRequest, TaskSpec

log = logging.getLogger(__name__)
PRICE_SOURCE = "AWS spot price history"
INSTANCES_ORIGIN = "EC2's list of instances"
# Longest wait in seconds for the metadata service, which may need a while after the boot. If the service does not
# answer by then, the price is unknown, and the cap cannot be kept.
METADATA_SECONDS = 20.0
METADATA_PAUSE_SECONDS = 1.0
# Codes of quotas in AWS Service Quotas. Each family of instance types has two quotas: vCPUs of running machines on
# demand, and vCPUs of running spot machines.
QUOTAS = {
    "p": ("L-417A185B", "L-7212CCBC"),
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "standard": ("L-1216C47A", "L-34B43A08"),
}
UNKNOWN_VCPUS = 8.0  # assumed for an instance type that the catalog lacks
# List prices of traffic (EC2 pricing page): of the first terabytes to the internet, and between two regions in the US.
INTERNET_USD_PER_GB = 0.09
INTER_REGION_USD_PER_GB = 0.02
# The time in an instance's StateTransitionReason, such as "User initiated (2026-11-20 08:46:56 GMT)".
_TRANSITION = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


class Aws(Cloud):
    """The provider AWS: machines on EC2, and buckets on S3 in the same account."""

    name = "aws"
    key_file = "~/.aws/credentials"
    default_role = "SkyPilot's role, which may do anything on EC2 and S3"
    # Linux instances are billed by the second, and for at least a minute (aws.amazon.com/ec2/pricing).
    billing = Billing(least_seconds=60.0)

    def offers(self) -> tuple[Offer, ...]:
        return catalog.snapshot(self.name)

    def facts(self, known: MachineFacts, environment: Mapping[str, str]) -> MachineFacts:
        """Takes region, zone, type and market (spot or on demand) from the instance metadata service."""
        items = ("placement/region", "placement/availability-zone", "instance-type", "instance-life-cycle")
        region, zone, instance_type, life_cycle = instance_metadata(items, environment)
        return dataclasses.replace(
            known,
            region=region or known.region,
            zone=zone or known.zone,
            instance_type=instance_type,
            spot=None if life_cycle is None else life_cycle == "spot",
        )

    def price(self, facts: MachineFacts) -> Price | None:
        """The price of this node. For a machine on demand, it comes from the snapshot in clouds/catalog.

        For a spot machine, it is the current spot price or, if this is unknown, the snapshot's median over the zones.
        """
        if not facts.instance_type or facts.spot is None:
            return None
        offers = [
            offer
            for offer in self.offers()
            if (offer.instance_type, offer.region) == (facts.instance_type, facts.region)
        ]
        if not facts.spot:
            on_demand = [offer.usd_on_demand for offer in offers if offer.usd_on_demand]
            return Price(min(on_demand), catalog.SNAPSHOT) if on_demand else None
        if usd := current_spot_price(facts.zone or "", facts.instance_type, facts.region or ""):
            return Price(usd, PRICE_SOURCE)
        spread = catalog.spot_range(offers)
        return Price(spread[1], f"median over the zones of {facts.region}, {catalog.SNAPSHOT}") if spread else None

    def interruptions(self, environment: Mapping[str, str]) -> Callable[[], Interruption | None] | None:
        """`spot/instance-action` appears two minutes before AWS takes a spot machine away (EC2 User Guide).

        `events/recommendations/rebalance` often appears earlier, and reports only a higher risk.
        """
        metadata = Metadata(environment)
        return None if metadata.disabled else partial(_interruption, metadata)

    def quota_findings(self, task: TaskSpec) -> Iterator[Finding]:
        """Compares vCPU quotas with the task. In a new account, the quotas for GPU machines are 0."""
        asked = set()
        for request in task.requests:
            kind, vcpus = self._type_of(request)
            if request.cloud not in (None, self.name) or not kind or (request.region, kind, request.spot) in asked:
                continue
            asked.add((request.region, kind, request.spot))
            import boto3

            session = boto3.session.Session()
            region = request.region or session.region_name or bucket_place.DEFAULT_REGION
            family = kind[0] if kind[0] in QUOTAS else "standard"
            answer = session.client("service-quotas", region_name=region).get_service_quota(
                ServiceCode="ec2", QuotaCode=QUOTAS[family][request.spot]
            )
            limit = answer["Quota"]["Value"]
            said = f"quota: {region}, {family} {'spot' if request.spot else 'on demand'}: {limit:.0f} vCPUs"
            enough = limit >= vcpus * task.nodes
            yield Finding("ok" if enough else "!", said + ("" if enough else f", {task.nodes} x {kind} need more"))

    def _type_of(self, request: MachineRequest) -> tuple[str, float]:
        """Instance type and vCPUs of the cheapest offer for `request`, whose limits on region and price are ignored."""
        anywhere = dataclasses.replace(request, cloud=None, region=None, zone=None, spot=False, max_usd_per_hour=None)
        offers = [offer for offer in self.offers() if catalog.fits(offer, anywhere)]
        if not offers:
            return request.instance_type or "", UNKNOWN_VCPUS
        cheapest = min(offers, key=lambda offer: offer.usd_on_demand)
        return cheapest.instance_type, cheapest.vcpus or UNKNOWN_VCPUS

    def transfer_findings(self, task: TaskSpec, bucket_url: str, data_bytes: int) -> Iterator[Finding]:
        """AWS bills each gigabyte that a machine in another region, or outside of AWS, reads from a bucket."""
        home = _home_of(bucket_url)
        if not home:
            return
        for cloud, region in sorted({(request.cloud or "", request.region or "") for request in task.requests}):
            usd = self._reading(home, cloud, region)
            if usd:
                amount = f"${usd * data_bytes / 1e9:.2f} for this data" if data_bytes else f"${usd:.2f} per GB"
                place = f"{cloud}/{region}" if region else cloud
                yield Finding("!", f"bucket: it is in {home}; a machine at {place} reads it for {amount}")

    def _reading(self, home: str, cloud: str | None, region: str | None) -> float:
        elsewhere = INTER_REGION_USD_PER_GB if region and region != home else 0.0
        return elsewhere if cloud == self.name else INTERNET_USD_PER_GB

    def traffic_usd_per_gb(self, url: str, cloud: str | None, region: str | None) -> tuple[float, float] | None:
        if storage.terms_of(url).service != self.name:
            return None
        if not (home := _home_of(url)):
            raise Unavailable(f"the region of the bucket of {url} is not known")
        reading = self._reading(home, cloud, region)
        return reading, reading if cloud == self.name else 0.0

    def opens_buckets(self, service: str) -> bool:
        return service not in ("r2", "s3-like", "google", "azure")

    def is_configured(self) -> bool:
        import boto3

        return boto3.session.Session().get_credentials() is not None

    def copies_key_file(self, environment: Mapping[str, str]) -> bool:
        # If the environment holds keys, SkyPilot uses them and copies no file.
        return super().copies_key_file(environment) and not environment.get("AWS_ACCESS_KEY_ID")

    def leftovers(self, whose: Ownership) -> Inventory:
        """Instances and unattached volumes in all regions that the account has enabled."""
        import boto3

        return ec2.leftovers(boto3.session.Session(), whose)

    def instances(self, clusters: Sequence[str], region: str, client: Any = None) -> list[Instance]:
        """Finds instances by SkyPilot's tag, which holds the cluster's name and a hash of the user.

        EC2 still lists a terminated instance for about an hour.
        """
        client = client or _client("ec2", region)
        filters = [{"Name": "tag:ray-cluster-name", "Values": [f"{name}-*" for name in clusters]}]
        try:
            pages = client.get_paginator("describe_instances").paginate(Filters=filters)
            listed = [i for page in pages for group in page["Reservations"] for i in group["Instances"]]
        except Exception as error:  # any error of botocore, such as credentials, permissions or network
            raise _unavailable(error) from error
        return [_instance(each) for each in listed]

    def paid_spot(self, machine: Machine, start: float, end: float) -> SpotHistory | None:
        if not (machine.zone and machine.instance_type):
            return None
        changes = spot_prices(machine.zone, machine.instance_type, machine.region, start, end)
        return SpotHistory(tuple(changes), PRICE_SOURCE)

    def bill(self, tag: str, value: str, start: float, end: float, client: Any = None) -> Bill:
        """Dollars by service from Cost Explorer, in its metric UnblendedCost."""
        explorer = client or _client("ce", "us-east-1")
        first, last = (datetime.datetime.fromtimestamp(at, datetime.UTC).date() for at in (start, end))
        arguments: dict[str, Any] = {
            "TimePeriod": {"Start": first.isoformat(), "End": (last + datetime.timedelta(days=1)).isoformat()},
            "Granularity": "DAILY",
            "Metrics": ["UnblendedCost"],
            "GroupBy": [{"Type": "DIMENSION", "Key": "SERVICE"}],
            "Filter": {"Tags": {"Key": tag, "Values": [value], "MatchOptions": ["EQUALS"]}},
        }
        by_service: dict[str, float] = {}
        while True:
            try:
                answer = explorer.get_cost_and_usage(**arguments)
            except Exception as error:  # any error, such as a disabled Cost Explorer, permissions or network
                raise _unavailable(error) from error
            for group in (group for day in answer["ResultsByTime"] for group in day["Groups"]):
                cost = group["Metrics"]["UnblendedCost"]
                if cost["Unit"] != "USD":
                    raise Unavailable(f"the bill is in {cost['Unit']}, not USD")
                name = group["Keys"][0]
                by_service[name] = by_service.get(name, 0.0) + float(cost["Amount"])
            if not answer.get("NextPageToken"):
                break
            arguments["NextPageToken"] = answer["NextPageToken"]
        if not by_service:
            raise Unavailable(f"Cost Explorer has nothing under {tag}={value} yet (it lags by up to a day)")
        return Bill("Cost Explorer", by_service)

    def unfinished_uploads(self, url: str) -> int | None:
        terms = storage.terms_of(url)
        if terms.service not in bucket_place.SERVICES:
            return None
        prefix = url.partition(f"{terms.bucket}/")[2].rstrip("/") + "/"
        names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
        names |= {"token": "aws_session_token"}  # obstore's names of settings, each with botocore's name for it
        try:
            place = bucket_place.place_of(terms.bucket, os.environ, credentials.profile_settings(os.environ))
            provider = credentials.for_s3(os.environ)
            keys = {names[name]: value for name, value in (provider() if provider else {}).items() if name in names}
            client = _client("s3", place.region, endpoint_url=place.endpoint, **keys)
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=terms.bucket, Prefix=prefix)
            return sum(len(page.get("Uploads", ())) for page in pages)
        except Exception:  # no permission, or a server without this request: the report then leaves the number out
            return None


@functools.cache
def _home_of(url: str) -> str | None:
    """The region of a bucket on S3. None if the bucket is on another store, or if the store does not answer."""
    terms = storage.terms_of(url)
    return bucket_place.Place(terms.bucket, None, None).home() if terms.service == Aws.name else None


def instance_metadata(items: Iterable[str], environment: Mapping[str, str]) -> list[str | None]:
    """The values of `items` in the metadata service. The value is None if the service has no such item.

    If the service does not answer within METADATA_SECONDS in total, the remaining values are None.
    """
    service = Metadata(environment)
    deadline = time.monotonic() + METADATA_SECONDS
    return [_wait_for(service, item, deadline) for item in items]


def current_spot_price(zone: str, instance_type: str, region: str) -> float | None:
    """The current spot price. None if AWS does not answer, or if the role lacks ec2:DescribeSpotPriceHistory."""
    now = time.time()
    try:
        return max(spot_prices(zone, instance_type, region, now, now), default=(0.0, None))[1]
    except Unavailable as error:
        log.info("AWS does not answer with the current spot price: %s", error)
        return None


def spot_prices(
    zone: str, instance_type: str, region: str | None, start: float, end: float, client: Any = None
) -> list[tuple[float, float]]:
    """Spot prices of one node as (unix time of the change, dollars per hour), including the price at `start`.

    Raises Unavailable.
    """
    client = client or _client("ec2", region)
    # `zone` is a name (us-east-1a) or, as in SkyPilot's catalog, an id (use1-az1).
    place = {"AvailabilityZoneId": zone} if "-az" in zone else {"AvailabilityZone": zone}
    try:
        pages = client.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=[instance_type],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=datetime.datetime.fromtimestamp(start, datetime.UTC),
            EndTime=datetime.datetime.fromtimestamp(end, datetime.UTC),
            **place,
        )
        entries = [entry for page in pages for entry in page["SpotPriceHistory"]]
    except Exception as error:  # any error of botocore, such as credentials, permissions or network
        raise _unavailable(error) from error
    return [(entry["Timestamp"].timestamp(), float(entry["SpotPrice"])) for entry in entries]


def _wait_for(service: Metadata, item: str, deadline: float) -> str | None:
    while not service.disabled:
        try:
            return (service.get(item) or "").strip() or None
        except Unavailable as error:
            if time.monotonic() + METADATA_PAUSE_SECONDS > deadline:
                log.warning("this machine's %s is not known: %s", item, error)
                return None
            time.sleep(METADATA_PAUSE_SECONDS)
    return None


def _interruption(metadata: Metadata) -> Interruption | None:
    if (action := _notice(metadata, "spot/instance-action", "action")) is not None:
        return Interruption(True, f"{action['action']} at {action.get('time')}")
    if (rebalance := _notice(metadata, "events/recommendations/rebalance", "noticeTime")) is not None:
        return Interruption(False, f"rebalance recommendation of {rebalance['noticeTime']}")
    return None


def _notice(metadata: Metadata, item: str, key: str) -> dict | None:
    """The notice in an item of the metadata service, which must contain `key`. None if there is no notice.

    Raises Unavailable.
    """
    text = metadata.get(item)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or key not in found:
        raise Unavailable(f"{metadata.endpoint} has something at {item} that is not a notice: {text[:80]!r}")
    return found


def _instance(listed: Mapping[str, Any]) -> Instance:
    tag = next(tag["Value"] for tag in listed["Tags"] if tag["Key"] == "ray-cluster-name")
    ended = _TRANSITION.search(listed.get("StateTransitionReason") or "")
    state = listed["State"]["Name"]
    return Instance(
        cluster=tag.rpartition("-")[0],
        start=listed["LaunchTime"].timestamp(),
        end=_time(ended[1]) if ended and state in ("terminated", "shutting-down", "stopped") else None,
        running=state in ("pending", "running"),
        origin=INSTANCES_ORIGIN,
    )


def _time(text: str) -> float:
    return datetime.datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=datetime.UTC).timestamp()


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(one_line(error)[:150])


def _client(service: str, region: str | None, **options: Any) -> Any:
    try:
        import botocore.config
        import botocore.session

        settings = botocore.config.Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2})
        return botocore.session.Session().create_client(service, region_name=region, config=settings, **options)
    except Exception as error:  # botocore or the region may be missing, or the configuration may be broken
        raise _unavailable(error) from error
