"""What AWS itself says: when instances ran, what spot cost in a zone and hour, the bill by tag (Cost Explorer).

Uses botocore, where it is installed. Reads only; needs ec2:DescribeInstances, ec2:DescribeSpotPriceHistory and
ce:GetCostAndUsage.
"""

import datetime
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from clouds.base import Instance, Unavailable
from core import storage
from core.stores import aws as bucket_place
from core.stores import credentials

PRICE_SOURCE = "AWS spot price history"
# "User initiated (2026-11-20 08:46:56 UTC)"; EC2 writes GMT.
_TRANSITION = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


def spot_history(
    zone: str, instance_type: str, region: str | None, start: float, end: float, client: Any = None
) -> list[tuple[float, float]]:
    """(from when, dollars per hour of one node), for a zone and type from `start` to `end` (unix seconds).

    AWS charges the price in force. Its answer begins with the price that was in force at `start`. Raises Unavailable.
    """
    ec2 = client or _client("ec2", region)
    try:
        pages = ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=[instance_type],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=_utc(start),
            EndTime=_utc(end),
            **_zone(zone),
        )
        return [
            (entry["Timestamp"].timestamp(), float(entry["SpotPrice"]))
            for page in pages
            for entry in page["SpotPriceHistory"]
        ]
    except Exception as error:  # credentials, permissions, network: whatever botocore raises
        raise Unavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error


def instances(clusters: Iterable[str], region: str, client: Any = None) -> list[Instance]:
    """The instances of SkyPilot's clusters in a region; EC2 lists a terminated one for about an hour.

    SkyPilot tags an instance with the name of its cluster followed by a hash of the user. Raises Unavailable.
    """
    ec2 = client or _client("ec2", region)
    names = list(clusters)
    found = []
    try:
        pages = ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": "tag:ray-cluster-name", "Values": [f"{name}-*" for name in names]}]
        )
        for instance in (i for page in pages for group in page["Reservations"] for i in group["Instances"]):
            tag = next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == "ray-cluster-name")
            ended = _TRANSITION.search(instance.get("StateTransitionReason") or "")
            state = instance["State"]["Name"]
            found.append(
                Instance(
                    cluster=tag.rpartition("-")[0],
                    start=instance["LaunchTime"].timestamp(),
                    end=_time(ended.group(1))
                    if ended and state in ("terminated", "shutting-down", "stopped")
                    else None,
                    running=state in ("pending", "running"),
                )
            )
    except Exception as error:  # credentials, permissions, network: whatever botocore raises
        raise Unavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    return found


def weighted(history: list[tuple[float, float]], start: float, end: float) -> float:
    """Mean price over [start, end], weighted by time. Raises Unavailable if the history begins after `start`."""
    changes = sorted(history)
    if not changes or changes[0][0] > start or end <= start:
        raise Unavailable("its history does not reach back to the start")
    total = 0.0
    for (since, price), until in zip(changes, [when for when, _ in changes[1:]] + [end], strict=True):
        total += price * max(0.0, min(until, end) - max(since, start))
    return total / (end - start)


def billed_usd(tag: str, value: str, start: float, end: float, client: Any = None) -> dict[str, float]:
    """Unblended dollars by service that Cost Explorer has for a cost allocation tag, whole days. Raises Unavailable."""
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
    try:
        while True:
            answer = explorer.get_cost_and_usage(**arguments)
            for day in answer["ResultsByTime"]:
                for group in day["Groups"]:
                    _add(by_service, group)
            if not answer.get("NextPageToken"):
                break
            arguments["NextPageToken"] = answer["NextPageToken"]
    except Unavailable:
        raise
    except Exception as error:  # not enabled, no permission, no network
        raise Unavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    if not by_service:
        raise Unavailable(f"Cost Explorer has nothing under {tag}={value} yet (it lags by up to a day)")
    return by_service


def _add(by_service: dict[str, float], group: Mapping[str, Any]) -> None:
    cost = group["Metrics"]["UnblendedCost"]
    if cost["Unit"] != "USD":
        raise Unavailable(f"the bill is in {cost['Unit']}, not USD")
    name = group["Keys"][0]
    by_service[name] = by_service.get(name, 0.0) + float(cost["Amount"])


def _zone(zone: str) -> dict[str, str]:
    """Zones have names (us-east-1a) and, in SkyPilot's catalog, ids (use1-az1)."""
    return {"AvailabilityZoneId": zone} if "-az" in zone else {"AvailabilityZone": zone}


def _time(text: str) -> float:
    return datetime.datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=datetime.UTC).timestamp()


def unfinished_uploads(run_url: str) -> int | None:
    """Uploads in parts below a run that are not complete; None where the store cannot be asked for them."""
    terms = storage.terms_of(run_url)
    if terms.service not in bucket_place.SERVICES:
        return None
    prefix = run_url.partition(f"{terms.bucket}/")[2].rstrip("/") + "/"
    try:
        profile = credentials.profile_settings(os.environ)
        place = bucket_place.place_of(terms.bucket, os.environ, profile)
        provider = credentials.for_s3(os.environ)
        keys = provider() if provider else {}
        client = _client("s3", place.region, endpoint_url=place.endpoint, **_in_botocores_names(keys))
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=terms.bucket, Prefix=prefix)
        return sum(len(page.get("Uploads", ())) for page in pages)
    except Exception:  # no right to list them, a server that does not: not worth a line of the report
        return None


def _in_botocores_names(keys: Mapping[str, Any]) -> dict[str, Any]:
    names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
    names |= {"token": "aws_session_token"}
    return {names[name]: value for name, value in keys.items() if name in names}


def _utc(time: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time, datetime.UTC)


def _client(service: str, region: str | None, **options: Any) -> Any:
    try:
        import botocore.config
        import botocore.session

        settings = botocore.config.Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2})
        return botocore.session.Session().create_client(service, region_name=region, config=settings, **options)
    except Exception as error:  # no botocore, no region, broken configuration
        raise Unavailable(f"{type(error).__name__}: {error}") from error
