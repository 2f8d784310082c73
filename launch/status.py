"""What is running: SkyPilot's clusters and managed jobs, and what the clouds themselves say. Optionally a run's cost.

python -m launch.status [RUN_URL]
"""

import os
import subprocess
import sys
from pathlib import Path

from core.console import run_entry
from core.errors import LauncherError
from core.spending import spent_before
from launch.left import look
from launch.submit import find_sky, read_task, with_dotenv


def main(arguments: list[str]) -> int:
    os.environ.update(with_dotenv(os.environ, Path(".env")))
    print("$ sky status --refresh", flush=True)
    code = subprocess.call([find_sky(), "status", "--refresh"])
    found, unknown = look([read_task(str(path))["name"] for path in Path("sky").glob("*.yaml")])
    print("\nThe clouds say:")
    for line in [*found, *(f"? {problem}" for problem in unknown)] or ["nothing of this project is up"]:
        print(f"  {line}")
    for run_url in arguments:
        try:
            usd = spent_before(run_url, sys.maxsize)
        except LauncherError as error:
            print(f"\n{error}")
            continue
        print(f"\n{run_url}: {'?' if usd is None else f'${usd:.2f}'} so far (cost_report.py says on what)")
    return code


if __name__ == "__main__":
    run_entry(main)
