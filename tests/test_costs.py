"""The report against a run whose dollars are known by hand."""

import csv
import io
import json
import math
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from core.errors import RunError
from core.run.phases import label
from core.run.reader import read_run
from costs import render
from costs.report import CostReport, build
from tests.conftest import REPOSITORY
from tests.golden import NOON, GoldenRun, lines, mark, preempted_and_resumed, span
from tests.patience import PATIENCE_SECONDS

LATER = NOON + 86400


def report_on(run: GoldenRun, now: float = LATER) -> CostReport:
    return build(read_run(run.url), now)


def usd(report: CostReport) -> dict[str, float | None]:
    return {line.name: line.usd for line in report.phases}


def test_the_golden_run_is_priced_by_phase(tmp_path: Path):
    report = report_on(preempted_and_resumed(tmp_path))
    # Segment 1: 372 s at 1 cent; segment 2: 240 s at half a cent.
    assert report.total.usd == 4.92
    assert usd(report) == {
        "setup": 1.30,  # 1.00 + 0.30
        "init": 0.20,
        "compile": 0.30,
        "restore": 0.06,
        "data_wait": 0.08,  # 0.078: steps 1-5 at 1 s, 6-12 at 0.8 s
        "train_kept": 1.70,  # steps 1-5: 1.00; steps 6-12: 0.70
        "train_lost": 1.12,  # steps 6-10, train and wait: 1.05; 7 s of step 11: 0.07
        "eval": 0.04,  # 0.045 has the smallest remainder of the three that are not whole cents
        "sample": 0.02,
        "checkpoint": 0.05,
        "not_attributed": 0.05,  # 0.047
    }
    assert [(s.usd, s.end, s.steps_lost) for s in report.segments] == [
        (3.72, "killed (end: last heartbeat)", 5),
        (1.20, "finished", 0),
    ]
    assert report.units.tokens == 12e6
    assert report.units.usd_per_billion_tokens == pytest.approx(4.92 / 12e6 * 1e9)
    assert report.units.train_loss == pytest.approx(3.8)
    assert report.units.val_loss == 3.5
    assert report.notes == []


def test_every_table_adds_up_to_the_total_as_printed(tmp_path: Path):
    report = report_on(preempted_and_resumed(tmp_path))
    for table in (report.phases, report.segments, *report.by.values()):
        assert round(sum(line.usd for line in table), report.places) == report.total.usd
        assert sum(line.share for line in table) == pytest.approx(1)
        assert sum(line.seconds for line in table) == pytest.approx(report.total.seconds)
    assert {line.name: line.usd for line in report.by["market"]} == {"on demand": 3.72, "spot": 1.20}


def test_a_step_that_three_machines_did_counts_for_the_last(tmp_path: Path):
    run = GoldenRun(tmp_path)
    for number, restored, last in ((1, 0, 6), (2, 4, 8), (3, 2, 9)):
        start = NOON + 1000 * number
        steps = [[step, 10.0, 0.0] for step in range(restored + 1, last + 1)]
        seconds = 10.0 * len(steps)
        events = [mark("restored", step=restored), span(start, start + seconds, steps, train=seconds)]
        run.segment(number, start, events, usd_per_hour=36.0)
    report = report_on(run)
    # Machine 3 went back to step 2 (its predecessor's checkpoint proved damaged): only 1 and 2 of machine 1 count.
    assert [line.steps_lost for line in report.segments] == [4, 4, 0]
    assert usd(report)["train_kept"] == pytest.approx(0.1 * (2 + 7))


