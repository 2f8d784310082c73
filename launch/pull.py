"""Brings a run to this machine: metrics, ledger, logs, and the newest complete checkpoint. Files that are there stay.

    python -m launch.pull sky/pretrain-8xa100.yaml             the run that BUCKET and RUN name, to pulled/RUN
    python -m launch.pull s3://bucket/runs/gpt2-124m [FOLDER]  a run by its URL

The copy is a run folder like any other: `python cost_report.py pulled/gpt2-124m` works on it.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core import environment, storage
from core.console import progress, run_entry, set_up_logging
from core.errors import ConfigError, ObjectNotFound
from core.storage import ObjectInfo
from launch.work import run_of

FOLDERS = ("ledger", "metrics", "evaluations", "logs", "preflight", "refused")
LISTINGS = 3
_CHECKPOINT = re.compile(r"/checkpoints/(step-\d+)/")


def main(arguments: list[str]) -> None:
    environment.adopt()
    set_up_logging()
    if len(arguments) not in (1, 2) or not arguments[0]:
        raise ConfigError("usage: python -m launch.pull RUN_URL|sky/TASK.yaml [FOLDER] (make pull BUCKET=… RUN=…)")
    run_url = run_of(arguments[0], os.environ)
    folder = arguments[1] if len(arguments) == 2 else f"pulled/{run_url.rstrip('/').rpartition('/runs/')[2]}"
    for attempt in range(LISTINGS):
        wanted = choose(run_url, storage.list_objects(run_url))
        try:
            missing = fetch(wanted, run_url, folder)
            break
        except ObjectNotFound:  # a journal of a running job was put together since we listed it
            if attempt == LISTINGS - 1:
                raise
    steps = {match.group(1) for info in wanted if (match := _CHECKPOINT.search(info.uri))}
    found = f"{len(missing)} of {len(wanted)} objects fetched to {folder}"
    print(f"{run_url}: {found}; checkpoint: {', '.join(steps) or 'none yet'}")


def fetch(wanted: list[ObjectInfo], run_url: str, folder: str) -> list[ObjectInfo]:
    """Download what is not there yet; returns it."""
    missing = [info for info in wanted if not _there(info, run_url, folder)]
    with progress("pull", sum(info.size for info in missing), "bytes") as bar, ThreadPoolExecutor(8) as pool:

        def one(info: ObjectInfo) -> None:
            path = _path(info, run_url, folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            bar.advance(storage.download(info.uri, path))

        list(pool.map(one, missing))
    return missing


def choose(run_url: str, objects: list[ObjectInfo]) -> list[ObjectInfo]:
    """run.json, the folders above, and of the checkpoints the newest that has its marker."""
    root = run_url.rstrip("/")
    if not any(info.uri == f"{root}/run.json" for info in objects):
        raise ObjectNotFound(f"{root}/run.json: there is no run here; check RUN and BUCKET")
    markers = [info.uri for info in objects if info.name == "COMPLETE" and info.uri.startswith(f"{root}/checkpoints/")]
    complete = sorted(match.group(1) for uri in markers if (match := _CHECKPOINT.search(uri)))
    prefixes = [f"{root}/{folder}/" for folder in FOLDERS]
    prefixes += [f"{root}/checkpoints/{complete[-1]}/"] if complete else []
    return [info for info in objects if info.uri == f"{root}/run.json" or info.uri.startswith(tuple(prefixes))]


def _path(info: ObjectInfo, run_url: str, folder: str) -> Path:
    return Path(folder, *info.uri.removeprefix(run_url.rstrip("/") + "/").split("/"))


def _there(info: ObjectInfo, run_url: str, folder: str) -> bool:
    path = _path(info, run_url, folder)
    return path.exists() and path.stat().st_size == info.size


if __name__ == "__main__":
    run_entry(main)
