"""Reads runs and prints reports on them, in the form that the options of cost_report.py choose."""

import argparse
import logging
import os
import re
import sys
import time
from datetime import UTC, datetime

from rich.console import RenderableType
from rich.live import Live

from clouds.providers import on_demand_price
from core import urls
from core.errors import ConfigError, LauncherError, RunError, one_line
from core.run import cache
from core.run.reader import read_run
from costs import discover, render, tables
from costs.report import CostReport, build
from costs.sources import ask_others

log = logging.getLogger("costs")


def show(options: argparse.Namespace, form: str | None) -> None:
    """Print or store what `options` ask for. `form` is json, csv, markdown, or None for tables on a terminal.

    Raises LauncherError if there is nothing to report.
    """
    if options.compare:
        reports = [_report(url, options) for url in options.compare]
        return _print_all(reports, [tables.comparison(reports)], form)
    if not options.run_url:
        reports = _all_reports(options)
        return _print_all(reports, [tables.overview(reports), tables.overview_groups(reports)], form)
    html = urls.local_path(options.html, "--html") if options.html else None
    if options.watch is not None:
        return _watch(options)
    report = _report(options.run_url, options)
    if html:
        from costs import page  # not at the top: only --html draws charts

        html.write_text(page.as_html(report, time.time()), encoding="utf-8")
        log.info("wrote %s", html)
    if form == "markdown":
        sys.stdout.write(render.as_markdown(report))
    elif form:
        sys.stdout.write({"json": render.as_json, "csv": render.as_csv}[form]([report]))
    elif not html:
        render.console().print(render.render(report))


def _report(run_url: str, options: argparse.Namespace) -> CostReport:
    """The report on one run, with what other sources know unless --offline is given."""
    run = read_run(run_url, cache_file=None if options.no_cache else cache.path_for(run_url))
    now = time.time()
    outside = ask_others(run, os.environ, now, offline=options.offline)
    return build(run, now, on_demand_price, outside)


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
        except Exception as error:  # what others wrote into one run must not hide the others
            log.warning("left out: %s: cannot be understood (%s)", url, one_line(error))
            continue
        if tables.last_seen(report) >= since and (not options.tag or options.tag in report.tags):
            kept.append(report)
    if not kept:
        raise RunError(f"{root}: {found} runs found, none to report" if found else f"{root}: no run found here")
    return kept


def _print_all(reports: list[CostReport], tables: list[tables.Sheet], form: str | None) -> None:
    if form in ("json", "csv"):
        sys.stdout.write({"json": render.as_json, "csv": render.as_csv}[form](reports))
    elif form == "markdown":
        sys.stdout.write("\n\n".join(render.markdown_table(table) for table in tables if table.rows) + "\n")
    else:
        for table in tables:
            if table.rows:
                render.console().print(render.terminal_table(table))


def _watch(options: argparse.Namespace) -> None:
    """Show the report again every few seconds until the run has ended."""

    def current() -> tuple[CostReport, RenderableType]:
        report = _report(options.run_url, options)
        return report, render.render(report)

    report, shown = current()
    console = render.console()
    if not console.is_terminal:
        raise ConfigError("--watch needs a terminal; call cost_report.py repeatedly instead")
    with Live(shown, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while report.state == "running":
            time.sleep(options.watch)
            report, shown = current()
            live.update(shown, refresh=True)


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
