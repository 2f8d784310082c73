"""All stages of a model's life in one bucket, as their programs book them, and what they measured on the way."""

import json
from pathlib import Path

import pytest

from core.run import ledger
from core.run.folder import RunFolder
from core.run.machine import Machine
from core.run.reader import read_run
from costs import command, page, render
from costs.report import build
from tests.golden import NOON, GoldenRun, preempted_and_resumed, train_metric

STAGES = {"runs/base": "pretrain", "runs/base/evaluations": "evaluate"}
STAGES |= {f"runs/{stage}": stage for stage in ("finetune", "distil", "dpo")}


def book(url: str, stage: str) -> None:
    """A finished segment, written by the ledger that the programs use."""
    machine = Machine(cloud="aws", region="us-east-1", instance_type="g5.xlarge", gpus_per_node=1, usd_per_hour=360.0)
    books = ledger.Ledger(RunFolder(url), machine, {"stage": stage})
    Path(url, "run.json").write_text(json.dumps({"format": "run", "version": 1, "config": {"train": {}}}))
    with books.phase("eval" if stage == "evaluate" else "train"):
        pass
    books.close("finished", None)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder, stage in STAGES.items():
        book(str(tmp_path / folder), stage)
    monkeypatch.setenv("BUCKET", str(tmp_path))
    return tmp_path


def test_every_stage_is_a_run_of_its_own_and_a_line_of_the_whole(bucket: Path, capsys):
    command.main(["--offline", "--json"])
    found = {report["run"]: report["stage"] for report in json.loads(capsys.readouterr().out)}
    assert found == {str(bucket / folder): stage for folder, stage in STAGES.items()}
    command.main(["--offline", "--markdown"])
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {name.strip() for _, name in rows} >= set(STAGES.values())


def test_what_an_endpoint_took_is_a_line_of_its_own(tmp_path: Path):
    """The marks count from the run's beginning; the second machine was killed before it could say anything."""
    url = str(tmp_path / "run")
    Path(url).mkdir()
    Path(url, "run.json").write_text(json.dumps({"format": "run", "version": 1, "config": {}}))
    for paid in (1.25, None, 3.0):
        books = ledger.Ledger(RunFolder(url), Machine(usd_per_hour=36.0, spot=True), {"stage": "distil"})
        with books.phase("sample"):
            pass
        if paid is not None:
            books.mark("api", usd=paid, answers=1)
        books.close("finished", None)
    report = build(read_run(url), NOON, lambda *_: 72.0)
    [api] = [line for line in report.phases if line.name == "api"]
    assert (api.usd, api.seconds) == (pytest.approx(3.0), 0)
    assert [line.usd > 1 for line in report.segments] == [True, False, True]
    for lines in (report.phases, report.segments, *report.by.values()):
        assert sum(line.usd for line in lines) == pytest.approx(report.total.usd)
    assert sum(curve[-1] for curve in report.curves.spend_usd.values()) == pytest.approx(report.total.usd, abs=1e-3)
    machines = report.total.seconds / 3600 * 36.0
    assert report.total.usd == pytest.approx(3.0 + machines, abs=10**-report.places)


def with_scores(path: Path) -> GoldenRun:
    """Scored at step 10 on both machines, since the second did it again, and by the way norms and samples."""
    run = preempted_and_resumed(path)
    steps = [train_metric(step, NOON + 150 + 21 * step) for step in range(1, 11)]
    run.metrics(1, [*steps, score(10, NOON + 371, 0.30, 0.31)])
    second = [train_metric(step, NOON + 581 + 20.8 * (step - 5)) for step in range(6, 13)]
    evals = {"kind": "eval", "time": NOON + 736, "step": 12, "tokens": 12e6, "val_loss": 3.5}
    norms = {"kind": "norms", "time": NOON + 700, "step": 8, "update": {"h.0": 0.1}, "largest": [1.0, None]}
    sample = {"kind": "sample", "time": NOON + 737, "step": 12, "prompt": "a", "text": "b"}
    run.metrics(
        2, [*second, score(10, NOON + 690, 0.25, 0.26), norms, evals, score(12, NOON + 738, 0.28, 0.2961), sample]
    )
    return run


def score(step: int, time: float, accuracy: float, accuracy_norm: float) -> dict:
    scores = {"items": 10042, "accuracy": accuracy, "accuracy_norm": accuracy_norm}
    return {"kind": "hellaswag", "time": time, "step": step, "tokens": step * 1e6, **scores}


def test_hellaswag_stands_beside_the_validation_loss(tmp_path: Path):
    report = build(read_run(with_scores(tmp_path).url), NOON + 86400)
    assert (report.units.hellaswag, report.units.hellaswag_norm) == (0.28, 0.2961)
    assert report.notes == build(read_run(preempted_and_resumed(tmp_path / "without").url), NOON + 86400).notes
    html = page.as_html(report, NOON)
    assert "<b>29.6 %</b><span>HellaSwag</span>" in html
    console = render.console()
    with console.capture() as captured:
        console.print(render.render(report))
    lines = captured.get().splitlines()
    [at] = [number for number, line in enumerate(lines) if "final validation loss" in line]
    assert "HellaSwag, by character (acc_norm)" in lines[at + 1]
    assert "28.0 %" in lines[at + 2]


def test_a_run_without_it_has_no_such_line(tmp_path: Path):
    report = build(read_run(preempted_and_resumed(tmp_path).url), NOON + 86400)
    assert report.units.hellaswag is None
    assert "HellaSwag" not in page.as_html(report, NOON)


def test_scores_come_back_from_the_cache(tmp_path: Path):
    run = with_scores(tmp_path / "run")
    first, second = (build(read_run(run.url, cache_file=tmp_path / "cache.npz"), NOON + 86400) for _ in range(2))
    assert first.units == second.units
    assert second.units.hellaswag_norm == 0.2961
