"""The forecast: what fits a task, what it costs, and how well that is known."""

import dataclasses
import json
import socket
from pathlib import Path

import pytest

from clouds import providers, skypilot
from clouds.base import Offer, Unavailable
from clouds.catalog import Catalog, fits
from core.errors import ConfigError
from core.run import paid
from core.run.reader import read_run
from core.task import MachineRequest, TaskSpec, read_task
from costs import command, discover, throughput
from costs.forecast import Assumptions, best_change, dominates, forecast_of
from costs.report import build
from tests.conftest import REPOSITORY
from tests.golden import NOON, GoldenRun, mark, span, train_metric
from tests.sky_tasks import GPT2, write

LATER = NOON + 86400
BARE = Assumptions(
    provision_seconds=0, image_seconds=0, setup_seconds=0, ready_seconds=0, shutdown_seconds=0,
    checkpoint_blocked_seconds=0, preemptions_per_hour=0,
)  # fmt: skip


def offer(**fields) -> Offer:
    return Offer(**{
        "cloud": "aws", "region": "us-east-1", "zone": "use1-az1", "instance_type": "p4d.24xlarge",
        "accelerator": "A100", "accelerators": 8, "vcpus": 96.0, "memory_gb": 1152.0, "arch": "x86_64",
        "usd_on_demand": 20.0, "usd_spot": 8.0,
    } | fields)  # fmt: skip


def load(path: str) -> TaskSpec:
    return read_task(path, {})


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("sky/*.yaml")), ids=lambda path: path.stem)
def test_every_task_of_the_project_has_a_forecast_without_a_network(path: Path, capsys, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    document = json.loads(estimate(capsys, str(path), "--json"))
    best = document["offers"][0]
    assert 0 < best["usd_low"] < best["usd"] < best["usd_high"]
    assert best["usd"] == pytest.approx(sum(best["parts"].values()))
    if path.stem.startswith(("pretrain", "prep")):
        assert document["tokens"] == pytest.approx(10e9, rel=0.01)


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        (MachineRequest(), False),  # no accelerator asked for: not a GPU machine
        (MachineRequest(accelerator="a100", accelerators=8), True),
        (MachineRequest(accelerator="A100", accelerators=4), False),
        (MachineRequest(accelerator="A100-80GB", accelerators=8), False),
        (MachineRequest(instance_type="p4d.24xlarge"), True),
        (MachineRequest(instance_type="p4d.24xlarge", cpus=(96.0, False)), True),
        (MachineRequest(instance_type="p4d.24xlarge", cpus=(100.0, True)), False),
        (MachineRequest(accelerator="A100", accelerators=8, max_usd_per_hour=10.0), False),
        (MachineRequest(accelerator="A100", accelerators=8, max_usd_per_hour=10.0, spot=True), True),
        (MachineRequest(accelerator="A100", accelerators=8, region="us-west-2"), False),
    ],
)
def test_an_offer_fits_what_was_asked_for(wanted: MachineRequest, holds: bool):
    assert fits(offer(), wanted) is holds


def test_an_offer_without_a_spot_price_is_no_spot_offer():
    assert not fits(offer(usd_spot=None), MachineRequest(accelerator="A100", accelerators=8, spot=True))


def test_dollars_are_work_over_speed_times_price(tmp_path: Path):
    """GPT-2 124M, 10B tokens, 8 A100s at 51 % of 312 TFLOP/s: 854,654,976 FLOPs per token, 1.489M tokens/s."""
    task = load(write(tmp_path, "accelerators: A100:8", GPT2 + " --train.eval_every=0"))
    plan = forecast_of(task, Catalog((offer(),), "by hand"), BARE, None)
    [row] = plan.rows
    seconds = 19073 * 524288 / (0.51 * 312e12 * 8 / 854654976)
    assert plan.flops == 854654976
    assert row.hours == pytest.approx(seconds / 3600)
    assert row.usd == pytest.approx(seconds / 3600 * 20.0)
    assert row.usd_low == pytest.approx(row.usd * 0.51 / 0.60)
    assert row.usd_high == pytest.approx(row.usd * 0.51 / 0.36)
    assert row.kind == "sourced"


