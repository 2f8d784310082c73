"""A machine that ends in its set-up: its record in the bucket, the price that it counts at, and the controller's."""

import os

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from clouds import catalog, sky_records, skypilot
from clouds.base import MachineRecord, Offer, Unavailable
from clouds.providers import CLOUDS
from core.run.reader import spent_usd_at_most
from core.task import MachineChoice, MachineRequest, TaskSpec, Workload, read_task
from launch import node_prices
from launch.node import __main__ as node
from launch.node import arrival, switch

ATTEMPT = "20261130T120000Z-setup-7"


@pytest.fixture
def run_url(bucket, monkeypatch) -> str:
    """A run in a bucket of the S3 server, as container.sh names it to the program."""
    for name in ("BUCKET_SESSION_TOKEN", "USD_PER_HOUR", "SEGMENT_STARTED_AT"):
        monkeypatch.delenv(name, raising=False)
    for ours, theirs in (
        ("BUCKET_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
        ("BUCKET_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"),
    ):
        monkeypatch.setenv(ours, os.environ.get(ours) or os.environ[theirs])
    monkeypatch.setenv("BUCKET", bucket)
    monkeypatch.setenv("RUN", "one")
    monkeypatch.setenv("USD_PER_HOUR_AT_MOST", "36")
    return f"{bucket}/runs/one"


def test_a_set_up_that_fails_counts_under_the_cap(run_url, monkeypatch):
    monkeypatch.setenv("SEGMENT_STARTED_AT", "1000000000")
    assert arrival.main(["begin", ATTEMPT]) == 0
    assert spent_usd_at_most(run_url) > 36.0
    assert arrival.main(["end", ATTEMPT]) == 0
    assert spent_usd_at_most(run_url) > 36.0


def test_without_a_price_there_is_no_record(run_url, monkeypatch):
    monkeypatch.delenv("USD_PER_HOUR_AT_MOST")
    assert arrival.main(["begin", ATTEMPT]) == 0
    assert spent_usd_at_most(run_url) == 0.0


def test_a_bucket_that_refuses_is_one_sentence(run_url, monkeypatch):
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "http://127.0.0.1:9")
    said = arrival.main(["begin", ATTEMPT])
    assert said.startswith(f"{run_url} did not take this machine's record, so that its set-up does not count")


def test_an_object_is_signed_as_botocore_signs_it():
    keys = {"AccessKeyId": "AKIA1", "SecretAccessKey": "secret/+", "Token": "token=="}
    now, url, body = "20261130T120000Z", "https://s3.eu-north-1.amazonaws.com/b/runs/a%20b/x.json", "{}\n"
    ours = switch.signed(url, "eu-north-1", body, keys, now, "PUT", "s3")
    theirs = AWSRequest("PUT", url, data=body.encode(), headers={"Content-Type": ours["content-type"]})
    theirs.context |= {"timestamp": now, "payload_signing_enabled": True}
    theirs.headers["X-Amz-Date"], theirs.headers["X-Amz-Security-Token"] = now, keys["Token"]
    signer = S3SigV4Auth(Credentials(keys["AccessKeyId"], keys["SecretAccessKey"], keys["Token"]), "s3", "eu-north-1")
    theirs.headers["X-Amz-Content-SHA256"] = signer.payload(theirs)
    text = signer.string_to_sign(theirs, signer.canonical_request(theirs))
    assert ours["authorization"].rpartition("Signature=")[2] == signer.signature(text, theirs)


# --- prices ----------------------------------------------------------------------------------------------------


def offer(kind: str, usd: float | None, spot: float | None = None) -> Offer:
    return Offer("aws", "us-east-1", None, kind, None, 0, 8.0, 32.0, None, usd, spot)


def task_with(*requests: MachineRequest, nodes: int = 1) -> TaskSpec:
    return TaskSpec("t.yaml", "t", nodes, False, requests, Workload(None), {}, None)


