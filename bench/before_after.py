"""Compares two working trees of this project: runs the benchmarks of both in turn and writes one record.

    python -m bench.before_after --before=../old [--rounds=3] [--only=report,loader] [--scratch=/tmp/bench] [--out=FILE]

A tree is a checkout with its own `.venv` (`make setup`). In each round, a measurement runs once in each tree, where it
is started as a user would start it:

    report                               the cost report of a run of 10,000 segments, and the start of the program
    storage                              small requests to an S3 server on loopback
    loader, checkpoint, restart, prep    the benchmark of this name

The table shows medians and the ratio of seconds. A ratio above 1 means that this tree, `after`, is slower than
`before`. Rates are shown as seconds per million. On a shared machine, CPU seconds are more reliable than wall-clock
time.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import harness

SEGMENTS = 10_000
Figures = dict[str, float]


def main() -> None:
    parser = harness.options(__doc__, rounds=3)
    parser.add_argument("--before", type=Path, required=True, help="folder with the earlier checkout")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help=f"default {','.join(MEASUREMENTS)}")
    parser.add_argument("--scratch", type=Path, help="existing folder for about 8 GB of files")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        parser.error(f"--only={unknown[0]}: not a measurement; choose from {', '.join(MEASUREMENTS)}")
    for tree in (options.before, harness.REPOSITORY):
        if not python_of(tree).exists():
            parser.error(f"{python_of(tree)}: not found; run `make setup` in {tree}")
    results = harness.header("torch", "numpy", "obstore", "botocore", "pyarrow") | {
        "commits": {"before": commit_of(options.before), "after": commit_of(harness.REPOSITORY)},
        "failed": {},
        "median": {},
    }
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for name in names:
            try:
                runs = _both(name, MEASUREMENTS[name](Path(folder)), options.before, options.rounds)
            except SystemExit as error:  # if a measurement fails, the other measurements still run
                results["failed"][name] = str(error)
                print(error, file=sys.stderr)
                continue
            results["median"][name] = _median(*runs.values()) | {"load": os.getloadavg()[0]}
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    harness.finish(results, show, options.out)
    if results["failed"]:
        raise SystemExit(f"failed: {', '.join(results['failed'])}")


def _both(name: str, measure: Callable[[Path], Figures], before: Path, rounds: int) -> dict[str, list[Figures]]:
    sides = {f"{name} before": before, f"{name} after": harness.REPOSITORY}
    return harness.interleaved({side: lambda _, tree=tree: measure(tree) for side, tree in sides.items()}, rounds)


def python_of(tree: Path) -> Path:
    return tree.absolute() / ".venv/bin/python"


def commit_of(tree: Path) -> str:
    describe = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()


def _median(before: list[Figures], after: list[Figures]) -> dict[str, dict[str, float]]:
    found = {}
    for key in before[0]:
        sides = {"before": before, "after": after}
        medians = {side: statistics.median(run[key] for run in runs) for side, runs in sides.items()}
        found[key] = medians | {"ratio": medians["after"] / medians["before"]}
    return found


def show(results: dict[str, Any]) -> None:
    rows = [
        [f"{name}: {key}", f"{values['before']:.3f}", f"{values['after']:.3f}", f"{values['ratio']:.2f}"]
        for name, figures in results["median"].items()
        for key, values in figures.items()
        if key != "load"
    ]
    commits = " and ".join(results["commits"].values())
    title = f"{commits}, medians, {results['machine']['cores']} cores"
    harness.print_table(title, ["seconds", "before", "after", "after / before"], rows)


# --- measurements: each function takes a scratch folder, and returns a function that measures a tree -------------


def _report(folder: Path) -> Callable[[Path], Figures]:
    run = folder / "run"
    write_run(run, SEGMENTS)

    def measure(tree: Path) -> Figures:
        whole = _timed(tree, "cost_report.py", str(run), "--no-cache", "--offline")
        start = _timed(tree, "cost_report.py", "--help")
        return {f"{SEGMENTS:,} segments, CPU": whole, "--help, CPU": start}

    return measure


SMALL = """
import json, os, resource, sys, time
def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
began, url = cpu(), sys.argv[1]
from core import storage
storage.write_bytes(url + "/first", b"first")
storage.read_bytes(url + "/first")
found = {"import, first write and read, CPU": cpu() - began}
began = cpu()
for number in range(300):
    storage.write_bytes(f"{url}/small-{number}", b"x" * 500)
found["300 small writes, CPU"] = cpu() - began
storage.write_bytes(url + "/large", os.urandom(64 << 20))
began, clock = cpu(), time.perf_counter()
for number in range(2000):
    storage.read_range(url + "/large", number * 32768, number * 32768 + 65536)
