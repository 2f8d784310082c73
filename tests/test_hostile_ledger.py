"""A ledger that someone else has changed: a partial report with notes, nothing that a terminal or a page obeys."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from core import storage
from core.run.reader import read_run
from costs import command, page, render, show
from costs.report import build
from launch import runs
from tests.golden import NOON, GoldenRun, lines, mark, preempted_and_resumed, span, train_metric

LATER = NOON + 86400
DEEP = b"[" * 100_000 + b"]" * 100_000
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
SCRIPT = '"><script>alert(1)</script>'


def every_form(url: str) -> dict[str, str]:
    report = build(read_run(url), LATER)
    screen = io.StringIO()
    Console(file=screen, width=180).print(render.render(report))
    return {
        "terminal": screen.getvalue(),
        "markdown": render.as_markdown(report),
        "json": render.as_json([report]),
        "csv": render.as_csv([report]),
        "html": page.as_html(report, LATER),
    }


def hostile_run(path: Path, text: str) -> GoldenRun:
    """A run in which everything that is a text is `text`."""
    run = GoldenRun(path)
    places = dict.fromkeys(("cloud", "region", "zone", "instance_type", "gpu", "price_source", "host"), text)
    phases = {text: 300.0, "train": 100.0, "train_lost" + text: 100.0, "init": 500.0}
    events = [
        span(NOON, NOON + 1000, [[1, 50.0, 0.0], [2, 50.0, 0.0]], **phases),
        mark("restored", step=0, checkpoint=text, skipped=[{"name": text, "why": text}]),
        mark(text),
        {"event": text},
        {"event": "end", "time": NOON + 1000, "reason": text, "step": 2},
    ]
    run.segment(1, NOON, events, usd_per_hour=36.0, **places)
    run.metrics(1, [train_metric(1, NOON + 500), train_metric(2, NOON + 900)])
    start = run.path / "ledger/segment-000001/start.jsonl"
    start.write_text(lines(json.loads(start.read_text()) | {"tags": [text], "program": {"stage": text}}))
    return run


def test_no_text_of_a_ledger_reaches_the_terminal_or_the_page_as_more_than_text(tmp_path: Path):
    forms = every_form(hostile_run(tmp_path / "a", ESCAPE).url)
    for name in ("terminal", "markdown"):
        assert not set("\x1b\x07\x9b\u202e") & set(forms[name]), name
    assert "\\x1b]0;owned\\x07" in forms["terminal"]
    found = every_form(hostile_run(tmp_path / "b", SCRIPT).url)["html"]
    assert "<script" not in found
    assert found.count("&lt;script&gt;") > 5
    assert "Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'" in found
    assert 'class="area p-other"' in found


def test_no_cell_of_the_csv_is_a_formula(tmp_path: Path):
    found = every_form(hostile_run(tmp_path, '=HYPERLINK("http://x")').url)["csv"]
    cells = [cell.strip('"') for line in found.splitlines() for cell in line.split(",")]
    assert any("HYPERLINK" in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@")) and not cell[1:2].isdigit()]


def test_the_numbers_of_a_ledger_have_bounds(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 9, setup=9.0)], usd_per_hour=36.0, nodes=10**12, gpu=["x"], spot="yes")
    run.segment(
        2,
        NOON + 20,
        [
            span(NOON + 20, 1e17, setup=9.0),
            span(NOON + 20, NOON + 29, [[2**60, 1.0, 1.0], [1, "x", 1.0]], train=9.0),
            mark("clock_jump", seconds="x"),
            mark("api", usd=[1], answers=2),
            mark("cap", limit_usd="x", spent_usd=None),
        ],
        usd_per_hour=1e300,
    )
    run.metrics(2, [train_metric(1, NOON + 25) | {"tokens": -5, "loss": 1e200}, {"kind": ["x"], "step": 1}])
    report = build(read_run(run.url), LATER)
    said = "\n".join(report.notes)
    for what in ("nodes is 1000000000000", "gpu is ['x']", "spot is 'yes'", "usd_per_hour 1e+300 is not", "no times"):
        assert what in said
    assert report.total.usd == pytest.approx(0.09)
    every_form(run.url)


def test_a_high_loss_does_not_make_a_report_count_for_ever(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.metrics(
        2,
        [{"kind": "eval", "time": NOON + 736, "step": step, "tokens": 1, "val_loss": 1e17 / step} for step in (6, 12)],
    )
    assert "final validation loss" in every_form(run.url)["markdown"]


def test_an_object_that_holds_fewer_events_than_its_name_says_hides_none(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    usd = build(read_run(run.url), LATER).total.usd
    run.write("ledger/segment-000001/events/00000000-99999999.jsonl", "")
    report = build(read_run(run.url), LATER)
    assert report.total.usd == usd
    assert any("holds 0 events, its name says 100,000,000" in note for note in report.notes)


def test_one_run_never_breaks_the_overview(tmp_path: Path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("BUCKET", str(tmp_path))
    monkeypatch.setenv("COST_CACHE_DIR", str(tmp_path / "cache"))
    preempted_and_resumed(tmp_path / "runs/good")
    run = GoldenRun(tmp_path / "runs/deep")
    run.write("ledger/segment-000001/start.jsonl", DEEP.decode())
    preempted_and_resumed(tmp_path / "runs/unforeseen")
    real = show.build

    def build_or_fail(run, *more):
        if run.url.endswith("unforeseen"):
            raise ZeroDivisionError("of a kind that nobody thought of")
        return real(run, *more)

    monkeypatch.setattr(show, "build", build_or_fail)
    command.main(["--offline"])
    assert "good" in capsys.readouterr().out
    assert "unforeseen: cannot be understood (ZeroDivisionError" in caplog.text


def test_stored_output_is_shown_without_escapes_and_keys(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    url = str(tmp_path)
    events = [{"time": NOON, "line": f"{ESCAPE}hello 0123456789abcdef"}, {"time": 1e300, "line": "late"}, {"line": 7}]
    storage.write_bytes(storage.join(url, "logs/a/00000000-00000002.jsonl"), lines(*events).encode())
    runs.show_stored(url)
    out = capsys.readouterr().out
    assert not set("\x1b\x07\x9b\u202e") & set(out)
    assert "\\x1b]0;owned\\x07" in out
    assert "hello ***" in out
    assert "00:00:00 late" in out
