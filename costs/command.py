"""Parses the command line of cost_report.py and runs a report, an estimate or a plan. docs/costs.md describes both."""

import argparse

from core import environment
from core.errors import ConfigError

FORMS = ("json", "csv", "markdown")
WATCH_SECONDS = 15.0
SERVED_EVERY_SECONDS = 5.0
PORT = 8321
USAGE = """\
Reports where the dollars of a run went, phase by phase, adding up to the cent.

  python cost_report.py                                   all runs in $BUCKET
  python cost_report.py s3://bucket/runs/gpt2             one run
  python cost_report.py RUN_URL --html report.html        one self-contained page
  python cost_report.py --compare RUN_URL RUN_URL         side by side
  python cost_report.py --serve                           live pages on http://127.0.0.1:8321
  python cost_report.py estimate TASK.yaml                what a launch would cost (--fail-over=USD for scripts)
  python cost_report.py plan --usd=20                     the best model for a sum of dollars
  python cost_report.py add RUN_URL "Hugging Face" 2.00   a bill from elsewhere, as a line of the report
"""


def main(arguments: list[str]) -> int | None:
    """Run a report, an estimate or a plan, or add a bill. Raises LauncherError if it has nothing to show."""
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
    parser.add_argument("--html", metavar="FILE", help="write one page that needs no network")
    parser.add_argument("--compare", nargs="+", metavar="RUN_URL", help="put runs side by side")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=WATCH_SECONDS, metavar="SECONDS", help="follow a run that is running"
    )
    parser.add_argument(
        "--serve", action="store_true", help="live pages on 127.0.0.1: of RUN_URL, or of all runs and comparisons"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"of --serve (default {PORT}; 0: a free one)")
    parser.add_argument(
        "--every", type=float, default=SERVED_EVERY_SECONDS, metavar="SECONDS", help="how often --serve reads again"
    )
    parser.add_argument("--since", metavar="WHEN", help="only runs active since a date (2026-11-01) or age (36h, 7d)")
    parser.add_argument("--tag", metavar="WORD", help="only runs with this word among their RUN_TAGS")
    parser.add_argument("--offline", action="store_true", help="read only the store, and ask neither SkyPilot nor AWS")
    parser.add_argument("--no-cache", action="store_true", help="ignore the local cache, read all from the store")
    return parser
