"""The command line of cost_report.py: which runs, from which sources, in which form."""

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
from core import environment, urls
from core.errors import ConfigError, LauncherError, RunError
from core.run import cache
from core.run.reader import read_run
from costs import discover, page, render, tables
from costs.report import Report, build
from costs.sources import ask_others

log = logging.getLogger(__name__)
WATCH_SECONDS = 15.0
FORMS = ("json", "csv", "markdown")
USAGE = """\
Where the dollars of a run went, phase by phase, adding up to the cent.

  python cost_report.py                                   all runs in $BUCKET
  python cost_report.py s3://bucket/runs/gpt2             one run
  python cost_report.py RUN_URL --html report.html        one self-contained page
  python cost_report.py --compare RUN_URL RUN_URL         side by side
  python cost_report.py estimate TASK.yaml                what a launch would cost
"""


def main(arguments: list[str]) -> None:
    """Raises LauncherError when there is nothing to report."""
    environment.adopt()
    if arguments[:1] == ["estimate"]:
        from costs import estimate_command

        return estimate_command.main(arguments[1:])
    options = _parser().parse_args(arguments)
    form = next((name for name in FORMS if getattr(options, name)), None)
    if options.compare:
        reports = [_report(url, options) for url in options.compare]
        return _put_many(reports, [tables.comparison(reports)], form)
    if not options.run_url:
        reports = _all_reports(options)
        return _put_many(reports, [tables.overview(reports), tables.overview_groups(reports)], form)
    if options.since or options.tag:
        raise ConfigError("--since and --tag choose among all runs; leave RUN_URL out, or leave them out")
    html = urls.local_path(options.html, "--html") if options.html else None
    if options.watch is not None:
        return _watch(options)
    report = _report(options.run_url, options)
    if html:
        html.write_text(page.as_html(report, time.time()), encoding="utf-8")
        log.info("wrote %s", html)
    if form == "markdown":
        sys.stdout.write(render.as_markdown(report))
    elif form:
        sys.stdout.write({"json": render.as_json, "csv": render.as_csv}[form]([report]))
    elif not html:
        render.console().print(render.render(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cost_report.py", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_url", nargs="?", metavar="RUN_URL", help="folder of a run: local, s3:// or gs://")
    form = parser.add_mutually_exclusive_group()
    for name in FORMS:
        form.add_argument(f"--{name}", action="store_true", help=f"print {name.upper()} instead of tables")
    parser.add_argument("--html", metavar="FILE", help="write one page that needs no network")
    parser.add_argument("--compare", nargs="+", metavar="RUN_URL", help="put runs side by side")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=WATCH_SECONDS, metavar="SECONDS", help="follow a run that is running"
    )
    parser.add_argument("--since", metavar="WHEN", help="only runs seen since a date (2026-11-01) or age (36h, 7d)")
    parser.add_argument("--tag", metavar="WORD", help="only runs with this word among their RUN_TAGS")
    parser.add_argument("--offline", action="store_true", help="ask neither SkyPilot nor AWS; the store only")
    parser.add_argument("--no-cache", action="store_true", help="read everything from the store again")
    return parser


def _report(run_url: str, options: argparse.Namespace) -> Report:
    run = read_run(run_url, cache_file=None if options.no_cache else cache.path_for(run_url))
    now = time.time()
    outside = ask_others(run, os.environ, now, offline=options.offline)
    return build(run, now, on_demand_price, outside)


def _all_reports(options: argparse.Namespace) -> list[Report]:
    """Of all runs in BUCKET that pass the filters. A run that cannot be read is named and left out."""
    root = discover.runs_url(os.environ)
    since = _since(options.since, time.time()) if options.since else 0.0
    found, kept = 0, []
    for url in discover.find_runs(root):
        found += 1
        try:
            report = _report(url, options)
        except LauncherError as error:
            log.warning("left out: %s", error)
            continue
        if tables.last_seen(report) >= since and (not options.tag or options.tag in report.tags):
            kept.append(report)
    if not kept:
        raise RunError(f"{root}: {found} runs found, none to report" if found else f"{root}: no run found here")
    return kept


def _put_many(reports: list[Report], tables: list[tables.Sheet], form: str | None) -> None:
    if form in ("json", "csv"):
        sys.stdout.write({"json": render.as_json, "csv": render.as_csv}[form](reports))
    elif form == "markdown":
        sys.stdout.write("\n\n".join(render.markdown_table(table) for table in tables if table.rows) + "\n")
    else:
        for table in tables:
            if table.rows:
                render.console().print(render.terminal_table(table))


def _watch(options: argparse.Namespace) -> None:
    """Show the report anew until the run has ended or the user has seen enough."""

    def current() -> tuple[Report, RenderableType]:
        report = _report(options.run_url, options)
        return report, render.render(report)

    report, shown = current()
    console = render.console()
    if not console.is_terminal:
        raise ConfigError("--watch needs a terminal; call cost_report.py again and again instead, it reads only news")
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
