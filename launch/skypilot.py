"""SkyPilot's command: where it is, and its records of clusters and managed jobs.

skypilot.clusters()      [{"name": "pretrain-8xa100", "status": "UP", "labels": {...}, ...}, ...]
skypilot.jobs()          [{"job_id": 3, "job_name": "pretrain-8xa100-spot", "status": "RUNNING", ...}, ...]
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import secrets
from core.errors import ConfigError

# What SkyPilot 0.14.1 answers, with exit code 1, where its jobs controller is stopped or was never started.
NO_JOBS = "No in-progress managed jobs"
# Statuses of a managed job that go no further; the others begin with FAILED (sky/jobs/state.py).
_ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def find_sky() -> str:
    """SkyPilot's command beside this Python, or the one on PATH. Raises ConfigError."""
    found = shutil.which("sky", path=str(Path(sys.executable).parent)) or shutil.which("sky")
    if not found:
        raise ConfigError("the sky command is not installed; run `make setup-launch`")
    return found


def clusters() -> list[dict[str, Any]]:
    """This user's clusters, without those of managed jobs. Raises ConfigError where SkyPilot cannot list them."""
    return [record for record in listed(["status"]) if not record.get("is_managed")]


def jobs(ended: bool = False) -> list[dict[str, Any]]:
    """Managed jobs, newest first; with `ended` also those that are over. Raises ConfigError as `clusters` does."""
    found = listed(["jobs", "queue", *([] if ended else ["--skip-finished"])], nothing=NO_JOBS)
    return sorted(found, key=lambda job: job["job_id"], reverse=True)


def has_ended(job: dict[str, Any]) -> bool:
    return str(job.get("status")).startswith(_ENDED)


def listed(command: Sequence[str], nothing: str | None = None) -> list[dict[str, Any]]:
    """The records that `sky COMMAND -o json` prints. A failure that says `nothing` means that there are none.

    Raises ConfigError with SkyPilot's own words where it fails or prints no list.
    """
    done = subprocess.run([find_sky(), *command, "-o", "json"], capture_output=True, text=True, errors="replace")
    if done.returncode == 0 and (records := records_in(done.stdout)) is not None:
        return records
    said = _COLOUR.sub("", f"{done.stdout}\n{done.stderr}")
    if nothing and nothing in said:
        return []
    why = " ".join(said.split())[-300:] or f"it printed nothing and ended with {done.returncode}"
    raise ConfigError(f"`sky {' '.join(command)}` failed: {secrets.scrub(why)}")


def records_in(output: str) -> list[dict[str, Any]] | None:
    """The first JSON list of objects in what SkyPilot prints, which may begin with colours and prose. None without one.

    Where the API server was not running, "Failed to connect ... Starting a local server." comes first.
    """
    text = _COLOUR.sub("", output)
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\[", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        if all(isinstance(record, dict) for record in found):
            return found
    return None