def test_a_machine_that_died_before_it_restored_loses_nobodys_steps(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(
        1, NOON, [mark("restored", step=0), span(NOON, NOON + 20, [[1, 10.0, 0.0], [2, 10.0, 0.0]], train=20.0)]
    )
    run.segment(2, NOON + 100, [span(NOON + 100, NOON + 130, setup=30.0)])
    assert [line.steps_lost for line in report_on(run).segments] == [0, 0]


def test_an_unfinished_step_of_a_running_machine_is_not_lost(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(
        1, NOON, [mark("restored", step=0), span(NOON, NOON + 20, [[1, 12.0, 0.0]], train=20.0)], usd_per_hour=36
    )
    running, dead = report_on(run, now=NOON + 25), report_on(run)
    assert running.state == "running"
    assert usd(running)["train_lost"] == 0
    assert dead.state == "killed (end: last heartbeat)"
    assert usd(dead)["train_lost"] == pytest.approx(0.08)


@pytest.mark.parametrize("price", [None, 0, -3.5, "free", True])
def test_what_is_no_price_is_unknown_and_never_zero(tmp_path: Path, price: object):
    run = preempted_and_resumed(tmp_path)
    run.segment(2, NOON + 500, [span(NOON + 500, NOON + 600, train=100.0)], usd_per_hour=price)
    report = report_on(run)
    assert report.segments[1].usd is None
    assert not report.total.complete
    assert report.total.usd == 3.72
    assert report.units.usd_per_billion_tokens is None
    assert "no price is known for segment 2" in " ".join(report.notes)
    if price is not None:
        assert f"usd_per_hour {price!r} is not a price" in " ".join(report.notes)
    rows = list(csv.DictReader(io.StringIO(render.as_csv([report]))))
    assert {row["BilledCost"] for row in rows if row["x_Segment"] == "2"} == {"?"}
    assert sum(float(row["BilledCost"]) for row in rows if row["x_Segment"] == "1") == pytest.approx(3.72)


def test_a_run_without_any_price_has_times_and_question_marks(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 100, setup=25.0, train=75.0)])
    report = report_on(run)
    assert report.total.usd is None
    assert {line.usd for line in report.phases} == {None}
    assert [line.share for line in report.phases][:1] == [0.25]
    assert json.loads(render.as_json([report]))["total"]["usd"] is None


def test_a_foreign_currency_is_not_taken_for_dollars(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 100, train=100.0)], usd_per_hour=30.0, currency="EUR")
    report = report_on(run)
    assert report.total.usd is None
    assert "no price is known for segment 1" in report.notes[0]
    assert "price is in EUR, not USD" in report.notes[1]


def test_overlapping_machines_are_both_paid_and_named(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 100, setup=100.0)], usd_per_hour=36.0)
    run.segment(2, NOON + 40, [span(NOON + 40, NOON + 100, setup=60.0)], usd_per_hour=36.0)
    report = report_on(run)
    assert report.total.usd == 1.60
    assert "segments 1 and 2 overlap by 1 min 00 s" in report.notes[0]


def test_a_newer_machine_with_an_older_clock_is_named(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 100, setup=100.0)], usd_per_hour=36.0)
    run.segment(2, NOON - 50, [span(NOON - 50, NOON - 20, setup=30.0)], usd_per_hour=36.0)
    assert "segment 2 starts 50 s before segment 1, which is older" in report_on(run).notes[0]


def test_a_clock_that_jumps_or_runs_backwards_makes_no_time(tmp_path: Path):
    run = GoldenRun(tmp_path)
    events = [
        span(NOON, NOON + 50, setup=50.0),
        mark("clock_jump", seconds=-3600.0),
        span(NOON + 50, NOON + 20, train=30.0),  # ends before it starts
        span(NOON + 40, NOON + 60, train=20.0),  # begins 10 s before its predecessor ended
        span(NOON + 60, NOON + 70, train=40.0),  # books more than its length
    ]
    run.segment(1, NOON, events, usd_per_hour=36.0)
    report = report_on(run)
    assert report.total.seconds == pytest.approx(70)
    assert report.total.usd == 0.70
    text = " ".join(report.notes)
    for part in ("its clock went backwards", "starts 10.0 s before", "books 40.0 s", "its clock was set by -3600 s"):
        assert part in text


