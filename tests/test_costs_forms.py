"""The forms of a report: page, Markdown, several runs."""

import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from core.errors import ConfigError, LauncherError
from core.run.reader import read_run
from costs import charts, command, compare, discover, page, render, show, svg, tables
from costs.forecast import Assumptions
from costs.report import CostReport, build
from tests.browser import BROWSER
from tests.conftest import REPOSITORY
from tests.golden import NOON, GoldenRun, preempted_and_resumed, span
from tests.patience import PATIENCE_SECONDS

LATER = NOON + 86400
MODEL = {"layers": 2, "heads": 2, "width": 64, "context": 128, "padded_vocab_size": 50304}


@pytest.fixture
def run(tmp_path: Path) -> GoldenRun:
    return preempted_and_resumed(tmp_path / "runs" / "first")


@pytest.fixture
def report(run: GoldenRun) -> CostReport:
    return build(read_run(run.url), LATER)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("BUCKET", raising=False)


class Page(HTMLParser):
    """Collects what matters of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.paths: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href", "action")]
        self.paths += [value for name, value in attributes if (tag, name) == ("path", "d")]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_but_itself(report: CostReport):
    text = page.as_html(report, LATER)
    found = Page(text)
    assert found.links == ["data:,"]
    assert "script" not in found.tags
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_chart_has_data_and_every_table_its_figures(report: CostReport):
    found = Page(page.as_html(report, LATER))
    for title in ("Dollars over time", "Dollars by phase", "Loss against dollars", "Speed"):
        assert title in found.text
    assert all(re.fullmatch(r"(M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)*Z?)+", path) for path in found.paths)
    for sheet in tables.sheets(report).values():
        for row in sheet.rows:
            assert all(cell in found.text for cell in row)


def test_a_page_escapes_what_others_wrote(tmp_path: Path):
    run = GoldenRun(tmp_path / "<b>run")
    run.segment(1, NOON, [span(NOON, NOON + 9, **{"<script>x": 9.0})], usd_per_hour=36.0, zone="<img src=x onerror=y>")
    found = Page(page.as_html(build(read_run(run.url), LATER), LATER))
    assert not {"script", "img"} & set(found.tags)
    assert "<img src=x onerror=y>" in found.text


def test_a_run_without_prices_or_metrics_still_makes_a_page(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 9, setup=9.0)])
    text = page.as_html(build(read_run(run.url), LATER), LATER)
    assert "$?" in text
    assert "Loss against dollars" not in text


@pytest.mark.parametrize("price", [1e-9, 1e-4, 1e9])
def test_a_run_of_any_price_makes_a_page(tmp_path: Path, price: float):
    run = preempted_and_resumed(tmp_path)
    for number, start in ((1, NOON), (2, NOON + 500)):
        steps = [[number, 50.0, 0.0]]
        run.segment(number, start, [span(start, start + 100, steps, setup=50.0, train=50.0)], usd_per_hour=price)
    assert "Loss against dollars" in page.as_html(build(read_run(run.url), LATER), LATER)


def test_the_waterfall_ends_at_the_total(report: CostReport):
    drawn = charts.waterfall(report, 720, "wide")
    bars = [
        (float(x), float(w))
        for x, w in re.findall(r'<rect class="area[^"]*" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    ]
    *phases, total = bars
    for (x, width), (after, _) in itertools.pairwise(phases):
        assert after == pytest.approx(x + width, abs=1.5)
    assert phases[-1][0] + phases[-1][1] == pytest.approx(total[0] + total[1], abs=1.5)


@pytest.mark.parametrize(
    ("low", "high", "most"), [(0, 1, 5), (3.17, 10.4, 6), (0, 7e-4, 5), (1e9, 1.2e9, 4), (2, 2, 5)]
)
def test_ticks_are_few_round_and_inside(low, high, most):
    ticks = svg.nice_ticks(low, high, most)
    assert 1 <= len(ticks) <= most + 1
    assert all(low <= tick <= high for tick in ticks)


def test_markdown_holds_the_same_tables(report: CostReport):
    text = render.as_markdown(report)
    assert "| train lost | 1 min 52 s | 1.12 | 22.8 % |" in text
    assert "| **total** | **10 min 12 s** | **4.92 to 4.95** | **100.0 %** |" in text
    assert "|---" not in text.replace("| --- |", "")


def test_markdown_keeps_foreign_words_in_their_cell(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [span(NOON, NOON + 9, setup=9.0)], usd_per_hour=36.0, zone="a|b\nc")
    assert "a\\|b c" in render.as_markdown(build(read_run(run.url), LATER))


def entry(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    command.main(list(arguments))
    return capsys.readouterr().out


def test_without_an_argument_all_runs_are_shown(run, capsys, monkeypatch, tmp_path):
    second = preempted_and_resumed(tmp_path / "runs" / "nested" / "second")
    (tmp_path / "runs" / "data" / "shards").mkdir(parents=True)
    monkeypatch.setenv("BUCKET", str(tmp_path))
    assert list(discover.find_runs(str(tmp_path / "runs"))) == [run.url, second.url]
    out = entry(capsys, "--offline")
    assert "2 runs" in out
    assert "9.84" in out
    by_market = [line.split() for line in out.splitlines() if "on demand" in line or line.split()[:1] == ["spot"]]
    assert [" ".join(words[-3:]) for words in by_market] == ["7.44 to 7.50", "00 s 2.40"]
    assert [each["run"] for each in json.loads(entry(capsys, "--offline", "--json"))] == [run.url, second.url]


def test_a_run_that_cannot_be_read_does_not_hide_the_others(run, capsys, monkeypatch, tmp_path):
    GoldenRun(tmp_path / "runs" / "empty")
    monkeypatch.setenv("BUCKET", str(tmp_path))
    assert "1 run" in entry(capsys, "--offline")


def test_since_and_tag_choose_runs(run, capsys, monkeypatch, tmp_path):
    tagged = preempted_and_resumed(tmp_path / "runs" / "tagged")
    start = tagged.path / "ledger/segment-000001/start.jsonl"
    start.write_text(start.read_text().replace('"program": {}', '"tags": ["paper"]'))
    monkeypatch.setenv("BUCKET", str(tmp_path))
    assert json.loads(entry(capsys, "--offline", "--json", "--tag", "paper"))["run"] == tagged.url
    assert len(json.loads(entry(capsys, "--offline", "--json", "--since", "2026-11-20T12:10"))) == 2
    with pytest.raises(LauncherError, match="2 runs found, none to report"):
        command.main(["--offline", "--since", "2026-11-21"])
    with pytest.raises(ConfigError, match="--since is 'yesterday'"):
        command.main(["--offline", "--since", "yesterday"])
    with pytest.raises(ConfigError, match="leave out RUN_URL"):
        command.main([run.url, "--tag", "paper"])


def test_no_run_and_no_place_to_look_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="set BUCKET"):
        command.main([])
    monkeypatch.setenv("BUCKET", str(tmp_path / "nothing"))
    with pytest.raises(LauncherError, match="no run found here"):
        command.main([])


def test_runs_side_by_side(run, capsys, tmp_path):
    cheap = preempted_and_resumed(tmp_path / "cheap")
    cheap.segment(1, NOON, [span(NOON, NOON + 100, setup=20.0, train=80.0)], usd_per_hour=3.6)
    out = entry(capsys, "--offline", "--markdown", "--compare", run.url, cheap.url)
    rows = {line.split("|")[1].strip(): line for line in out.splitlines()}
    assert "| first | cheap | − first |" in rows[""]
    assert rows["USD total"].split("|")[2:5] == [" 4.92 to 4.95 + ? ", " 1.57 + ? ", " -3.35 + ? "]
    assert "1.30 (" in rows["USD setup"]
    target = tmp_path / "both.html"
    command.main(["--offline", "--html", str(target), "--compare", run.url, cheap.url])
    assert "-3.35" in Page(target.read_text()).text
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        command.main([run.url, "--offline", "--html", str(tmp_path / "nowhere" / "report.html")])
    with pytest.raises(ConfigError, match="needs two or more"):
        command.main(["--offline", "--compare", run.url])


def test_tables_hold_at_eighty_columns(run, tmp_path):
    """No word and no number is broken, and the title names the columns that a wider terminal adds."""
    reports = [build(read_run(preempted_and_resumed(tmp_path / "runs" / name).url), LATER) for name in "ab"]
    sheets = [*tables.sheets(reports[0]).values(), compare.overview(reports), compare.overview_groups(reports)]
    for sheet in sheets:
        screen = io.StringIO()
        Console(file=screen, width=80).print(render.terminal_table(sheet, 80))
        shown = screen.getvalue()
        assert max(map(len, shown.splitlines())) <= 80
        narrow = render._narrowed(sheet, 80)
        words = {word for row in (narrow.heads, *narrow.rows, narrow.foot) for cell in row for word in cell.split()}
        assert words <= set(shown.split())
    assert "a wider terminal adds USD/1B tokens" in render._narrowed(sheets[-2], 80).title
    heads = ["segment", "started (UTC)", "machine", "ended", "USD/h"]
    row = ["1", "2026-11-30 21:59:27", "this-machine demo", "killed (end: last heartbeat)", "22.32"]
    for width in range(60, 110):
        screen = io.StringIO()
        Console(file=screen, width=width).print(render.terminal_table(tables.Sheet("", heads, [row], 4), width))
        assert {"this-machine", "2026-11-30", "heartbeat)"} <= set(screen.getvalue().split())
        assert max(map(len, screen.getvalue().splitlines())) <= width
    assert render._narrowed(sheets[-2], 400) == sheets[-2]


def test_a_run_is_followed_until_it_ends(run, monkeypatch):
    """`--watch` on a terminal: a report that changes, then the last one."""
    states = iter(["running", "running", "finished"])
    real = show._report
    slept = []

    def stepping(url, options):
        report = real(url, options)
        return CostReport(**{**vars(report), "state": next(states)})

    monkeypatch.setattr(show, "_report", stepping)
    monkeypatch.setattr(show.time, "sleep", slept.append)
    screen = io.StringIO()
    monkeypatch.setattr(render, "console", lambda: Console(file=screen, force_terminal=True, width=150))
    command.main([run.url, "--offline", "--watch", "2"])
    assert slept == [2.0, 2.0]
    assert "finished" in screen.getvalue()


def test_a_run_that_may_come_back_is_followed_further():
    def seen(state: str, is_managed: bool) -> bool:
        return show.may_go_on(SimpleNamespace(state=state, is_managed=is_managed))

    assert [seen(state, True) for state in ("running", "preempted", "killed (end: last heartbeat)")] == [True] * 3
    assert [seen(state, True) for state in ("finished", "failed", "stopped by its cap")] == [False] * 3
    assert [seen(state, False) for state in ("running", "preempted")] == [True, False]


def test_a_run_that_has_not_begun_is_waited_for(run, tmp_path, monkeypatch):
    screen, later = io.StringIO(), tmp_path / "runs" / "later"
    monkeypatch.setattr(show.time, "sleep", lambda _: run.path.rename(later))
    monkeypatch.setattr(render, "console", lambda: Console(file=screen, force_terminal=True, width=150))
    command.main([str(later), "--offline", "--watch", "2"])
    assert "waiting: " in screen.getvalue()
    assert "finished" in screen.getvalue()


def test_html_file_is_written(run, tmp_path):
    target = tmp_path / "report.html"
    command.main([run.url, "--offline", "--html", str(target)])
    assert target.read_text().startswith("<!doctype html>")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
def test_a_browser_shows_every_chart_and_logs_no_error(run, tmp_path):
    target = tmp_path / "report.html"
    command.main([run.url, "--offline", "--html", str(target)])
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=2000"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [BROWSER, *flags.split(), profile, "--dump-dom", f"file://{target}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert "CONSOLE" not in shown.stderr
    found = Page(shown.stdout)
    charts = [label for label in re.findall(r'aria-label="([^"]+)"', shown.stdout)]
    assert len(charts) == 17  # four in three widths, that of the machines in five
    assert len([path for path in found.paths if len(path) > 30]) >= 6


def test_flops_follow_the_models_formula():
    from costs.units import flops_per_token

    matrices = 50304 * 64 + 2 * 12 * 64 * 64
    assert flops_per_token({"model": MODEL}) == 6 * matrices + 12 * 2 * 128 * 64
    assert flops_per_token({"model": {"kind": "other"}}) is None
    assert flops_per_token({}) is None


def test_what_the_command_takes_is_documented(capsys):
    """Every flag of the report and the forecast, and every assumption, is in docs/costs.md."""
    documented = (REPOSITORY / "docs/costs.md").read_text()
    flags = set()
    for arguments in (["--help"], ["estimate", "--help"]):
        with pytest.raises(SystemExit):
            command.main(arguments)
        flags |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    names = {field.name.replace("_", "-") for field in dataclasses.fields(Assumptions)}
    assert {name for name in names if f"`{name}`" not in documented} == set()
    # The page lists an assumption by its name alone.
    assert {flag for flag in flags - {"--help"} if flag not in documented and flag[2:] not in names} == set()


def test_thousands_of_segments_and_notes_do_not_bury_the_figures(tmp_path: Path):
    run = GoldenRun(tmp_path)
    for number in range(1, 61):
        run.segment(number, NOON - number * 1000, [span(NOON - number * 1000, NOON - number * 1000 + 9, setup=9.0)])
    report = build(read_run(run.url), LATER)
    assert len(report.notes) > 30
    text = render.as_markdown(report)
    assert "more notes: --json has all" in text
    assert "20 more: --json has all" in text
    shown = [row[0] for row in tables.sheets(report)["segments"].rows]
    assert shown == [*map(str, range(1, 21)), "…", *map(str, range(41, 61))]
    assert len(report.segments) == 60


def test_a_python_without_our_packages_is_replaced_or_told_what_to_do(tmp_path: Path):
    copy = shutil.copy(REPOSITORY / "cost_report.py", tmp_path)
    bare = [sys.executable, "-I", "-S", copy, "s3://b/runs/first"]  # without site-packages
    told = subprocess.run(bare, capture_output=True, text=True)
    assert told.returncode == 1
    assert re.fullmatch(
        r"error: \S+ lacks dotenv, numpy, obstore, rich, yaml; run `make setup` once, then the same command again\n",
        told.stderr,
    )
    python = tmp_path / ".venv-launch" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nshift\necho "replaced: $*"\n')
    python.chmod(0o755)
    assert subprocess.run(bare, capture_output=True, text=True).stdout == "replaced: s3://b/runs/first\n"
