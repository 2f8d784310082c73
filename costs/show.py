"""Reads runs and prints reports on them, in the form that the options of cost_report.py choose."""

import argparse
import gc
import logging
import os
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from clouds.providers import on_demand_price
from core import urls
from core.errors import ConfigError, LauncherError, RunError, one_line
from core.run import cache
from core.run.reader import read_run
from costs import compare, discover, render, tables
from costs.notify import Watched
from costs.report import FINAL, RUNNING, CostReport, build
from costs.sources import ask_others

log = logging.getLogger("costs")


def show(options: argparse.Namespace, form: str | None) -> None:
    """Print or store the output for `options`. `form` is json, csv, markdown, or None for tables on a terminal.

    Raises LauncherError if there is nothing to report.
    """
    html = urls.local_path(options.html, "--html") if options.html else None
    if options.serve:
        from costs import serve  # imported here, because only --serve answers requests

        return serve.serve(options, live_reports(options, options.every))
    if options.compare:
        if options.watch is not None or len(options.compare) < 2:
            raise ConfigError("--compare needs two or more RUN_URLs, and does not go with --watch")
        reports = [_report(url, options) for url in options.compare]
        return _print_all(reports, form, html, is_comparison=True)
    if not options.run_url:
        return _print_all(_all_reports(options), form, html)
    if options.watch is not None:
        return _watch(options)
    report = _report(options.run_url, options)
    if html:
        from costs import page  # imported here, because only --html draws charts

        _write(html, page.as_html(report, time.time()))
    if form == "markdown":
        sys.stdout.write(render.as_markdown(report))
    elif form:
        sys.stdout.write({"json": render.as_json, "csv": render.as_csv}[form]([report]))
    elif not html:
        console = render.console()
        console.print(render.render(report, console.width))


def live_reports(options: argparse.Namespace, every: float):
    """The costs.serve.Reports for `options`. A report is never older than `every` seconds."""
    from costs import serve  # imported here, because only --serve answers requests

    return serve.Reports(lambda url: _report(url, options), lambda: _all_reports(options), every)


def _report(run_url: str, options: argparse.Namespace) -> CostReport:
    """The report on one run, with amounts from other sources unless --offline is given."""
    # Reading a ledger creates many small objects and no cycles, and the search for cycles would take a sixth of the
    # time.
    gc.disable()
    try:
        run = read_run(run_url, cache_file=None if options.no_cache else cache.path_for(run_url))
        now = time.time()
        outside = ask_others(run, os.environ, now, offline=options.offline)
        return build(run, now, on_demand_price, outside)
    finally:
        gc.enable()


def _all_reports(options: argparse.Namespace) -> list[CostReport]:
    """Reports on all runs in BUCKET that pass the filters. A warning names each run that cannot be read."""
    root = discover.runs_url(os.environ)
    since = _since(options.since, time.time()) if options.since else 0.0
    found, kept = 0, []
    for url in discover.find_runs(root):
        found += 1
        try:
            report = _report(url, options)
        except LauncherError as error:
            log.warning("left out of the report: %s", error)
            continue
        except Exception as error:  # a run that strangers have changed must not hide the other runs
            log.warning("left out: %s: cannot be understood (%s)", url, one_line(error))
            continue
        if tables.last_seen(report) >= since and (not options.tag or options.tag in report.tags):
            kept.append(report)
    if not kept:
        raise RunError(f"{root}: {found} runs found, none to report" if found else f"{root}: no run found here")
    return kept


def _print_all(reports: list[CostReport], form: str | None, html: Path | None, is_comparison: bool = False) -> None:
    """Several reports side by side, or as an overview."""
    if is_comparison:
        sheets = [compare.comparison(reports)]
    else:
        sheets = [compare.overview(reports), compare.overview_groups(reports)]
    if html:
        from costs import page  # imported here, because only --html draws pages

        of_several = page.comparison_as_html if is_comparison else page.overview_as_html
        _write(html, of_several(reports, time.time()))
    if form in ("json", "csv"):
        sys.stdout.write({"json": render.as_json, "csv": render.as_csv}[form](reports))
    elif form == "markdown":
        sys.stdout.write("\n\n".join(render.markdown_table(sheet) for sheet in sheets if sheet.rows) + "\n")
    elif not html:
        console = render.console()
        for sheet in sheets:
            if sheet.rows:
                console.print(render.terminal_table(sheet, console.width))


def _write(path: Path, text: str) -> None:
    """Raises ConfigError if the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written: {error.strerror}") from None
    log.info("wrote %s", path)


def _watch(options: argparse.Namespace) -> None:
    """Show the report every few seconds until the run has ended. The run may begin later.

    After a preemption, a managed job continues the run, so the reports go on too. Raises ConfigError if the output is
    not a terminal.
    """
    console = render.console()
    if not console.is_terminal:
        raise ConfigError("--watch needs a terminal; call cost_report.py repeatedly instead")

    watched = Watched.by_environment()

    def current() -> tuple[bool, RenderableType]:
        try:
            report = _report(options.run_url, options)
        except RunError as error:
            return True, Text(f"waiting: {error}")
        watched.look(report, time.time())
        return may_go_on(report), render.render(report, console.width)

    goes_on, shown = current()
    with Live(shown, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while goes_on:
            time.sleep(options.watch)
            goes_on, shown = current()
            live.update(shown, refresh=True)


def may_go_on(report: CostReport) -> bool:
    """Whether the run is running, or a managed job may continue it on another machine."""
    return report.state == RUNNING or (report.is_managed and report.state not in FINAL)


def _since(text: str, now: float) -> float:
    """A date, or an age in hours or days, as unix seconds. Raises ConfigError."""
    age = re.fullmatch(r"(\d+)([hd])", text)
    if age:
        return now - int(age.group(1)) * {"h": 3600, "d": 86400}[age.group(2)]
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--since is {text!r}, must be a date (2026-11-01) or an age (36h, 7d)") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
