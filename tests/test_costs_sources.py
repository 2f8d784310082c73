"""What SkyPilot, AWS and the store add to the ledger, and what launchers' own reports get wrong."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from clouds import catalog
from clouds.aws import INSTANCES_ORIGIN, PRICE_SOURCE, Aws
from clouds.base import Bill, Cloud, Instance, SpotHistory, Unavailable
from clouds.sky_records import from_record
from core.run.reader import read_run
from costs import discover, tables
from costs.model import StorageUse
from costs.report import CostReport, build
from costs.sources import ask_others
from tests.conftest import REPOSITORY
from tests.golden import NOON, GoldenRun, span
from tests.patience import PATIENCE_SECONDS

LATER = NOON + 86400


def find_distribution(name: str) -> list:
    return list(metadata.distributions(name=name))


@pytest.fixture(autouse=True)
def _machines_alone(monkeypatch):
    """Disks and addresses are in tests/test_costs_beside.py."""
    monkeypatch.setattr(catalog, "extras", lambda _: {})


def record(*intervals: tuple[float, float | None], price: float | None = 36.0, **fields) -> dict:
    """A record as `sky.get(sky.cost_report())` gives it (0.14.1), for the cluster `gpt2-7`."""

    def get_cost(seconds: float) -> float:
        if price is None:
            raise ValueError("Instance type 'p4d.24xlarge' not found")
        return price * seconds / 3600

    resources = SimpleNamespace(
        cloud="AWS",
        region="us-east-1",
        zone="us-east-1a",
        instance_type="p4d.24xlarge",
        use_spot=False,
        get_cost=get_cost,
    )
    return {
        "name": "gpt2-7",
        "num_nodes": 1,
        "resources": resources,
        "usage_intervals": list(intervals),
        "status": None,
        "node_names": "i-1",
        "total_cost": 880.0,
    } | fields


def one_segment(folder: Path, *, killed: bool = False, **machine) -> GoldenRun:
    """A machine of cluster gpt2-7 that wrote a ledger for 100 s from noon on."""
    run = GoldenRun(folder / "runs" / "one")
    events = [span(NOON, NOON + 100, setup=20.0, train=80.0)]
    if not killed:
        events.append({"event": "end", "time": NOON + 100, "reason": "finished", "step": 1})
    run.segment(1, NOON, events, **{"usd_per_hour": 36.0, "spot": False} | machine)
    named = run.path / "ledger/segment-000001/start.jsonl"
    named.write_text(named.read_text().replace('"program": {}', '"launcher": {"cluster": "gpt2-7"}'))
    return run


def merged(run: GoldenRun, *records: dict, now: float = LATER, aws: Cloud | None = None, **sources):
    read = read_run(run.url)
    sources = {"records": lambda _: [found for each in records for found in from_record(each)]} | sources
    outside = ask_others(read, {}, now, clouds={"aws": aws or Closed()}, **sources)
    return outside, build(read, now, outside=outside)


class Closed(Cloud):
    """A provider without credentials."""

    def instances(self, clusters, region):
        raise Unavailable("NoCredentialsError")

    def paid_spot(self, machine, start, end):
        raise Unavailable("NoCredentialsError")


class Listing(Closed):
    """A provider that lists these instances."""

    def __init__(self, *instances: Instance):
        self._instances = list(instances)

    def instances(self, clusters, region):
        return self._instances


class Pricing(Closed):
    """A provider with this history of spot prices; `asked` holds the questions."""

    def __init__(self, *changes: tuple[float, float]):
        self._history, self.asked = SpotHistory(changes, PRICE_SOURCE), []

    def paid_spot(self, machine, start, end):
        self.asked.append((machine.zone, machine.instance_type, machine.region, start, end))
        return self._history


def usd(report: CostReport) -> dict[str, float | None]:
    return {line.name: line.usd for line in report.phases if line.seconds}


def test_the_launch_before_and_the_idle_time_after_are_paid(tmp_path: Path):
    _, report = merged(one_segment(tmp_path), record((NOON - 60, NOON + 400)))
    assert usd(report) == {"provision": 0.60, "setup": 0.20, "train_kept": 0.80, "idle_until_down": 3.00}
    assert report.total.usd == 4.60
    assert report.segments[0].usd == 4.60


def test_a_cluster_that_is_still_up_costs_until_now(tmp_path: Path):
    _, report = merged(one_segment(tmp_path), record((NOON, None), status="UP"), now=NOON + 1000)
    assert usd(report)["idle_until_down"] == 9.00


def test_a_launch_that_never_got_a_machine_costs_nothing(tmp_path: Path):
    """SkyPilot issue 1751: an interval opens at the launch attempt, and its report charges for it."""
    phantom = record((NOON - 3000, NOON - 2000), node_names=None)
    _, report = merged(one_segment(tmp_path), record((NOON, NOON + 100)), phantom)
    assert report.total.usd == 1.00
    notes = " ".join(report.notes)
    assert "a launch of gpt2-7 failed after 16 min 40 s, and no machine of this launch is known" in notes
    assert "nothing is counted for it (it cost at most $10.00)" in notes


def test_a_machine_that_died_while_it_was_set_up_is_paid_and_shown(tmp_path: Path):
    run = one_segment(tmp_path)
    start = run.path / "ledger/segment-000001/start.jsonl"
    start.write_text(start.read_text().replace('{"cluster": "gpt2-7"}', '{"cluster": "gpt2-7", "managed_job_id": "7"}'))
    _, report = merged(run, record((NOON - 900, NOON - 600)), record((NOON, NOON + 100)), jobs=list)
    assert usd(report)["provision"] == 3.00
    assert [(line.name, line.usd, line.end) for line in report.segments[1:]] == [("– gpt2-7", 3.00, "no ledger")]
    assert sum(line.usd for line in report.segments) == report.total.usd == 4.00


def test_a_preempted_machine_is_not_paid_until_somebody_noticed(tmp_path: Path):
    _, report = merged(one_segment(tmp_path, killed=True, spot=True), record((NOON, NOON + 130)))
    assert report.total.usd == 1.00
    assert "this is taken for the delay in noticing its end" in " ".join(report.notes)


def test_a_killed_process_on_a_machine_that_stayed_up_is_paid(tmp_path: Path):
    _, report = merged(one_segment(tmp_path, killed=True), record((NOON, NOON + 1000)))
    assert usd(report)["idle_until_down"] == 9.00


def test_each_recovery_of_a_managed_job_is_its_own_machine(tmp_path: Path):
    """SkyPilot issue 1670: the cost of a spot job across recoveries. Its records share a name."""
    run = one_segment(tmp_path, killed=True, spot=True)
    second = NOON + 300
    events = [span(second, second + 50, train=50.0), {"event": "end", "time": second + 50, "reason": "finished"}]
    run.segment(2, second, events, usd_per_hour=36.0, spot=True)
    named = run.path / "ledger/segment-000002/start.jsonl"
    named.write_text(named.read_text().replace('"program": {}', '"launcher": {"cluster": "gpt2-7"}'))
    _, report = merged(run, record((NOON - 30, NOON + 110)), record((second - 40, second + 60)))
    assert [line.usd for line in report.segments] == [1.30, 1.00]
    assert usd(report)["provision"] == 0.70


def test_a_type_that_left_the_catalog_is_unknown_not_free(tmp_path: Path):
    """SkyPilot issue 7304: a failed price lookup there counts as zero dollars."""
    _, report = merged(one_segment(tmp_path, usd_per_hour=None), record((NOON - 60, NOON + 100), price=None))
    assert report.total.usd is None


def test_the_launchers_price_fills_in_for_provision_only_where_ours_is_missing(tmp_path: Path):
    _, report = merged(one_segment(tmp_path, usd_per_hour=18.0), record((NOON - 100, NOON + 100), price=36.0))
    assert usd(report)["provision"] == 0.50


def test_other_clusters_are_none_of_this_runs_business(tmp_path: Path):
    _, report = merged(one_segment(tmp_path), record((NOON, NOON + 100)), record((NOON, NOON + 9000), name="else-8"))
    assert report.total.usd == 1.00


def test_a_cluster_name_that_another_run_used_before_is_not_charged_twice(tmp_path: Path):
    """A task without a job of its own launches under the same name each time."""
    yesterday, before, after = (record((NOON + at, NOON + at + 3000)) for at in (-90000, -7200, 9000))
    _, report = merged(one_segment(tmp_path), yesterday, before, record((NOON - 60, NOON + 100)), after)
    assert report.total.usd == 1.60
    assert len(report.notes) == 1
    assert "was also up earlier, for 50 min 00 s ($30.00); no ledger in this bucket says" in report.notes[0]


def test_a_managed_job_is_named_with_its_recoveries(tmp_path: Path):
    run = one_segment(tmp_path)
    start = run.path / "ledger/segment-000001/start.jsonl"
    start.write_text(start.read_text().replace('{"cluster": "gpt2-7"}', '{"cluster": "gpt2-7", "managed_job_id": "7"}'))
    queue = [{"job_id": 7, "status": "SUCCEEDED", "recovery_count": 2, "job_duration": 482.0}]
    read, _ = merged(run, record((NOON, NOON + 100)), jobs=lambda: [*queue, {"job_id": 8, "status": "RUNNING"}])
    assert [(origin.figure, origin.source) for origin in read.origins if "job" in origin.figure] == [
        ("managed job 7", "SUCCEEDED, 2 recoveries, 8 min 02 s running, by SkyPilot's queue")
    ]


def test_time_over_midnight_is_cut_by_day(tmp_path: Path):
    _, report = merged(one_segment(tmp_path), record((NOON, NOON + 50000)), now=NOON + 90000)
    assert [line.name for line in report.by["day"]] == ["2026-11-20", "2026-11-21"]
    assert [line.seconds for line in report.by["day"]] == [43200, 6800]


def test_paid_spot_prices_replace_what_the_launch_expected(tmp_path: Path):
    history = Pricing((NOON - 500, 18.0), (NOON + 75, 36.0))
    _, report = merged(one_segment(tmp_path, spot=True), aws=history)
    assert history.asked == [("us-east-1a", "p4d.24xlarge", "us-east-1", NOON, NOON + 100)]
    assert report.segments[0].usd_per_hour == pytest.approx(22.5)
    assert report.segments[0].price_source == "AWS spot price history, us-east-1a"


def test_what_a_source_cannot_say_is_an_origin_with_its_reason(tmp_path: Path):
    def absent(_):
        raise Unavailable("SkyPilot is not installed")

    _, report = merged(one_segment(tmp_path, spot=True), records=absent)
    origins = {origin.figure: origin.source for origin in report.origins}
    assert origins["launch, idle until down"] == "? (SkyPilot is not installed)"
    assert origins["paid spot prices"] == "? (NoCredentialsError)"
    assert report.total.usd == 1.00


def test_the_history_must_reach_back_to_the_start():
    assert SpotHistory(((0.0, 2.0), (50.0, 4.0)), "x").mean(0.0, 100.0) == pytest.approx(3.0)
    for changes in ((), ((10.0, 2.0),)):
        with pytest.raises(Unavailable, match="does not reach back"):
            SpotHistory(changes, "x").mean(0.0, 100.0)


def test_the_bill_stands_beside_the_report_for_reconciliation(tmp_path: Path):
    class Billing(Closed):
        def bill(self, tag, value, start, end):
            return Bill("Cost Explorer", {"EC2": 1.01, "S3": 0.2})

    read = read_run(one_segment(tmp_path).url)
    clouds = {"aws": Billing(), "other": Cloud()}
    outside = ask_others(read, {"COST_TAG": "run=gpt2"}, LATER, records=lambda _: [], clouds=clouds)
    assert outside.origins[-1].source == "Cost Explorer, run=gpt2, whole days: $1.21 (EC2 1.01, S3 0.20)"


def test_storage_is_counted_with_its_rate(tmp_path: Path):
    run = one_segment(tmp_path)
    run.write("checkpoints/step-00000001/model.bin", "x" * 1000)
    outside, _ = merged(run)
    assert outside.storage.checkpoint_bytes == 1000
    assert outside.storage.bytes > 1000
    assert outside.storage.rates is None


def test_uploads_that_were_cut_off_are_counted(s3, bucket):
    where, run = bucket.removeprefix("s3://tests/"), f"{bucket}/run"
    for key in (f"{where}/run/a", f"{where}/run/b", f"{where}/run-2/a"):
        s3._client().create_multipart_upload(Bucket="tests", Key=key)
    assert Aws().unfinished_uploads(run) == 2
    assert Aws().unfinished_uploads("memory://run") is None
    use = StorageUse(1, 1000, 0, discover.RATES["aws"], None, 2)
    assert tables.storage_rows(SimpleNamespace(storage=use))[-1] == (
        "unfinished multipart uploads",
        "2",
        "their parts are billed",
    )


def test_each_service_has_its_own_rates_or_none(monkeypatch):
    for name in ("BUCKET_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert discover.rates_for("s3://b/runs/x").name == "S3 Standard"
    assert discover.rates_for("gs://b/runs/x").name == "Cloud Storage Standard"
    assert discover.rates_for("az://account/container/runs/x") is None
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "https://0f.r2.cloudflarestorage.com")
    assert discover.rates_for("s3://b/runs/x").name == "Cloudflare R2"
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert discover.rates_for("s3://b/runs/x") is None


@pytest.mark.skipif(bool(find_distribution("skypilot")), reason="SkyPilot is installed: nothing to mistake for it")
def test_the_projects_own_sky_folder_is_not_taken_for_skypilot(tmp_path: Path):
    (tmp_path / "sky").mkdir()
    (tmp_path / "sky" / "train.yaml").write_text("name: x\n")
    code = (
        "from clouds import skypilot\nfrom clouds.base import Unavailable\n"
        "try:\n    skypilot.package()\nexcept Unavailable as error:\n    print(error)\n"
        "import sys; print('sky' in sys.modules)"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout.splitlines() == ["SkyPilot is not installed", "False"], done.stderr


def test_the_clouds_own_times_come_before_the_launchers(tmp_path: Path):
    """SkyPilot's interval opens before the machine is there and closes when it noticed; EC2 knows both."""
    listed = [
        Instance("gpt2-7", NOON - 40, NOON + 102, False, INSTANCES_ORIGIN),
        Instance("gpt2-7", NOON - 9000, NOON - 8000, False, INSTANCES_ORIGIN),
    ]
    run = one_segment(tmp_path, killed=True, spot=True)
    read, report = merged(run, record((NOON - 60, NOON + 130)), aws=Listing(*listed))
    assert usd(report) == {"provision": 0.40, "setup": 0.20, "train_lost": 0.80, "not_attributed": 0.02}
    assert {origin.figure: origin.source for origin in read.origins}["launch, idle until down"] == INSTANCES_ORIGIN


@pytest.mark.parametrize(
    ("instance", "total"),
    [
        (Instance("gpt2-7", NOON - 40, None, True, INSTANCES_ORIGIN), 10.40),  # up until now
        (
            Instance("gpt2-7", NOON - 40, None, False, INSTANCES_ORIGIN),
            4.40,
        ),  # gone, the cloud does not say when: the record does
    ],
)
def test_an_end_that_the_cloud_does_not_tell_is_not_made_up(tmp_path: Path, instance: Instance, total: float):
    run = one_segment(tmp_path)
    _, report = merged(run, record((NOON - 60, NOON + 400)), now=NOON + 1000, aws=Listing(instance))
    assert report.total.usd == total


def test_a_price_far_from_the_expected_one_is_pointed_out(tmp_path: Path):
    _, report = merged(one_segment(tmp_path, spot=True), aws=Pricing((NOON - 1, 0.36)))
    assert "AWS spot price history has $0.36 an hour, the ledger expected $36" in " ".join(report.notes)