@pytest.mark.parametrize(
    ("zone", "begin", "hours"),
    [
        ("UTC", "2026-12-31T22:30", {"2026-12-31": 1.5, "2027-01-01": 2.5}),
        ("UTC", "2028-02-28T23:00", {"2028-02-28": 1.0, "2028-02-29": 24.0, "2028-03-01": 1.0}),
        ("Europe/Berlin", "2026-10-25T00:00", {"2026-10-25": 3.0}),  # its clock goes back an hour on this day
        ("America/New_York", "2029-12-31T22:30", {"2029-12-31": 1.5, "2030-01-01": 2.5}),
    ],
)
def test_days_are_those_of_the_calendar_in_utc(zone: str, begin: str, hours: dict, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        run, first = GoldenRun(tmp_path), datetime.fromisoformat(f"{begin}+00:00").timestamp()
        starts = [first + 600 * number for number in range(int(6 * sum(hours.values())))]
        run.segment(1, first, [span(start, start + 600, init=600.0) for start in starts], usd_per_hour=2.0)
        report = report_on(run, first + 7 * 86400)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert {line.name: (line.seconds / 3600, line.usd) for line in report.by["day"]} == {
        day: (count, 2 * count) for day, count in hours.items()
    }


def test_the_work_of_a_report_grows_no_faster_than_its_segments(tmp_path: Path):
    """Counts calls of functions, because a time would depend on the machine's load."""

    def calls(segments: int) -> int:
        run = GoldenRun(tmp_path / str(segments))
        for number in range(1, segments + 1):
            start = NOON + 600 * number
            run.segment(number, start, [span(start, start + 300, train=300.0)], usd_per_hour=2.0)
        count = 0

        def called(*_: object) -> None:
            nonlocal count
            count += 1

        before = sys.getprofile()
        sys.setprofile(called)
        try:
            report = report_on(run, NOON + 600 * (segments + 2))
            render.as_json([report])
            render.render(report)
        finally:
            sys.setprofile(before)
        assert report.total.usd == pytest.approx(segments / 6, abs=0.005)
        return count

    calls(1)  # imports and caches
    few, twice, four_times = calls(40), calls(80), calls(160)
    # Zero for work in proportion to the segments. One call for each pair of segments gives 6 * 40².
    assert four_times - 3 * twice + 2 * few < 3 * 40**2


def test_half_written_and_foreign_objects_cost_only_themselves(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    events = tmp_path / "ledger/segment-000001/events"
    whole = (events / "00000000-00000003.jsonl").read_text().splitlines(keepends=True)
    (events / "00000000-00000003.jsonl").unlink()
    run.write("ledger/segment-000001/events/00000000-00000002.jsonl", "".join(whole[:3]))
    run.write("ledger/segment-000001/events/00000003-00000003.jsonl", whole[3][:40])
    run.write("ledger/segment-000001/events/notes.txt", "not ours")
    report = report_on(run)
    assert report.segments[0].usd == 2.60
    assert any("00000003-00000003.jsonl: line 1 skipped" in note for note in report.notes)


def test_a_half_written_start_leaves_the_time_without_a_price(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.write("ledger/segment-000002/start.jsonl", '{"event":"start","ver')
    report = report_on(run)
    assert report.segments[1].seconds == pytest.approx(240)
    assert report.segments[1].usd is None
    assert any("start.jsonl cannot be used" in note for note in report.notes)


def test_a_segment_of_a_newer_release_is_named_and_left_out(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.segment(3, NOON + 900, [span(NOON + 900, NOON + 999, train=99.0)], version=2, usd_per_hour=36.0)
    report = report_on(run)
    assert report.segments[2].usd is None
    assert not report.total.complete
    assert any("segment 3: left out, ledger version 2 is newer" in note for note in report.notes)


def test_a_run_that_its_cap_stopped_says_so_and_how_to_go_on(tmp_path: Path):
    run = GoldenRun(tmp_path)
    end = {"event": "end", "time": NOON + 100, "reason": "cap", "step": 3}
    events = [span(NOON, NOON + 100, train=100.0), mark("cap", limit_usd=1.25, spent_usd=1.0), end]
    run.segment(1, NOON, events, usd_per_hour=36.0)
    report = report_on(run)
    assert report.state == "stopped by its cap"
    assert report.notes == [
        "segment 1 stopped at the cap of $1.25 with $1.00 spent; to continue, start the run again with a higher MAX_USD"
    ]


def test_an_unknown_phase_keeps_its_line(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 100, train=40.0, distil=60.0)], usd_per_hour=36.0)
    assert usd(report_on(run))["distil"] == 0.60


def test_a_preparation_run_has_no_training_lines(tmp_path: Path):
    run = GoldenRun(tmp_path, config={"source": {"url": "x"}})
    run.segment(1, NOON, [span(NOON, NOON + 100, setup=40.0, prepare=60.0)], usd_per_hour=0.34)
    report = report_on(run)
    assert report.stage == "prep"
    assert "train_lost" not in usd(report)
    assert report.units.tokens is None


def test_the_forms_give_the_same_figures(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    report = report_on(run)
    document = json.loads(render.as_json([report]))
    rows = list(csv.DictReader(io.StringIO(render.as_csv([report]))))
    by_json = {line["name"]: line["usd"] for line in document["phases"]}
    assert by_json == usd(report)
    by_csv = dict.fromkeys(by_json, 0.0)
    for row in rows:
        by_csv[row["x_Phase"]] += float(row["BilledCost"])
    assert math.fsum(by_csv.values()) == pytest.approx(4.92)
    assert by_csv == pytest.approx(by_json, abs=0.01), "the tables round so that they add up"
    kept = next(row for row in rows if row["x_Phase"] == "train_kept" and row["x_Segment"] == "2")
    assert float(kept["BilledCost"]) == pytest.approx(0.70, rel=1e-6)
    assert float(kept["ConsumedQuantity"]) == pytest.approx(140 / 3600, rel=1e-6)
    assert [kept[name] for name in ("ProviderName", "RegionId", "AvailabilityZone", "ResourceType")] == [
        "aws", "us-east-1", "us-east-1b", "p4d.24xlarge",
    ]  # fmt: skip
    assert (kept["ChargePeriodStart"], kept["ChargePeriodEnd"]) == ("2026-11-20T00:00:00Z", "2026-11-21T00:00:00Z")
    assert (kept["PricingCategory"], kept["ConsumedUnit"], kept["BillingCurrency"]) == ("Dynamic", "Hours", "USD")
    printed = _printed(render.render(report))
    for line in report.phases:
        assert f"{line.usd:.2f}" in next(row for row in printed if row.strip().startswith(label(line.name)))


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path):
    with pytest.raises(RunError, match="holds no run to report on"):
        read_run(str(tmp_path))
    GoldenRun(tmp_path)
    with pytest.raises(RunError, match="no segment has started"):
        read_run(str(tmp_path))


def test_the_entry_prints_and_fails_as_documented(tmp_path: Path):
    run = preempted_and_resumed(tmp_path / "run")
    good = _entry(run.url)
    assert good.returncode == 0
    assert "train lost" in good.stdout
    assert json.loads(_entry(run.url, "--json").stdout)["total"]["usd"] == 4.92
    bad = _entry(str(tmp_path))
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (1, "", 1)
    assert bad.stderr.startswith(f"error: {tmp_path}: holds no run")


def test_the_report_is_read_from_s3_as_from_a_folder(tmp_path: Path, bucket: str):
    from core import storage

    run = preempted_and_resumed(tmp_path)
    for path in tmp_path.rglob("*.json*"):
        storage.write_bytes(f"{bucket}/run/{path.relative_to(tmp_path)}", path.read_bytes())
    there, here = build(read_run(f"{bucket}/run"), LATER), report_on(run)
    assert there.phases == here.phases
    assert there.segments == here.segments


def test_a_damaged_run_json_is_named(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.write("run.json", lines({"format": "run"})[:9])
    assert "run.json: cannot be understood" in report_on(run).notes[0]


def _entry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "cost_report.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def _printed(renderable) -> list[str]:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()
