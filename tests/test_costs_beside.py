"""Charges that no machine's hour holds: disks, addresses, traffic, requests, storage, controller, tax."""

import json
from pathlib import Path

import pytest

from clouds.base import Cloud, MachineRecord
from core import storage
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import read_run
from core.stores import meter
from costs import beside, discover
from costs.report import CostReport, build
from costs.sources import ask_others
from tests.golden import NOON, GoldenRun, span

HOUR = 3600.0
LATER = NOON + 10 * HOUR
JOB = {"cluster": "gpt2-7", "managed_job_id": "7"}


class Neighbouring(Cloud):
    """The bucket is in another region of this cloud: 2 cents a GB, both ways."""

    def traffic_usd_per_gb(self, url, cloud, region):
        return (0.02, 0.02) if cloud == "aws" else (0.09, 0.0)


def hour(folder: Path, moved: list[int] | None = None, **facts) -> GoldenRun:
    """One hour of two nodes at 10 dollars an hour."""
    run = GoldenRun(folder / "runs" / "a")
    events = [span(NOON, NOON + HOUR, train=HOUR) | ({"moved": moved} if moved else {})]
    events.append({"event": "end", "time": NOON + HOUR, "reason": "finished"})
    run.segment(1, NOON, events, **{"usd_per_hour": 10.0, "nodes": 2, "launcher": JOB, "host": "a"} | facts)
    return run


def report(run: GoldenRun, *records: MachineRecord, clouds=None, environment=None, **options) -> CostReport:
    read = read_run(run.url)
    clouds = {"aws": Neighbouring()} if clouds is None else clouds
    options |= {"records": lambda _: list(records), "jobs": list, "clouds": clouds}
    return build(read, LATER, outside=ask_others(read, environment or {}, LATER, **options))


def usd(found: CostReport) -> dict[str, float]:
    return {line.name: line.usd for line in found.phases if line.usd}


def record(cluster: str = "gpt2-7", **known) -> MachineRecord:
    return MachineRecord(cluster, NOON, NOON + HOUR, "SkyPilot", nodes=2, **{"cloud": "aws", "disk_gb": 730.0} | known)


def test_disks_and_addresses_of_all_nodes_count_by_the_hour(tmp_path: Path):
    found = report(hour(tmp_path), record())
    # 2 x 730 GB for 1 of 730 hours at 8 cents, and 2 addresses at half a cent.
    assert usd(found) == {"train_kept": 10.00, "disks": 0.16, "addresses": 0.01}
    assert found.total.complete
    assert any(origin.figure == "disks" and "730 GB by SkyPilot's record" in origin.source for origin in found.origins)
    unsaid = report(hour(tmp_path), record(disk_gb=None))
    assert (unsaid.total.complete, "disks" in usd(unsaid)) == (False, False)
    assert "disks: SkyPilot does not say how large the disk of gpt2-7 is" in unsaid.missing


def test_lambda_bills_neither_disks_nor_addresses(tmp_path: Path):
    run = hour(tmp_path, cloud="lambda")
    assert usd(report(run, record(cloud="lambda"))) == {"train_kept": 10.00}


def test_the_controller_counts_for_the_time_of_the_run(tmp_path: Path):
    controller = MachineRecord("sky-jobs-controller-0a", NOON - HOUR, None, "SkyPilot", usd_per_hour=0.2, cloud="aws")
    assert usd(report(hour(tmp_path), record(disk_gb=0.0), controller))["controller"] == 0.20
    assert "controller" not in usd(report(hour(tmp_path, launcher={"cluster": "gpt2-7"}), record(), controller))


@pytest.mark.parametrize(
    ("moved", "traffic", "requests"), [([500_000_000_000, 1_000_000_000, 1_000_000, 100_000], 20.04, 1.80)]
)
def test_traffic_and_requests_follow_from_the_counts_in_the_ledger(tmp_path, monkeypatch, moved, traffic, requests):
    monkeypatch.setattr(beside, "rates_for", lambda _: discover.RATES["aws"])
    run = hour(tmp_path, moved)
    found = usd(report(run, record(disk_gb=0.0)))
    assert (found["traffic"], found["requests"]) == (traffic, requests)  # of two nodes
    silent = report(hour(tmp_path), record(disk_gb=0.0))
    assert not silent.total.complete
    assert any(each.startswith("traffic, requests: the ledger of segment 1 holds no counts") for each in silent.missing)


def test_storage_until_now_is_of_the_objects_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "rates_for", lambda _: discover.RATES["r2"])
    run = read_run(hour(tmp_path).url)
    run.objects = [storage.ObjectInfo(f"{run.url}/x", 1_000_000_000_000, LATER - 73 * HOUR)]
    outside = ask_others(run, {}, LATER, records=lambda _: [record()], jobs=list, clouds={"aws": Cloud()})
    assert usd(build(run, LATER, outside=outside))["storage"] == 1.50  # 1,000 GB for a tenth of a month


@pytest.mark.parametrize(("factor", "whole"), [("1.19", 12.1), ("0.9", 9.15)])
def test_tax_and_discount_are_a_line(tmp_path: Path, factor: str, whole: float):
    found = report(hour(tmp_path), record(), environment={"COST_FACTOR": factor})
    assert usd(found)["factor"] == pytest.approx(10.17 * (float(factor) - 1), abs=0.01)
    assert found.total.usd == pytest.approx(whole, abs=0.01)
    for rows in (found.phases, found.segments, *found.by.values()):
        assert round(sum(line.usd for line in rows), 2) == found.total.usd
    assert sum(curve[-1] for curve in found.curves.spend_usd.values()) == pytest.approx(found.total.usd, abs=0.01)


def test_the_ledger_holds_what_its_program_moved(bucket, tmp_path):
    before = meter.moved()
    book = Ledger(RunFolder(f"{bucket}/run"), Machine(), {})
    storage.write_bytes(f"{bucket}/run/thing", b"x" * 1000)
    assert storage.read_bytes(f"{bucket}/run/thing") == b"x" * 1000
    book.close("finished")
    [segment] = read_run(f"{bucket}/run").segments
    read, written, reads, writes = (now - then for now, then in zip(segment.moved, before, strict=True))
    assert read >= 1000
    assert 1000 < written < 5000
    assert reads >= 1
    assert writes >= 2
    storage.write_bytes(str(tmp_path / "local"), b"x")
    assert meter.moved()[1] - before[1] < 5000
    assert json.dumps(segment.moved)