@pytest.mark.parametrize(
    ("requests", "nodes", "usd"),
    [
        ([MachineRequest(instance_type="small")], 1, 1.0),
        ([MachineRequest(instance_type="small"), MachineRequest(instance_type="large")], 2, 6.0),
        ([MachineRequest(instance_type="large", spot=True)], 1, 3.0),
        ([MachineRequest(instance_type="large", spot=True, max_usd_per_hour=2.0)], 1, 2.0),
        ([MachineRequest(instance_type="large", max_usd_per_hour=2.0)], 1, None),
        ([MachineRequest(instance_type="unpriced")], 1, None),
    ],
)
def test_a_machine_counts_at_the_highest_price_that_it_may_have(requests, nodes, usd):
    offers = [offer("small", 1.0), offer("large", 3.0, 0.5), offer("unpriced", None)]
    assert node_prices.at_most(task_with(*requests, nodes=nodes), offers) == usd


def test_a_launch_tells_its_nodes(monkeypatch):
    monkeypatch.setattr(node_prices, "controller_usd_per_hour", lambda: 0.192)
    task = read_task("sky/pretrain-8xa100-spot.yaml", {}, MachineChoice())
    told = node_prices.declared(task, {"A": "b"})
    assert told["CONTROLLER_USD_PER_HOUR"] == "0.192"
    assert 10 < float(told["USD_PER_HOUR_AT_MOST"]) < 100
    assert node_prices.declared(task, {"USD_PER_HOUR_AT_MOST": "1", "CONTROLLER_USD_PER_HOUR": "2"}) == {
        "USD_PER_HOUR_AT_MOST": "1",
        "CONTROLLER_USD_PER_HOUR": "2",
    }
    on_demand = read_task("sky/pretrain-8xa100.yaml", {}, MachineChoice())
    assert "CONTROLLER_USD_PER_HOUR" not in node_prices.declared(on_demand, {})


def test_the_controllers_price_is_that_of_the_records_else_of_the_catalog(monkeypatch):
    records: list[MachineRecord] = []
    monkeypatch.setattr(skypilot, "setting", lambda *keys: None)
    monkeypatch.setattr(sky_records, "machine_records", lambda clusters: records)
    monkeypatch.setattr(catalog, "of_skypilot", lambda cloud: (offer("m6i.xlarge", 0.192), offer("m6i.large", 0.1)))
    assert node_prices.controller_usd_per_hour() == 0.192
    records.append(MachineRecord("sky-jobs-controller-1a2b3c4d", 1.0, None, "test", usd_per_hour=0.3))
    records.append(MachineRecord("sky-jobs-controller-1a2b3c4d", 0.5, 0.7, "test", usd_per_hour=0.4))
    assert node_prices.controller_usd_per_hour() == 0.3
    monkeypatch.setattr(skypilot, "setting", lambda *keys: True)
    assert node_prices.controller_usd_per_hour() is None


def test_without_skypilot_the_controllers_price_is_unknown(monkeypatch):
    def missing(*_: object) -> None:
        raise Unavailable("SkyPilot is not installed")

    monkeypatch.setattr(skypilot, "setting", missing)
    assert node_prices.controller_usd_per_hour() is None


@pytest.mark.parametrize("missing", ["CONTROLLER_USD_PER_HOUR", "SUBMITTED_AT", "SKYPILOT_MANAGED_JOB_ID"])
def test_a_node_knows_its_controller_or_none(missing):
    environment = {"CONTROLLER_USD_PER_HOUR": "0.2", "SUBMITTED_AT": "1796040000", "SKYPILOT_MANAGED_JOB_ID": "3"}
    found = node.controller(environment)
    assert (found.since, found.usd_per_hour) == (1796040000.0, 0.2)
    assert node.controller({**environment, missing: ""}) is None


def test_every_cloud_has_offers_for_the_tasks():
    """Otherwise a set-up that fails there would count as nothing."""
    offers = [offer for cloud in CLOUDS.values() for offer in cloud.offers()]
    for name in ("pretrain-8xa100", "pretrain-gh200", "prep-data", "smoke-cpu"):
        assert node_prices.at_most(read_task(f"sky/{name}.yaml", {}, MachineChoice()), offers), name
