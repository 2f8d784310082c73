"""Parses the command line of cost_report.py, and runs a report, an estimate or a plan (docs/costs.md)."""

import argparse

from core import environment
from core.errors import ConfigError

FORMS = ("json", "csv", "markdown")
WATCH_SECONDS = 15.0
SERVED_EVERY_SECONDS = 5.0
PORT = 8321
USAGE = """\
Shows what a run cost, phase by phase. All lines add up to the total, to the cent.

  python cost_report.py                                   shows all runs in $BUCKET
  python cost_report.py s3://bucket/runs/gpt2             shows one run
  python cost_report.py RUN_URL --html report.html        writes one page that needs no network
  python cost_report.py --compare RUN_URL RUN_URL         shows runs side by side
  python cost_report.py --serve                           serves live pages on http://127.0.0.1:8321
  python cost_report.py estimate TASK.yaml                forecasts the cost of a launch
  python cost_report.py plan --usd=20                     finds the best model for a sum of dollars
  python cost_report.py add RUN_URL "Hugging Face" 2.00   adds a bill from another source as a line of the report
"""


def main(arguments: list[str]) -> int | None:
    """Run a report, an estimate or a plan, or add a bill. Raises LauncherError if there is nothing to show."""
    environment.adopt()
    if arguments[:1] == ["estimate"]:
        from costs import estimate_command

        return estimate_command.main(arguments[1:])
    if arguments[:1] == ["plan"]:
        from costs.plan import command as plan_command

        return plan_command.main(arguments[1:])
    if arguments[:1] == ["add"]:
        from costs import added

        return added.main(arguments[1:])
    options = _parser().parse_args(arguments)
    if (options.since or options.tag) and options.run_url and not options.compare:
        raise ConfigError("--since and --tag choose among all runs; leave out RUN_URL, or these two options")
    if options.serve:
        _check_serving(options)
    from costs import show  # imported here: it loads numpy and rich, which --help does not need

    show.show(options, next((name for name in FORMS if getattr(options, name)), None))


def _check_serving(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that cannot be combined with --serve."""
    others = {"--html": options.html, "--compare": options.compare, "--watch": options.watch is not None}
    others |= {f"--{name}": getattr(options, name) for name in FORMS}
    if given := [name for name, value in others.items() if value]:
        raise ConfigError(f"{given[0]} does not go with --serve, whose pages hold tables, charts and comparisons")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port is {options.port}, must be from 0 (a free one) to 65535")
    if not 0.1 <= options.every < 86400:
        raise ConfigError(f"--every is {options.every:g}, must be seconds from 0.1 to 86,400")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cost_report.py", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_url", nargs="?", metavar="RUN_URL", help="folder of a run: local, s3:// or gs://")
    form = parser.add_mutually_exclusive_group()
    for name in FORMS:
        form.add_argument(f"--{name}", action="store_true", help=f"print {name.upper()} instead of tables")
    parser.add_argument("--html", metavar="FILE", help="write an HTML page, which needs no network")
    parser.add_argument("--compare", nargs="+", metavar="RUN_URL", help="compare these runs in one table")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=WATCH_SECONDS, metavar="SECONDS", help="report again every SECONDS"
    )
    parser.add_argument("--serve", action="store_true", help="serve live pages on 127.0.0.1, of RUN_URL or of all runs")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of --serve (default {PORT}; 0: any free port)")
    parser.add_argument(
        "--every",
        type=float,
        default=SERVED_EVERY_SECONDS,
        metavar="SECONDS",
        help="seconds between two updates of the pages of --serve",
    )
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="show only runs that were active after this date (2026-11-01), or in the last 36h or 7d",
    )
    parser.add_argument("--tag", metavar="WORD", help="show only runs that have this word in RUN_TAGS")
    parser.add_argument("--offline", action="store_true", help="read only the store; do not ask SkyPilot and AWS")
    parser.add_argument(
        "--no-cache", action="store_true", help="ignore the local cache, and read all objects from the store"
    )
    return parser