found |= {"2,000 ranges of 64 KiB, CPU": cpu() - began, "2,000 ranges of 64 KiB": time.perf_counter() - clock}
print(json.dumps(found))
"""


def _storage(folder: Path) -> Callable[[Path], Figures]:
    def measure(tree: Path) -> Figures:
        with harness.s3_server(folder):
            command = [str(python_of(tree)), "-c", SMALL, f"s3://{harness.BUCKET}/small"]
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"storage failed in {tree}:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout)

    return measure


def _loader(folder: Path) -> Callable[[Path], Figures]:
    def measure(tree: Path) -> Figures:
        ours = _record(tree, folder, "bench.loader", "--sides=ours")["median"]["ours"]
        figures = {"first batch": ours["first_batch"], "CPU of both passes": ours["cpu_seconds"]}
        return figures | {f"pass {n}, per million tokens": 1e6 / ours[f"pass_{n}"] for n in (1, 2)}

    return measure


def _checkpoint(folder: Path) -> Callable[[Path], Figures]:
    def measure(tree: Path) -> Figures:
        median = _record(tree, folder, "bench.checkpoint", f"--scratch={folder}")["median"]
        keys = ("blocked", "total", "total_cpu", "restore", "restore_cpu")
        return {f"{side}, {key}": median[f"ours, {side}"][key] for side in ("local", "S3") for key in keys}

    return measure


def _restart(folder: Path) -> Callable[[Path], Figures]:
    return lambda tree: _record(tree, folder, "bench.restart", f"--scratch={folder}")["median"]


def _prep(folder: Path) -> Callable[[Path], Figures]:
    corpus = folder.parent  # this folder is kept, so that the next call finds the text

    def measure(tree: Path) -> Figures:
        figures = {}
        for where in ("folder", "bucket"):
            flags = [f"--scratch={corpus}", "--text=code", "--sides=ours", f"--where={where}"]
            (run,) = _record(tree, folder, "bench.prep", *flags)["runs"]["ours"]
            figures |= {where: run["seconds"], f"{where}, CPU": run["cpu_seconds"]}
        return figures

    return measure


MEASUREMENTS: dict[str, Callable[[Path], Callable[[Path], Figures]]] = {
    "report": _report,
    "storage": _storage,
    "loader": _loader,
    "checkpoint": _checkpoint,
    "restart": _restart,
    "prep": _prep,
}


def _record(tree: Path, folder: Path, module: str, *flags: str) -> dict[str, Any]:
    """The record that a benchmark of `tree` writes in one round."""
    out = folder / "record.json"
    _timed(tree, "-m", module, "--rounds=1", f"--out={out}", *flags)
    return json.loads(out.read_text())


def _timed(tree: Path, *arguments: str) -> float:
    """Run the Python of `tree` in this folder. Returns CPU seconds, child processes included. Raises SystemExit."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(python_of(tree)), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {tree}:\n{(done.stderr or done.stdout)[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_run(run: Path, segments: int) -> None:
    """Write a run of ten steps per segment, in the stored formats (docs/formats.md)."""
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"format": "run", "version": 1, "config": {"train": {"steps": 10}}}))
    machine = {"cloud": "aws", "region": "us-east-1", "instance_type": "p4d.24xlarge", "gpu": "A100", "nodes": 1}
    machine |= {"gpus_per_node": 8, "spot": True, "usd_per_hour": 12.0, "price_source": "written"}
    for number in range(1, segments + 1):
        begin = time.time() - (segments - number + 1) * 300
        folder = run / f"ledger/segment-{number:06d}"
        (folder / "events").mkdir(parents=True)
        start = {"event": "start", "version": 1, "segment": number, "time": begin, "machine": machine, "program": {}}
        (folder / "start.jsonl").write_text(json.dumps(start) + "\n")
        (folder / "events/00000000-00000003.jsonl").write_text(
            "".join(json.dumps(event) + "\n" for event in _events(begin, 10 * number - 10))
        )


def _events(begin: float, step: int) -> Iterator[dict[str, Any]]:
    phases = {"setup": 100.0, "init": 20.0, "compile": 30.0}
    yield {"event": "span", "start": begin, "end": begin + 150, "phases": phases, "steps": []}
    yield {"event": "mark", "time": begin + 150, "name": "restored", "step": step, "checkpoint": None, "skipped": []}
    steps = [[step + i, 10.0, 1.0] for i in range(1, 11)]
    phases = {"train": 100.0, "data_wait": 5.0, "checkpoint": 5.0}
    yield {"event": "span", "start": begin + 150, "end": begin + 260, "phases": phases, "steps": steps}
    yield {"event": "end", "time": begin + 260, "reason": "preempted", "step": step + 10}


if __name__ == "__main__":
    main()
