"""Reports what a run cost: `python cost_report.py RUN_URL`. See --help and docs/costs.md for all options.

Any Python can run this file. If packages of the report are missing, the file starts itself again in an environment that
`make setup`, `make setup-launch` or `make demo` has made.
"""

import os
import sys
from importlib.util import find_spec

ENVIRONMENTS = (".venv", ".venv-launch", ".venv-demo")
PACKAGES = ("dotenv", "numpy", "obstore", "rich", "yaml")


def find_environment() -> None:
    """Start again in an environment with the packages of a report. Exit with a message if there is no environment."""
    lacking = [name for name in PACKAGES if find_spec(name) is None]
    if sys.version_info >= (3, 11) and not lacking:
        return
    folder = os.path.dirname(os.path.abspath(__file__))
    paths = [os.path.join(folder, name) for name in ENVIRONMENTS]
    # Only environments after the current one are tried. Otherwise two incomplete environments would start each other
    # forever.
    here = [number for number, path in enumerate(paths) if os.path.realpath(sys.prefix) == os.path.realpath(path)]
    for path in paths[here[0] + 1 if here else 0 :]:
        python = os.path.join(path, "bin", "python")
        if os.access(python, os.X_OK):
            sys.stdout.flush()
            os.execv(python, [python, *sys.argv])
    what = f"lacks {', '.join(lacking)}" if lacking else "is older than 3.11"
    sys.exit(f"error: {sys.executable} {what}; run `make setup` once, then the same command again")


if __name__ == "__main__":
    find_environment()
    from core.console import run_entry, set_up_logging
    from costs.command import main

    set_up_logging()
    run_entry(main, shows=True)
