"""SkyPilot's clusters and managed jobs, what the clouds themselves say, and what the run has cost so far.

python -m launch.status sky/pretrain-8xa100.yaml     of the run that BUCKET and RUN name, if BUCKET is set
python -m launch.status [RUN_URL]
"""

import os
import subprocess

from core import environment
from core.console import run_entry
from core.errors import LauncherError
from core.run.folder import RunFolder
from core.run.reader import Detail, read_run
from launch.down import look, project_tasks
from launch.skypilot import find_sky
from launch.work import run_of


def main(arguments: list[str]) -> int:
    environment.adopt()
    print("$ sky status --refresh", flush=True)
    code = subprocess.call([find_sky(), "status", "--refresh"])
    found, unknown = look(project_tasks())
    print("\nThe clouds say:")
    for line in [*found, *(f"? {problem}" for problem in unknown)] or ["nothing of this project is up"]:
        print(f"  {line}")
    if arguments and (not arguments[0].endswith(".yaml") or os.environ.get("BUCKET") or os.environ.get("RUN_URL")):
        print(f"\n{spent_line(run_of(arguments[0], os.environ))}")
    return code


def spent_line(run_url: str) -> str:
    """A line about the run's dollars. A run that is not there has not cost $0.00: its name may be wrong."""
    try:
        folder = RunFolder(run_url)
        if not folder.segment_numbers():
            return f"{folder.ledger}: no run here yet; check RUN and BUCKET"
        usd = read_run(run_url, Detail.MONEY).usd
    except LauncherError as error:
        return str(error)
    return f"{run_url}: {'?' if usd is None else f'${usd:.2f}'} so far (cost_report.py says on what)"


if __name__ == "__main__":
    run_entry(main)
