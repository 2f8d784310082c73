"""Reports what a run cost: `python cost_report.py RUN_URL`. See --help and docs/costs.md for all options."""

from core.console import run_entry, set_up_logging
from costs.command import main

if __name__ == "__main__":
    set_up_logging()
    run_entry(main, shows=True)
