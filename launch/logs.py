"""What a job prints: from SkyPilot while it runs, or from the bucket, where every machine's output is kept.

python -m launch.logs sky/pretrain-8xa100.yaml       follows the output of the running job
python -m launch.logs s3://bucket/runs/gpt2-124m     all output so far, preempted machines included
"""

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

from core import journal, storage
from core.console import run_entry
from core.errors import ObjectNotFound
from launch.submit import find_sky, is_managed, read_task, with_dotenv

# Lines that bring their own time, as those of our programs do.
_TIMED = re.compile(r"\d\d:\d\d:\d\d ")


def main(arguments: list[str]) -> int:
    os.environ.update(with_dotenv(os.environ, Path(".env")))
    (source,) = arguments
    if not source.endswith(".yaml"):
        return show_stored(source)
    task = read_task(source)
    command = ["jobs", "logs", "--name", task["name"]] if is_managed(task) else ["logs", task["name"]]
    print(f"$ sky {' '.join(command)}", flush=True)
    return subprocess.call([find_sky(), *command])


def show_stored(run_url: str) -> int:
    """Print RUN_URL/logs in order of attempts. Raises ObjectNotFound when there are none."""
    attempts = sorted(storage.list_names(storage.join(run_url, "logs")))
    if not attempts:
        raise ObjectNotFound(
            f"{storage.join(run_url, 'logs')}: no machine has written output yet; check RUN and BUCKET"
        )
    for attempt in attempts:
        print(f"--- {attempt}")
        events, problems = journal.read(storage.join(run_url, "logs", attempt))
        for event in events:
            stamp = f"{datetime.datetime.fromtimestamp(event['time'], datetime.UTC):%H:%M:%S} "
            print(event["line"] if _TIMED.match(event["line"]) else stamp + event["line"])
        for problem in problems:
            print(f"warning: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_entry(main)
