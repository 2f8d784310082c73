"""core.run.model and trainer.plots: what a run measured, on the path that was kept, and its figures."""

import json
import struct
import sys
from pathlib import Path

import pytest

from core.errors import ConfigError, DataError, RunError
from core.run.measured import read_measured
from tests import launching, warm
from trainer import plots


def segment(run: Path, number: int, start: float, price: float | None, marks: list[dict], metrics: list[dict]) -> None:
    """Write one segment as a trainer does: 100 seconds of ledger, and its metrics."""
    folder = run / "ledger" / f"segment-{number:06d}"
    (folder / "events").mkdir(parents=True)
    begun = {"event": "start", "version": 1, "time": start, "machine": {"usd_per_hour": price}}
    (folder / "start.jsonl").write_text(json.dumps(begun) + "\n")
    events = [{"event": "mark", **mark} for mark in marks]
    events.append({"event": "span", "start": start, "end": start + 100, "phases": {}, "steps": None})
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events" / f"00000000-{len(events) - 1:08d}.jsonl").write_text(lines)
    folder = run / "metrics" / f"segment-{number:06d}"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(metric) + "\n" for metric in metrics)
    (folder / f"00000000-{len(metrics) - 1:08d}.jsonl").write_text(lines)


def step(number: int, time: float, loss: float) -> dict:
    return {
        "kind": "train", "time": time, "step": number, "loss": loss, "lr": 0.1, "grad_norm": 1.0,
        "tokens": number * 1000, "tokens_per_second": 50.0, "mfu": None,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """Two machines; the second one went on from step 2, so that step 3 was done twice and step 4 once."""
    run = tmp_path / "first"
    marks = [{"name": "restored", "time": 1000.0, "step": 0}, {"name": "checkpoint_begun", "time": 1030.0, "step": 2}]
    metrics = [step(number, 1000.0 + 10 * number, 10.0 - number) for number in (1, 2, 3, 4)]
    metrics.append({"kind": "eval", "time": 1035.0, "step": 3, "tokens": 3000, "val_loss": 9.0})
    segment(run, 1, 1000.0, 3.6, marks, metrics)
    metrics = [step(3, 5010.0, 6.5)]
    metrics.append({"kind": "eval", "time": 5020.0, "step": 3, "tokens": 3000, "val_loss": 7.0})
    score = {"accuracy_norm": 0.3, "accuracy_norm_stderr": 0.01, "accuracy": 0.28, "items": 100}
    metrics.append({"kind": "hellaswag", "time": 5021.0, "step": 3, "tokens": 3000, **score})
    for at, text in ((3, "The sea is a|b\nc"), (3, "The sea again")):
        metrics.append({"kind": "sample", "time": 5022.0, "step": at, "prompt": "The sea", "text": text})
    parts = {"attention": 1.0, "mlp": 2.0}
    norms = {"gradients": parts, "weights": parts, "updates": parts, "largest_activations": [3.0, 4.0]}
    metrics.append({"kind": "norms", "time": 5023.0, "step": 3, **norms})
    segment(run, 2, 5000.0, 7.2, [{"name": "restored", "time": 5001.0, "step": 2}], metrics)
    return run


def test_history_keeps_each_step_once_with_time_and_dollars(run: Path):
    found = read_measured(str(run))
    train = found.points("train")
    assert [(point.step, point.values["loss"]) for point in train] == [(1, 9.0), (2, 8.0), (3, 6.5)]
    assert [point.seconds for point in train] == [10.0, 20.0, 110.0]
    # 3.6 dollars an hour are 0.001 a second; the second machine costs twice as much.
    assert [point.usd for point in train] == pytest.approx([0.010, 0.020, 0.100 + 0.020])
    assert [point.values["val_loss"] for point in found.points("eval")] == [7.0]
    assert (found.restarts(), found.machine_seconds("checkpoint_begun")) == ([100.0], [30.0])


def test_an_unknown_price_makes_the_rest_unknown(run: Path):
    start = run / "ledger" / "segment-000002" / "start.jsonl"
    start.write_text(json.dumps({"event": "start", "version": 1, "time": 5000.0, "machine": {"usd_per_hour": None}}))
    assert [point.usd is None for point in read_measured(str(run)).points("train")] == [False, False, True]


def test_a_damaged_start_is_named_and_its_dollars_are_unknown(run: Path):
    (run / "ledger" / "segment-000002" / "start.jsonl").write_text("{")
    found = read_measured(str(run))
    assert [(point.step, point.usd is None) for point in found.points("train")] == [(1, False), (2, False), (3, True)]
    assert any("segment 2: " in problem and "cannot be used" in problem for problem in found.problems)


def test_no_run_is_said(tmp_path):
    with pytest.raises(RunError, match=r"holds no run to report on .*; give the run.url of a training run"):
        read_measured(str(tmp_path))
    segment(tmp_path, 1, 0.0, None, [], [])
    with pytest.raises(DataError, match=r"has no metrics; give the run.url of a training run"):
        read_measured(str(tmp_path))


def test_figures_of_two_runs(run: Path, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    segment(tmp_path / "second", 1, 0.0, None, [], [step(1, 10.0, 5.0), step(2, 20.0, 4.0)])
    command = [sys.executable, "-m", "trainer.plots", str(run), str(tmp_path / "second"), f"--out={tmp_path}/plots"]
    done = warm.run(command, cwd=launching.REPOSITORY)
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    figures = ("hellaswag", "loss", "norms", "recipe", "speed")
    assert written == sorted([f"{name}.{kind}" for name in figures for kind in ("png", "svg")] + ["samples.md"])
    for name in figures:
        data = (tmp_path / "plots" / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG")
        assert min(width, height) > 500
    drawing = (tmp_path / "plots" / "loss.svg").read_text()
    assert drawing.count("<path") > 20
    table = (tmp_path / "plots" / "samples.md").read_text().splitlines()
    assert table[0] == "## first: The sea"
    assert table[4:6] == ["| 3 | is a\\|b c |", "| 3 | again |"]


def test_what_was_not_measured_is_not_drawn(run: Path, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    segment(tmp_path / "bare", 1, 0.0, None, [], [step(1, 10.0, 5.0), step(2, 20.0, 4.0)])
    assert plots.main([str(tmp_path / "bare"), f"--out={tmp_path}/plots", "--format=png"]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["loss.png", "recipe.png", "speed.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--smoth=1"], "--smoth=1: unknown flag; known ones: --out=, --format=, --smooth="),
        (["run", "--smooth=1"], "--smooth=1: must be a number, at least 0 and below 1"),
        (["run", "--format=gif"], "--format=gif: must be one or several of png, svg"),
        (["--out=x"], "no run named"),
    ],
)
def test_wrong_arguments_are_said(arguments: list[str], said: str):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        plots.parse(arguments)


def test_smoothing_starts_at_the_first_value():
    assert plots.smoothed([5.0, 5.0], 0.9) == pytest.approx([5.0, 5.0])
    assert plots.smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])
