"""The command line of cost_report.py."""

import argparse
import sys
import time

from costs import export, terminal
from costs.breakdown import build
from costs.read import read_run

USAGE = """\
Where the dollars of a run went, phase by phase.

  python cost_report.py s3://bucket/runs/gpt2-124m
  python cost_report.py s3://bucket/runs/gpt2-124m --json
"""


def main(arguments: list[str]) -> None:
    """Raises LauncherError when there is nothing to report."""
    parser = argparse.ArgumentParser(
        "cost_report.py", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_url", metavar="RUN_URL", help="folder of a run: local, s3:// or gs://")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const=export.as_json, dest="form", help="as JSON")
    form.add_argument("--csv", action="store_const", const=export.as_csv, dest="form", help="as CSV")
    options = parser.parse_args(arguments)
    report = build(read_run(options.run_url), time.time())
    if options.form:
        sys.stdout.write(options.form(report).rstrip("\n") + "\n")
    else:
        terminal.show(report)
