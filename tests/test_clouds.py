"""Providers: a new one is one class, one CSV file and one candidate in a task; quotas and capacity of ours."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from clouds import catalog, lambda_labs, machine, providers
from clouds.aws import Aws
from clouds.base import Cloud, Finding, Gpu, Instance, Interruption, Inventory, Leftover, Ownership, SpotHistory
from clouds.lambda_labs import LambdaLabs
from clouds.providers import CLOUDS
from clouds.sky_records import from_record
from core.run.machine import Price
from core.run.reader import read_run
from core.task import MachineRequest, read_task
from costs.forecast import Assumptions, forecast_of
from costs.sources import ask_others
from launch import check, left
from tests.golden import NOON
from tests.patience import PATIENCE_SECONDS
from tests.sky_tasks import write
from tests.test_costs_sources import one_segment, record
from trainer.loop.requests import SpotWatch, StopRequests


class Nimbus(Cloud):
    """A provider with everything that the project can ask for."""

    name = "nimbus"

    def offers(self):
        return catalog.snapshot(self.name)

    def facts(self, known, environment):
        return dataclasses.replace(known, instance_type="n8", spot=False)

    def price(self, facts):
        return Price(self.offers()[0].usd_on_demand, "Nimbus' list")

    def interruptions(self, environment):
        return lambda: Interruption(True, "closes at noon")

    def capacity_findings(self, task):
        yield Finding("!", f"capacity: nimbus has no {task.requests[0].accelerator} now")

    def is_configured(self):
        return True

    def leftovers(self, whose):
        return Inventory((Leftover(f"nimbus: a forgotten machine of {whose.tasks[0]}"),))

    def instances(self, clusters, region):
        return [Instance(clusters[0], NOON - 10, NOON + 100, False, "Nimbus' own list")]

    def paid_spot(self, machine, start, end):
        return SpotHistory(((NOON - 500, 18.0),), "Nimbus' prices")


@pytest.fixture
def nimbus(tmp_path, monkeypatch) -> Nimbus:
    rows = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,SpotPrice\n"
    (tmp_path / "catalog/nimbus").mkdir(parents=True)
    (tmp_path / "catalog/nimbus/vms.csv").write_text(f"{rows}n8,A100,8,96,1000,10.0,north,4.0\n")
    for name in ("aws", "lambda", "extras.csv"):
        (tmp_path / "catalog" / name).symlink_to(catalog.FOLDER / name)
    monkeypatch.setattr(catalog, "FOLDER", tmp_path / "catalog")
    monkeypatch.setitem(CLOUDS, "nimbus", Nimbus())
    yield CLOUDS["nimbus"]
    catalog.snapshot.cache_clear()
    catalog.extras.cache_clear()


def test_a_new_cloud_is_one_class_one_file_and_one_candidate(nimbus, tmp_path, monkeypatch):
    path = write(tmp_path, "accelerators: A100:8\nany_of: [{infra: aws}, {infra: nimbus}]")
    task = read_task(path, {})
    rows = forecast_of(task, providers.load(offline=True), Assumptions(), None).rows
    assert (rows[0].offer.cloud, rows[0].usd_per_hour) == ("nimbus", 10.0)
    assert {row.offer.cloud for row in rows} == {"nimbus", "aws"}
    assert check.cloud_names(task) == ["aws", "nimbus"]
    assert [str(found) for found in check.check_capacity(task, {})] == [" !  capacity: nimbus has no A100 now"]
    (secrets,) = check.check_secrets(task, {})
    assert (secrets.mark, "a node on nimbus could not reach the bucket" in secrets.what) == ("!", True)
    survey = left.Survey()
    for name in ("aws", "lambda"):
        monkeypatch.setitem(CLOUDS, name, Cloud())
    left.ask_clouds(Ownership(("x",)), survey)
    assert survey.found == ["nimbus: a forgotten machine of x"]


def test_a_node_of_a_new_cloud_knows_its_price_and_hears_its_notices(nimbus):
    info = json.dumps({"cloud": "Nimbus", "region": "north"})
    found = machine.describe({"SKYPILOT_CLUSTER_INFO": info, "SKYPILOT_NUM_NODES": "2"}, [])
    assert found["USD_PER_HOUR"] == "20"
    assert (found["INSTANCE_TYPE"], found["PRICE_SOURCE"], found["USE_SPOT"]) == ("n8", "Nimbus' list", "false")
    requests = StopRequests()
    watch = SpotWatch(requests, {"CLOUD": "Nimbus"}, poll_seconds=0.01)
    watch._thread.join(PATIENCE_SECONDS)
    assert (requests.stop.kind, requests.stop.detail) == ("spot", "closes at noon")


def test_a_report_asks_a_new_cloud(nimbus, tmp_path):
    run = read_run(one_segment(tmp_path, cloud="nimbus", spot=True, instance_type="n8").url)
    seen = [record((NOON - 60, NOON + 130))]
    seen[0]["resources"].cloud = "Nimbus"
    outside = ask_others(run, {}, NOON + 999, records=lambda _: from_record(seen[0]), clouds={"nimbus": nimbus})
    assert {origin.figure: origin.source for origin in outside.origins}["launch, idle until down"] == "Nimbus' own list"
    assert [(time.phase, time.end - time.start) for time in outside.times] == [("provision", 10)]
    assert run.segments[0].price == Price(18.0, "Nimbus' prices, us-east-1a")


def test_a_cloud_that_answers_nothing_is_no_error(tmp_path):
    silent, task = Cloud(), read_task(write(tmp_path, "accelerators: A100:8"), {})
    assert (silent.offers(), silent.leftovers(Ownership()), silent.instances(["x"], "r")) == ((), Inventory(), [])
    assert list(silent.quota_findings(task)) == list(silent.capacity_findings(task)) == []
    assert silent.interruptions({}) is silent.bill("a", "b", 0, 1) is silent.unfinished_uploads("s3://b/x") is None


def test_a_cloud_that_does_not_answer_hides_no_other_clouds_findings(nimbus, tmp_path, monkeypatch):
    class Silent(Cloud):
        def capacity_findings(self, task):
            raise OSError("timed out")

    monkeypatch.setitem(CLOUDS, "aws", Silent())
    path = write(tmp_path, "accelerators: A100:8\nany_of: [{infra: aws}, {infra: nimbus}]")
    assert [str(found) for found in check.check_capacity(read_task(path, {}), {})] == [
        " ?  capacity of aws: could not be asked (OSError: timed out)",
        " !  capacity: nimbus has no A100 now",
    ]


# --- quotas and capacity ---------------------------------------------------------------------------------------


@pytest.fixture
def quotas(monkeypatch) -> dict[str, float]:
    """The account's quotas by code; a question for any other code fails."""
    limits: dict[str, float] = {}

    class Session:
        region_name = None

        def client(self, service, region_name):
            assert service == "service-quotas"
            return SimpleNamespace(get_service_quota=lambda **ask: {"Quota": {"Value": limits[ask["QuotaCode"]]}})

    monkeypatch.setattr("boto3.session.Session", Session)
    return limits


