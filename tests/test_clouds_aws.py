"""AWS: prices, bills and instances are read as its services answer, checked against their own models."""

import datetime

import botocore.session
import pytest
from botocore.stub import Stubber

from clouds.aws import INSTANCES_ORIGIN, Aws, spot_prices
from clouds.base import Instance, Unavailable
from tests.golden import NOON


def client(service: str):
    return botocore.session.Session().create_client(
        service, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )


def test_spot_prices_are_read_as_ec2_answers():
    """botocore checks question and answer against the service's own model."""
    ec2 = client("ec2")
    when = datetime.datetime.fromtimestamp(NOON - 10, datetime.UTC)
    with Stubber(ec2) as stub:
        entry = {"Timestamp": when, "SpotPrice": "8.1243", "AvailabilityZone": "us-east-1a"}
        stub.add_response(
            "describe_spot_price_history",
            {"SpotPriceHistory": [entry]},
            {
                "InstanceTypes": ["p4d.24xlarge"],
                "ProductDescriptions": ["Linux/UNIX"],
                "StartTime": datetime.datetime.fromtimestamp(NOON, datetime.UTC),
                "EndTime": datetime.datetime.fromtimestamp(NOON + 60, datetime.UTC),
                "AvailabilityZone": "us-east-1a",
            },
        )
        history = spot_prices("us-east-1a", "p4d.24xlarge", "us-east-1", NOON, NOON + 60, ec2)
    assert history == [(NOON - 10, 8.1243)]


def cost_explorer(*days: dict) -> tuple:
    explorer = client("ce")
    stub = Stubber(explorer)
    stub.add_response("get_cost_and_usage", {"ResultsByTime": list(days)})
    stub.activate()
    return explorer, stub


def day(*groups: tuple[str, str], unit: str = "USD") -> dict:
    return {
        "TimePeriod": {"Start": "2026-11-20", "End": "2026-11-21"},
        "Groups": [
            {"Keys": [name], "Metrics": {"UnblendedCost": {"Amount": amount, "Unit": unit}}} for name, amount in groups
        ],
        "Estimated": True,
    }


def test_the_bill_is_summed_by_service():
    explorer, _ = cost_explorer(day(("EC2", "4.50"), ("S3", "0.10")), day(("EC2", "1.00")))
    bill = Aws().bill("run", "gpt2", NOON, NOON + 90000, explorer)
    assert bill.by_service == pytest.approx({"EC2": 5.5, "S3": 0.1})


def test_a_bill_in_another_currency_or_without_entries_is_refused():
    explorer, _ = cost_explorer(day(("EC2", "4.50"), unit="EUR"))
    with pytest.raises(Unavailable, match="in EUR, not USD"):
        Aws().bill("run", "gpt2", NOON, NOON + 60, explorer)
    explorer, _ = cost_explorer(day())
    with pytest.raises(Unavailable, match="nothing under run=gpt2 yet"):
        Aws().bill("run", "gpt2", NOON, NOON + 60, explorer)


def test_instances_are_read_as_ec2_answers():
    ec2 = client("ec2")
    tags = [{"Key": "Name", "Value": "sky-gpt2-7-ab12-head"}, {"Key": "ray-cluster-name", "Value": "gpt2-7-ab12"}]
    launched = datetime.datetime.fromtimestamp(NOON, datetime.UTC)
    gone = {"State": {"Name": "terminated"}, "StateTransitionReason": "User initiated (2026-11-20 12:05:00 GMT)"}
    up = {"State": {"Name": "running"}, "StateTransitionReason": ""}
    unsaid = {"State": {"Name": "terminated"}, "StateTransitionReason": "Server.SpotInstanceTermination"}
    listed = [{"LaunchTime": launched, "Tags": tags} | state for state in (gone, up, unsaid)]
    with Stubber(ec2) as stub:
        question = {"Filters": [{"Name": "tag:ray-cluster-name", "Values": ["gpt2-7-*"]}]}
        stub.add_response("describe_instances", {"Reservations": [{"Instances": listed}]}, question)
        found = Aws().instances(["gpt2-7"], "us-east-1", ec2)
    assert found == [
        Instance("gpt2-7", NOON, NOON + 300, False, INSTANCES_ORIGIN),
        Instance("gpt2-7", NOON, None, True, INSTANCES_ORIGIN),
        Instance("gpt2-7", NOON, None, False, INSTANCES_ORIGIN),
    ]
