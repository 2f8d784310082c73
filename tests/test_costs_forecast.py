"""The forecast of a launch: stored with its run, beside the dollars that the run took, and a limit for scripts."""

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.run.reader import read_run
from costs import command, foreseen, tables
from costs.foreseen import LINES
from costs.report import build
from tests.golden import NOON, preempted_and_resumed

LATER = NOON + 86400
TASK = "sky/pretrain-8xa100.yaml"


def forecast(capsys, *options: str) -> tuple[int | None, dict]:
    code = command.main(["estimate", TASK, "--offline", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_a_forecast_above_the_limit_fails(capsys):
    code, document = forecast(capsys, "--tokens=1e9")
    usd = document["offers"][0]["usd"]
    assert not code
    assert forecast(capsys, "--tokens=1e9", f"--fail-over={usd - 0.01}")[0] == 1
    assert not forecast(capsys, "--tokens=1e9", f"--fail-over={usd + 0.01}")[0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tokens=-5", "--tokens is -5, must be a number above zero"),
        ("--cap=0", "--cap is 0, must be a number above zero"),
        ("--fail-over=nan", "--fail-over is nan, must be a number above zero"),
        ("--image-seconds=-1", "--image-seconds is -1, must be zero or a number above it"),
        ("--prep-bytes-per-second=0", "--prep-bytes-per-second is 0, must be a number above zero"),
    ],
)
def test_absurd_numbers_are_one_sentence(option: str, message: str):
    with pytest.raises(ConfigError) as raised:
        command.main(["estimate", TASK, option])
    assert str(raised.value) == message


def test_the_forecast_that_was_stored_is_beside_the_actual(tmp_path: Path, capsys, monkeypatch):
    run = preempted_and_resumed(tmp_path / "runs" / "first")
    monkeypatch.setenv("BUCKET", str(tmp_path))
    monkeypatch.setenv("RUN", "first")
    _, document = forecast(capsys, "--tokens=1e9", "--store")
    expected = document["offers"][0]
    report = build(read_run(run.url), LATER)
    assert report.foreseen.usd == pytest.approx(expected["usd"])
    lines = {line.name: line for line in report.forecast}
    assert lines["train"].foreseen == pytest.approx(expected["parts"]["train"])
    assert lines["image, ready"].foreseen == pytest.approx(expected["parts"]["image"] + expected["parts"]["ready"])
    assert lines["image, ready"].actual == pytest.approx(1.86)
    assert sum(line.foreseen or 0.0 for line in report.forecast) == pytest.approx(expected["usd"])
    assert sum(line.actual for line in report.forecast) == pytest.approx(4.92)
    assert f"forecast ${expected['usd']:,.2f} (" in tables.sums(report)
    rows = {row[0]: row for row in tables.sheets(report)["forecast"].rows}
    assert command.main(["estimate", TASK, "--tokens=2e9", "--store", "--brief", "--offline"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("forecast: $")
    assert "this forecast of its launch is kept" in said.err  # the run has begun
    assert build(read_run(run.url), LATER).foreseen.usd == pytest.approx(expected["usd"])
    change = 100 * (1.86 / (expected["parts"]["image"] + expected["parts"]["ready"]) - 1)
    assert rows["image, ready"][3] == f"{change:+.0f} %"


def test_a_plan_that_was_stored_is_the_forecast_too(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    plan = {"format": "run-budget", "version": 1, "usd": 20.0, "machines_usd": 18.0, "task": TASK, "options": []}
    plan |= {"settings": {}, "train_tokens": 9, "began_at": NOON, "number": 1}
    parts = {"train": 10.0, "provision": 1.0, "jobs controller": 0.5, "reserve": 2.0, "preparation": 3.0}
    run.write("budget/000001/plan.json", json.dumps(plan | {"forecast": {"parts": parts}}))
    found = build(read_run(run.url), LATER).foreseen
    assert found.lines == {"train": 10.0, "provision": 1.0, "controller": 0.5}
    assert (found.usd, found.what) == (11.5, "plan for $20")


@pytest.mark.parametrize("text", ["{", "[]", '{"offer": "x"}', '{"offer": "x", "parts": {"train": "y"}}'])
def test_a_damaged_forecast_is_none(tmp_path: Path, text: str):
    run = preempted_and_resumed(tmp_path)
    run.write("forecast.json", text)
    assert build(read_run(run.url), LATER).foreseen is None


def test_every_phase_of_a_report_has_one_line():
    from core.run.phases import REPORT_PHASES

    named = [phase for phases in LINES.values() for phase in phases]
    assert sorted(named) == sorted(REPORT_PHASES)
    assert set(foreseen._PARTS.values()) <= set(LINES)