def test_parts_add_up_and_spot_pays_for_its_restarts(tmp_path: Path):
    resources = "accelerators: A100:8\nany_of: [{use_spot: true}, {use_spot: false}]"
    task = load(write(tmp_path, resources))
    assume = Assumptions(preemptions_per_hour=1.0)
    plan = forecast_of(task, Catalog((offer(),), "by hand"), assume, discover.RATES["aws"])
    spot, on_demand = plan.rows
    assert (spot.spot, on_demand.spot) == (True, False)
    assert spot.restarts > 1
    assert spot.parts["restarts and lost work"] > 0
    assert "restarts and lost work" not in on_demand.parts
    for row in plan.rows:
        assert sum(row.parts.values()) == pytest.approx(row.usd)
        assert row.usd_low < row.usd < row.usd_high


def test_offers_are_sorted_by_expected_dollars_and_on_demand_zones_are_one(tmp_path: Path):
    dear = offer(zone="use1-az2", usd_spot=9.0)
    slow = offer(instance_type="g5.xlarge", accelerator="A10G", accelerators=1, usd_on_demand=1.0, usd_spot=0.4)
    resources = "any_of: [{accelerators: A100:8, use_spot: true}, {accelerators: A100:8}, {accelerators: A10G:1}]"
    plan = forecast_of(load(write(tmp_path, resources)), Catalog((offer(), dear, slow), "by hand"), BARE, None)
    assert [row.usd for row in plan.rows] == sorted(row.usd for row in plan.rows)
    assert [(row.offer.instance_type, row.offer.zone, row.spot) for row in plan.rows] == [
        ("p4d.24xlarge", "use1-az1", True),
        ("p4d.24xlarge", "use1-az2", True),
        ("p4d.24xlarge", None, False),
        ("g5.xlarge", None, False),  # the lowest price per hour, and the dearest run
    ]


def test_a_gpu_nobody_has_published_is_assumed_and_an_unknown_one_unknown(tmp_path: Path):
    task = load(write(tmp_path, "any_of: [{accelerators: L4:1}, {accelerators: X9:1}]"))
    offers = (offer(accelerator="L4", accelerators=1), offer(accelerator="X9", accelerators=1, instance_type="x"))
    known, unknown = forecast_of(task, Catalog(offers, "by hand"), BARE, None).rows
    assert (known.kind, unknown.kind) == ("assumed", "?")
    assert (unknown.hours, unknown.usd) == (None, None)


def test_a_cpu_is_as_fast_as_its_processors(tmp_path: Path):
    task = load(write(tmp_path, "cpus: 4+", "python -m trainer.train trainer/configs/debug.yaml"))
    bare = {"accelerator": None, "accelerators": 0, "usd_on_demand": 0.2}
    small, large = (offer(vcpus=vcpus, instance_type=str(vcpus), **bare) for vcpus in (4.0, 8.0))
    rows = forecast_of(task, Catalog((small, large), "by hand"), BARE, None).rows
    by_size = {row.offer.vcpus: row for row in rows}
    assert by_size[4.0].parts["train"] == pytest.approx(2 * by_size[8.0].parts["train"])
    assert by_size[4.0].parts["train"] / 0.2 * 3600 == pytest.approx(
        task.workload.config.train.steps * 4096 * 20_103_168 / (4 * 33e9)
    )
    assert by_size[4.0].kind == "assumed"


def test_evaluation_needs_a_third_of_the_work_per_token(tmp_path: Path):
    catalog = Catalog((offer(),), "by hand")
    run = "torchrun -m trainer.evaluate s3://b/runs/x"
    tokens = 30e6
    [scored] = forecast_of(load(write(tmp_path, "accelerators: A100:8", run)), catalog, BARE, None, tokens=tokens).rows
    [trained] = forecast_of(load(write(tmp_path, "accelerators: A100:8")), catalog, BARE, None, tokens=tokens).rows
    assert 3 * scored.parts["eval"] == pytest.approx(trained.parts["train"])
    assert scored.parts.keys() == {"eval"}


