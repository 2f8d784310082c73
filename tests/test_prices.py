"""`make prices`: the snapshot follows SkyPilot's catalog, and every change is a line."""

import csv
import io
import shutil
from pathlib import Path

import pytest

from clouds import catalog, skypilot
from core.errors import ConfigError
from launch import prices


def row(kind: str, price: str, spot: str = "", zone: str = "use1-az1") -> dict[str, str]:
    return {"InstanceType": kind, "Price": price, "SpotPrice": spot, "Region": "us-east-1", "AvailabilityZone": zone}


def test_prices_follow_the_catalog_and_each_change_is_a_line():
    ours = [row("p4d", "20.0", "8.0"), row("p5", "50", ""), row("gone", "1.0")]
    theirs = [row("p4d", "22.0", "8.00"), row("p5", "50.0", "11.5"), row("new", "3.0")]
    text, changes = prices.renewed(ours, theirs)
    assert changes == [
        "p4d us-east-1 use1-az1 Price: 20.0 → 22.0 (+10.0 %)",
        "p5 us-east-1 use1-az1 SpotPrice: none → 11.5",
        "gone us-east-1 use1-az1: is not in SkyPilot's catalog any more; its prices stay",
    ]
    found = list(csv.DictReader(io.StringIO(text)))
    assert [(each["InstanceType"], each["Price"], each["SpotPrice"]) for each in found] == [
        ("p4d", "22.0", "8.00"),
        ("p5", "50.0", "11.5"),
        ("gone", "1.0", ""),
    ]


def test_the_snapshot_is_stored_with_the_day_of_the_catalog(tmp_path: Path, monkeypatch, capsys):
    ours, kept = tmp_path / "catalog", tmp_path / "sky"
    shutil.copytree(catalog.FOLDER, ours)
    monkeypatch.setattr(catalog, "FOLDER", ours)
    monkeypatch.setattr(catalog, "SOURCE", ours / "source.txt")
    monkeypatch.setattr(skypilot, "catalog_file", lambda cloud: kept / cloud / "vms.csv")
    with pytest.raises(ConfigError, match="keeps no catalog on this machine"):
        prices.main([])
    (kept / "lambda").mkdir(parents=True)
    before = (ours / "lambda/vms.csv").read_text()
    (kept / "lambda/vms.csv").write_text(before.replace("15.92", "16.00"))
    prices.main(["--dry-run"])
    assert (ours / "lambda/vms.csv").read_text() == before
    prices.main([])
    assert "15.92 → 16.00 (+0.5 %)" in capsys.readouterr().out
    assert "16.00" in (ours / "lambda/vms.csv").read_text()
    aws, lambda_ = (ours / "source.txt").read_text().splitlines()
    assert aws == "AWS 00148f2"
    assert lambda_.startswith("Lambda 20")
    with pytest.raises(ConfigError, match="'--dry' is something else"):
        prices.main(["--dry"])