def test_quotas_are_asked_by_the_type_that_the_catalog_has_for_a_request(quotas, tmp_path):
    quotas |= {"L-417A185B": 96, "L-DB2E81BA": 0, "L-34B43A08": 64}
    resources = "any_of: [{infra: aws/us-east-2, accelerators: A100:8}, {infra: aws, accelerators: L4:1}, "
    resources += "{infra: aws, instance_type: c6i.2xlarge, use_spot: true}, {infra: lambda, accelerators: A10:1}]"
    path = write(tmp_path, resources)
    assert [str(found) for found in Aws().quota_findings(read_task(path, {}))] == [
        "ok  quota: us-east-2, p on demand: 96 vCPUs",
        " !  quota: us-east-1, g on demand: 0 vCPUs, 1 x g6.xlarge need more",
        "ok  quota: us-east-1, standard spot: 64 vCPUs",
    ]
    two_nodes = read_task(write(tmp_path, resources, more="num_nodes: 2"), {})
    assert str(next(Aws().quota_findings(two_nodes))).endswith("96 vCPUs, 2 x p4d.24xlarge need more")


def test_capacity_is_that_of_the_types_with_these_gpus(monkeypatch, tmp_path):
    here, nowhere = [{"name": "us-east-1"}], []
    types = {"gpu_8x_a100": here, "gpu_8x_a100_80gb_sxm4": nowhere, "gpu_1x_a100": here}
    answer = {name: {"regions_with_capacity_available": regions} for name, regions in types.items()}
    monkeypatch.setattr(lambda_labs, "get", lambda path: answer)
    path = write(tmp_path, "{infra: lambda, accelerators: ['A100:8', 'A100-80GB:8']}")
    assert [str(found) for found in LambdaLabs().capacity_findings(read_task(path, {}))] == [
        "ok  capacity: lambda has A100:8 now in us-east-1",
        " !  capacity: lambda has no A100-80GB:8 now",
    ]
    monkeypatch.setattr(lambda_labs, "get", lambda path: None)  # without a key
    assert list(LambdaLabs().capacity_findings(read_task(path, {}))) == []


def test_a_gpu_is_matched_by_whole_words_and_memory():
    offers = {offer.instance_type: offer for offer in providers.snapshot().offers}
    small, large = (Gpu("NVIDIA A100-SXM4", mib, "580", 0, 0) for mib in (40960.0, 81920.0))
    assert catalog.has_accelerator(offers["p4d.24xlarge"], small)
    assert not catalog.has_accelerator(offers["p4d.24xlarge"], large)
    assert not catalog.has_accelerator(offers["gpu_1x_a10"], small)
    assert catalog.fits(offers["gpu_1x_a10"], MachineRequest(cloud="lambda", accelerator="a10", accelerators=1))