def test_epochs_of_unknown_data_are_assumed_unless_they_are_given(tmp_path: Path):
    run = "torchrun -m trainer.train --stage=finetune --start.weights=$START --train.epochs=2 --train.eval_every=0"
    task = load(write(tmp_path, "accelerators: A100:8", run))
    catalog = Catalog((offer(),), "by hand")
    assumed = forecast_of(task, catalog, BARE, None)
    given = forecast_of(task, catalog, BARE, None, tokens=40e6)
    assert assumed.tokens == 10e6
    assert 4 * assumed.rows[0].parts["train"] == pytest.approx(given.rows[0].parts["train"])
    assert "assumed: 10,000,000 tokens; give --tokens" in assumed.sources
    assert not [source for source in given.sources if "give --tokens" in source]


def test_egress_is_paid_where_the_bucket_is_elsewhere(tmp_path: Path):
    task = load(write(tmp_path, "accelerators: A100:8"))
    both = Catalog((offer(), offer(cloud="lambda", usd_spot=None)), "by hand")
    by_cloud = {row.offer.cloud: row for row in forecast_of(task, both, BARE, discover.RATES["aws"]).rows}
    assert by_cloud["lambda"].parts["egress"] == pytest.approx(19073 * 524288 * 2 / 1e9 * 0.09)
    assert "egress" not in by_cloud["aws"].parts


def measured_run(folder: Path) -> GoldenRun:
    """100 steps of 1M tokens at 2 s each, with 10 % beside them, on one p4d; 60 s to get ready, on the bill 290 s."""
    run = GoldenRun(folder, config={"train": {}})
    steps = [[step, 2.0, 0.1] for step in range(1, 101)]
    events = [mark("restored", step=0), span(NOON, NOON + 60, setup=40.0, compile=20.0)]
    events.append(span(NOON + 60, NOON + 280, steps, train=200.0, data_wait=10.0, checkpoint=10.0))
    events.append({"event": "end", "time": NOON + 280, "reason": "finished", "step": 100})
    run.segment(1, NOON, events, usd_per_hour=20.0, host="host-1")
    run.metrics(1, [train_metric(step, NOON + 60 + 2.2 * step) for step in range(1, 101)])
    return run


def test_a_forecast_from_a_run_agrees_with_its_report(tmp_path: Path):
    run = read_run(measured_run(tmp_path / "run").url)
    measured = throughput.measure(run)
    assert measured.tokens_per_second == pytest.approx(5e5)
    assert (measured.ready_seconds, measured.overhead_share) == (60.0, pytest.approx(0.1))
    task = load(write(tmp_path, "accelerators: A100:8", GPT2))
    [row] = forecast_of(task, Catalog((offer(),), "by hand"), BARE, None, tokens=100e6, own=[measured]).rows
    assert row.kind == "measured"
    assert row.usd == pytest.approx(build(run, LATER).total.usd, rel=0.01)


def test_own_runs_in_the_bucket_are_used_without_being_asked_for(tmp_path: Path, capsys, monkeypatch):
    """Speed and overhead of the newest on the machine type, and how long its machine was up after its program."""
    run = measured_run(tmp_path / "runs/one")
    for name, at in (("start", NOON), ("end", NOON + 280), ("alive", NOON + 340)):
        document = {"started_at": NOON, "time": at, "usd_per_hour": 20.0, "host": "host-1"}
        run.write(f"machines/one/{name}.json", json.dumps(document))
    monkeypatch.setenv("BUCKET", str(tmp_path))
    task = write(tmp_path, "{infra: aws/us-east-1, accelerators: 'A100:8', use_spot: false}", GPT2)

    def document(*flags: str) -> dict:
        return json.loads(estimate(capsys, str(task), "--json", *flags))

    def forecast(*flags: str) -> dict:
        return document(*flags)["offers"][0]

    offer = forecast()
    second = offer["usd_per_hour"] / 3600
    assert (offer["kind"], offer["offer"]["instance_type"]) == ("measured", "p4d.24xlarge")
    assert offer["parts"]["ready"] == pytest.approx(60 * second)
    assert offer["parts"]["idle until down"] == pytest.approx((60 + paid.ALIVE_SECONDS) * second)
    assert offer["parts"]["train"] == pytest.approx(forecast("--like", run.url)["parts"]["train"])
    assert forecast("--shutdown-seconds=7")["parts"]["idle until down"] == pytest.approx(7 * second)
    assert forecast()["parts"]["provision"] == pytest.approx(Assumptions().provision_seconds * second)
    monkeypatch.delenv("BUCKET")
    assert forecast()["kind"] == "sourced"
    monkeypatch.setenv("BUCKET", "no-such-scheme://x")
    assert "own runs: BUCKET cannot be read" in document()["notes"][-1]


