"""Finds running machines and volumes on EC2 with this project's label or SkyPilot's tags, in every region.

    leftovers(boto3.session.Session(), whose)

If a region refuses, the others are still listed. Needs ec2:DescribeRegions, ec2:DescribeInstances and
ec2:DescribeVolumes.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from clouds.base import LABEL, Inventory, Leftover, Ownership
from core import secrets
from core.errors import one_line
from core.stores.aws import DEFAULT_REGION

# A machine in one of these states is a leftover. While a machine is shutting down, EC2 bills its volumes, but not the
# machine. A terminated machine is gone.
STATES = ("pending", "running", "stopping", "stopped", "shutting-down")
CLUSTER_TAG, USER_TAG = "ray-cluster-name", "skypilot-user"
PARALLEL_REGIONS = 8
# List price of a gp3 volume in us-east-1; SkyPilot's default disks are of this type.
USD_PER_GB_MONTH = 0.08


def leftovers(session: Any, whose: Ownership) -> Inventory:
    """Resources of all enabled regions that may belong to this project.

    Raises botocore's error if the regions cannot be listed.
    """
    client = _client(session, session.region_name or DEFAULT_REGION)
    names = sorted(region["RegionName"] for region in client.describe_regions()["Regions"])
    # boto3 can create clients in one thread only. A client can then be used in any thread.
    clients = [(name, _client(session, name)) for name in names]
    with ThreadPoolExecutor(PARALLEL_REGIONS) as pool:
        answers = list(pool.map(lambda each: _in_region(*each, whose), clients))
    return Inventory(
        tuple(found for answer in answers for found in answer.found),
        tuple(sentence for answer in answers for sentence in answer.unasked),
    )


def _client(session: Any, region: str) -> Any:
    import botocore.config

    settings = botocore.config.Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 3})
    return session.client("ec2", region_name=region, config=settings)


def _in_region(region: str, client: Any, whose: Ownership) -> Inventory:
    found: list[Leftover] = []
    unasked: list[str] = []
    for what, ask in (("instances", _instances), ("volumes", _volumes)):
        try:
            found += ask(region, client, whose)
        except Exception as error:  # any error of botocore, such as permissions or network
            why = secrets.scrub(one_line(error))[:200]
            unasked.append(f"aws {region}: could not be asked for {what} ({why})")
    return Inventory(tuple(found), tuple(unasked))


def _instances(region: str, client: Any, whose: Ownership) -> Iterator[Leftover]:
    filters = [_tagged(), {"Name": "instance-state-name", "Values": list(STATES)}]
    for page in client.get_paginator("describe_instances").paginate(Filters=filters):
        for each in (instance for group in page["Reservations"] for instance in group["Instances"]):
            number = each["InstanceId"]
            state = each["State"]["Name"]
            disk = _disk(client, each) if state == "stopped" else ""
            what = f"aws {region}: {each['InstanceType']} {number} ({state}{disk})"
            end = partial(client.terminate_instances, InstanceIds=[number])
            yield from attributed(what, each, end, whose)


def _volumes(region: str, client: Any, whose: Ownership) -> Iterator[Leftover]:
    """Volumes that were not deleted together with their machine.

    Such a volume is listed as available once the machine is gone.
    """
    filters = [_tagged(), {"Name": "status", "Values": ["available"]}]
    for page in client.get_paginator("describe_volumes").paginate(Filters=filters):
        for each in page["Volumes"]:
            what = f"aws {region}: unattached volume {each['VolumeId']}, {_priced(each['Size'])}"
            end = partial(client.delete_volume, VolumeId=each["VolumeId"])
            yield from attributed(what, each, end, whose)


def _disk(client: Any, instance: Mapping[str, Any]) -> str:
    """The disks of a stopped machine, which are billed until it is terminated."""
    numbers = [each["Ebs"]["VolumeId"] for each in instance.get("BlockDeviceMappings") or () if "Ebs" in each]
    listed = client.describe_volumes(VolumeIds=numbers)["Volumes"] if numbers else []
    return "".join(f"; disk {each['VolumeId']}, {_priced(each['Size'])}" for each in listed)


def _priced(size_gb: int) -> str:
    return f"{size_gb} GB, about ${size_gb * USD_PER_GB_MONTH:.2f} a month"


def _tagged() -> dict[str, Any]:
    """A filter for resources that have this project's label or SkyPilot's tag.

    EC2 joins several filters by `and`, but the values of one filter by `or`. So both keys are values of one filter.
    """
    return {"Name": "tag-key", "Values": [LABEL[0], CLUSTER_TAG]}


def attributed(what: str, described: Mapping[str, Any], end: Any, whose: Ownership) -> Iterator[Leftover]:
    """Yields the leftover, unless the resource certainly belongs to another project."""
    tags = {tag["Key"]: tag["Value"] for tag in described.get("Tags") or ()}
    cluster, labelled = tags.get(CLUSTER_TAG, ""), tags.get(LABEL[0]) == LABEL[1]
    if cluster in whose.others:
        return
    if whose.is_mine(cluster, labelled):
        yield Leftover(f"{what} of {cluster}", mine=True, labelled=labelled, cluster=cluster, end=end)
    elif labelled or whose.is_by_this_user(cluster) or whose.is_named_as_ours(cluster):
        starter = f"by {tags[USER_TAG]}" if tags.get(USER_TAG) else "by an unknown user"
        said = f"{what} of {cluster or 'no cluster'}, started {starter}, not known to SkyPilot here"
        yield Leftover(said, labelled=labelled, cluster=cluster, end=end)
