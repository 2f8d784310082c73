"""Compares sides, which are programs or settings: interleaved rounds, medians, a table, and a JSON record.

    runs = harness.interleaved({"ours": ours, "theirs": theirs}, rounds=3)
    results = harness.header("torch") | {"rounds": 3, "median": harness.medians(runs)}
    harness.finish(results, show, options.out)

A side that needs a separate process runs as a module and reports each result by `say`. `run_process` starts such a
module and receives its results. It ends the module at a deadline, or together with this process. bench.harness imports
neither torch nor rich, because machines that run bench.on_gpu may lack packages.
"""

import argparse
import contextlib
import functools
import json
import math
import mmap
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TextIO, TypeVar

from core.run.machine import program_versions
from demo.processes import die_with_parent, kill_tree

T = TypeVar("T")
REPOSITORY = Path(__file__).parent.parent
BUCKET = "bench"
# A torchrun command whose ranks are on this machine and meet on loopback.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d")
TORCHRUN += ("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")
POLL_SECONDS = 1.0
_MARK = "measured: "
_LONGEST = 400

end_with_parent = functools.partial(die_with_parent, signal.SIGKILL)


def options(description: str | None, rounds: int = 0) -> argparse.ArgumentParser:
    """A parser with the option --out. If `rounds` is given, there is also --rounds, with `rounds` as its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser


def header(*packages: str) -> dict[str, Any]:
    """The first fields of a record: date, machine, and the versions of the `packages` that are installed."""
    return {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "versions": {name: version for name, version in program_versions(packages).items() if name in packages},
    }


def interleaved(sides: Mapping[str, Callable[[int], T]], rounds: int, warm_up: int = 0) -> dict[str, list[T]]:
    """Call every side once per round with the number of the call, from 0. The first `warm_up` rounds are discarded."""
    runs: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            result = side(number)
            if number >= warm_up:
                runs[name].append(result)
                print(f"round {number - warm_up + 1} of {rounds}: {name}", file=sys.stderr)
    return runs


def median(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each value over several results of one side."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def medians(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {name: median(results) for name, results in runs.items()}


def ratio(runs: Mapping[str, Sequence[Mapping[str, float]]], side: str, other: str, key: str) -> float:
    """The ratio of `key` between `side` and `other`, as a median over the rounds.

    The ratio is computed within each round, because a slow minute of the machine affects both sides of a round.
    """
    pairs = zip(runs[side], runs[other], strict=True)
    return statistics.median(mine[key] / theirs[key] for mine, theirs in pairs)


def finish(results: dict[str, Any], show: Callable[[dict], None], out: Path | None) -> None:
    """Print the results and store them in `out`, if given."""
    show(results)
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


@contextlib.contextmanager
def s3_server(scratch: Path | None = None) -> Iterator[tuple[Path, Any]]:
    """A temporary folder in `scratch`, and an S3 server (demo.s3_server) with the bucket `bench`.

    The server keeps its data in this folder. Until the end of the context, the environment's variables direct S3
    clients to the server.
    """
    from demo.s3_server import S3Server

    with tempfile.TemporaryDirectory(dir=scratch) as folder, S3Server(Path(folder) / "s3") as server:
        before = dict(os.environ)
        os.environ.update(server.environment())
        try:
            server.make_bucket(BUCKET)
            yield Path(folder), server
        finally:
            os.environ.clear()
            os.environ.update(before)


def touch_pages(size: int) -> None:
    """Use `size` bytes of memory once and free them. Call this before a side that needs so much memory.

    On a virtual machine that returns free pages to its host, the first use of a page takes ten times as long as a later
    use. The times of a side should not contain this. The memory is anonymous, because pages of a file would be written
    to disk later, while the side is measured.
    """
    with mmap.mmap(-1, size) as pages:
        for begin in range(0, size, mmap.PAGESIZE):
            pages[begin] = 1


# --- sides and measurements as processes -----------------------------------------------------------------------


def say(text: str, **values: Any) -> None:
    """Report a result to the process that started this process: `text` for people, `values` for the record."""
    print(_MARK + json.dumps({"text": text, **values}), flush=True)


def measured(command: Sequence[str]) -> dict[str, Any]:
    """Run a side as a process without a time limit. Returns its last result. Raises SystemExit if the side fails."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as log:
        why = run_process(command, log, math.inf, results.append)
        if why or not results:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {why or 'no result'}\n{log.read()[-3000:]}")
    return {name: value for name, value in results[-1].items() if name != "text"}


def run_process(command: Sequence[str], log: TextIO, deadline: float, take: Callable[[dict[str, Any]], None]) -> str:
    """Run `command` until it ends, or until `deadline` (of time.monotonic). Its child processes end with it.

    Calls `take` with each result and writes all other output to `log`. Returns the reason of a failure, or an empty
    text.
    """
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        return _follow(process, log, deadline, take)
    finally:
        kill_tree(process)


def _follow(process: subprocess.Popen, log: TextIO, deadline: float, take: Callable[[dict[str, Any]], None]) -> str:
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    last = ""
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))
        except queue.Empty:
            if process.poll() is not None:
                break  # another process keeps the output of this process open
            if time.monotonic() < deadline:
                continue
            return "the time was over while this measurement ran; give more time with --minutes"
        if line is None:
            break
        if line.startswith(_MARK):
            take(json.loads(line.removeprefix(_MARK)))
            continue
        log.write(line)
        log.flush()
        last = line.strip() or last
    code = process.wait()
    return f"exit status {code}: {last[-_LONGEST:]}" if code else ""


def _read(stream: TextIO, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