def test_the_best_single_change_saves_most(tmp_path: Path):
    task = load(write(tmp_path, "{accelerators: 'A100:8', use_spot: false}"))
    catalog = Catalog((offer(),), "by hand")
    plan = forecast_of(task, catalog, Assumptions(), None)
    change = best_change(plan, catalog, Assumptions(), None)
    assert change.what == "take aws p4d.24xlarge in use1-az1, spot"
    assert change.usd < plan.rows[0].usd
    slow_to_start = dataclasses.replace(Assumptions(), image_seconds=36000.0)
    only = Catalog((offer(usd_spot=None),), "by hand")
    change = best_change(forecast_of(task, only, slow_to_start, None), only, slow_to_start, None)
    assert change.what == "an image that is already on the machine"
    assert dominates(forecast_of(task, only, slow_to_start, None).rows[0]).startswith("image, ")


def estimate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    command.main(["estimate", "--offline", *arguments])
    return capsys.readouterr().out


def test_the_command_works_from_the_snapshot(tmp_path: Path, capsys):
    path = write(tmp_path, "accelerators: A100:8\nany_of: [{cloud: aws, use_spot: true}, {cloud: lambda}]")
    out = estimate(capsys, path)
    for part in ("p4d.24xlarge", "gpu_8x_a100", "not today's prices", "dominated by train", "single change", "median"):
        assert part in out
    document = json.loads(estimate(capsys, path, "--json"))
    assert document["tokens"] == 19073 * 524288
    assert {row["kind"] for row in document["offers"]} == {"sourced"}
    assert document["offers"][0]["usd"] < 10


def test_work_that_is_not_known_gives_rates_only(tmp_path: Path, capsys):
    path = write(tmp_path, "accelerators: A100:8", "bash train.sh")
    assert "the amount of work is not known, so only prices per hour are shown" in estimate(capsys, path)
    assert "| ? | ? | ? | ? |" in estimate(capsys, path, "--markdown")


def test_a_forecast_above_the_cap_is_a_warning(tmp_path: Path, capsys):
    path = write(tmp_path, "accelerators: A100:8")
    assert "above the cap of $5.00" in estimate(capsys, path, "--cap", "5")
    assert "above the cap" not in estimate(capsys, path, "--cap", "500")


def test_an_assumption_can_be_changed(tmp_path: Path, capsys):
    path = write(tmp_path, "{accelerators: 'A100:8', use_spot: true}")
    calm, wild = (
        json.loads(estimate(capsys, path, "--json", "--preemptions-per-hour", rate))["offers"][0]["usd"]
        for rate in ("0", "5")
    )
    assert wild > calm


def test_no_offer_that_fits_is_one_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match="no offer fits its resources"):
        command.main(["estimate", "--offline", write(tmp_path, "accelerators: TPU-v9:4")])


def test_every_row_of_the_snapshot_is_an_offer_with_a_price():
    offers = providers.snapshot().offers
    assert len(offers) > 250
    assert all(each.usd_on_demand or each.usd_spot for each in offers)
    assert providers.on_demand_price("AWS", "us-east-1", "p4d.24xlarge") == 21.957642
    assert providers.on_demand_price("aws", "us-east-1", "nothing") is None


def test_skypilots_catalog_comes_first_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    nothing = float("nan")  # how its table says "no entry"
    row = {"InstanceType": "gpu_1x_gh200", "AcceleratorName": "GH200", "AcceleratorCount": 1.0, "vCPUs": 64.0}
    row |= {"MemoryGiB": 432.0, "Price": 2.29, "SpotPrice": nothing, "Region": "us-east-1", "Arch": nothing}
    monkeypatch.setattr(skypilot, "catalog_rows", lambda cloud: [row])
    catalog = providers.load()
    assert catalog.source == "SkyPilot's catalog on this machine"
    assert (catalog.offers[0].usd_on_demand, catalog.offers[0].usd_spot, catalog.offers[0].arch) == (2.29, None, None)

    def absent(cloud):
        raise Unavailable("SkyPilot is not installed")

    monkeypatch.setattr(skypilot, "catalog_rows", absent)
    assert providers.load() == providers.snapshot()
