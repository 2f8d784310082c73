"""One training run under many SIGKILLs, compared bit by bit with a run that nothing interrupted.

    python -m tests.chaos --kills=100 [--out=FILE]           (or: make chaos)

Every life of the run starts on 1, 2 or 4 ranks, with the optimizer's state sharded or not, and is killed at a random
moment: within one and a half times what the untouched run took to its first step, or, while the run is behind its
schedule (the last kill is to come before the last step), some time after it has made a new checkpoint; at the latest
when it is ahead of its schedule. All processes at once (a machine goes away) or a single rank.
Then the run is finished, and its weights, its optimizer state, the metrics of every step and the kept steps of its
ledger must be those of the run that was never touched. The file that --out names gets what the run was made of and
what it kept.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from core import storage
from core.run import journal
from core.run.folder import RunFolder
from demo.processes import descendants, kill_tree
from demo.s3_server import S3Server
from tests import corpus, launching

MAX_LOST_SECONDS = 2
BEFORE_LAST_KILL = 0.9  # share of the steps that are to be done when the last kill comes


def chaos(data_url: str, base_url: str, kills: int, steps: int, seed: int) -> dict:
    """Run both and compare. Returns what happened; raises AssertionError where the two differ."""
    choose = random.Random(seed)
    flags = [
        f"--data.url={data_url}",
        f"--train.steps={steps}",
        "--train.log_every=5",
        f"--checkpoint.max_lost_seconds={MAX_LOST_SECONDS}",
    ]
    straight, killed = f"{base_url}/straight", f"{base_url}/killed"
    patience = 600 + 10 * steps  # seconds; a step takes a fraction of one
    begun = {"SEGMENT_STARTED_AT": str(time.time())}
    launching.train(2, *flags, f"--run.url={straight}", patience_seconds=patience, environment=begun)
    soon = 1.5 * next(iter(starts_and_saves(straight)[0].values()))
    happened = {"kills of everything": 0, "kills of one rank": 0, "ended before its kill": 0}
    lives: list[tuple[float, float]] = []  # when each began, how long it lasted
    newest = 0
    while len(lives) < kills:
        ranks, zero = choose.choice([1, 2, 4]), choose.choice([0, 1])
        begun = time.time()
        life = Life(ranks, [*flags, f"--run.url={killed}", f"--optimizer.zero={zero}"], begun)
        schedule = BEFORE_LAST_KILL * steps / kills
        behind = newest < schedule * len(lives)
        if behind:
            life.wait(lambda newest=newest: (launching.completed(killed) or [0])[0] > newest, patience)
        # On a machine that is faster now than when `soon` was measured, the run would be over before its kill.
        ahead = schedule * (len(lives) + 1)
        life.wait(
            lambda life=life, ahead=ahead: life.step >= ahead, choose.uniform(0, MAX_LOST_SECONDS if behind else soon)
        )
        workers = [pid for pid in descendants(life.process.pid) if is_rank(pid)]
        if ranks > 1 and workers and choose.random() < 0.3:
            life.kill(choose.choice(workers))
            kind = "kills of one rank"
        else:
            life.kill()
            kind = "kills of everything"
        happened["ended before its kill" if life.finished else kind] += 1
        lives.append((begun, time.time() - begun))
        newest = (launching.completed(killed) or [0])[0]
        print(f"life {len(lives)}: {lives[-1][1]:.1f} s on {ranks} ranks, newest checkpoint {newest}", flush=True)
        if life.finished:
            break
    begun = time.time()
    finish = launching.start(2, *flags, f"--run.url={killed}", environment={"SEGMENT_STARTED_AT": str(begun)})
    code, output = launching.finish(finish, patience)
    assert code == 0, output
    report = compare(killed, straight, steps)
    lives.append((begun, time.time() - begun))
    return happened | {"steps": steps} | measured(killed, report, lives)


class Life:
    """One start of the run. Its log, read as it comes, says how far it is."""

    def __init__(self, ranks: int, flags: list[str], begun: float):
        self.process = launching.start(ranks, *flags, environment={"SEGMENT_STARTED_AT": str(begun)})
        self.step = 0
        self._output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step before it could be killed."""
        return self.process.returncode == 0

    def wait(self, holds: Callable[[], bool], seconds: float) -> None:
        """Until something is true of the run, it is over, or the time is up. Raises AssertionError if it fails."""
        deadline = time.monotonic() + seconds
        while not holds() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.process.poll():
            raise AssertionError(f"ended with {self.process.returncode} before its kill:\n{self._said()}")

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL for everything, or for one rank, whose loss torchrun must notice."""
        if self.process.poll() is not None:
            return
        if rank is None:
            kill_tree(self.process)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
            self.process.wait(launching.PATIENCE_SECONDS)

    def _read(self) -> None:
        for line in self.process.stdout:
            self._output.append(line)
            if found := re.search(r"step (\d+)/", line):
                self.step = int(found[1])

    def _said(self) -> str:
        self._reader.join()
        return "".join(self._output)


def measured(run_url: str, report: dict, lives: list[tuple[float, float]]) -> dict:
    """What the run was made of, from its own books: the figures that a simulation of it needs, and what it kept."""
    starts, saves = starts_and_saves(run_url)
    kept_seconds = next(phase["seconds"] for phase in report["phases"] if phase["name"] == "train_kept")
    steps = kept_steps(report)
    return {
        "max_lost_seconds": MAX_LOST_SECONDS,
        "step_seconds": kept_seconds / steps,
        "blocked_seconds": statistics.mean(mark["blocked_seconds"] for mark in saves),
        "background_seconds": statistics.mean(mark["background_seconds"] for mark in saves),
        "restart_seconds": statistics.mean(starts.values()),
        "checkpoints": len(saves),
        "lives_that_reached_a_step": len(starts),
        "kept_seconds": kept_seconds,
        "up_seconds": sum(seconds for _, seconds in lives),
        "lives": [{"seconds": seconds, "restart_seconds": starts.get(begun)} for begun, seconds in lives],
    }


def starts_and_saves(run_url: str) -> tuple[dict[float, float], list[dict]]:
    """Seconds to the first step of each segment that reached it, by when it began; and the marks of all checkpoints."""
    starts, saves = {}, []
    for number in RunFolder(run_url).segment_numbers():
        folder = RunFolder(run_url).segment(number)
        start = json.loads(storage.read_bytes(folder.start))
        events, _ = journal.read(folder.events)
        for mark in (event for event in events if event["event"] == "mark"):
            if mark["name"] == "first_step":
                starts[start["time"]] = mark["time"] - mark["step_seconds"] - start["time"]
            elif mark["name"] == "checkpoint":
                saves.append(mark)
    return starts, saves


def compare(killed: str, straight: str, steps: int) -> dict:
    """Same bits in the last checkpoint, same numbers per step, and each step kept exactly once in the books.

    Returns the killed run's report.
    """
    assert launching.tensors(killed, steps) == launching.tensors(straight, steps)
    mine, theirs = launching.metrics(killed), launching.metrics(straight)
    assert sorted(mine) == sorted(theirs) == list(range(1, steps + 1))
    for step in mine:
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert mine[step][key] == theirs[step][key], (step, key)
    report = json.loads(
        subprocess.run(
            [sys.executable, "cost_report.py", killed, "--json"],
            cwd=launching.REPOSITORY,
            capture_output=True,
            check=True,
        ).stdout
    )
    kept = kept_steps(report)
    assert kept == steps, f"the books keep {kept} steps of {steps}"
    return report


def kept_steps(report: dict) -> int:
    return sum(segment["steps_kept"] for segment in report["segments"])


def is_rank(pid: int) -> bool:
    try:
        process = Path(f"/proc/{pid}")
        return b"trainer.train" in (process / "cmdline").read_bytes() + (process / "comm").read_bytes()
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for what happened")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder) / "s3") as server:
        os.environ.update(server.environment(), DATA_CACHE_DIR=f"{folder}/cache", AWS_EC2_METADATA_DISABLED="true")
        server.make_bucket("chaos")
        source = corpus.write_parquet(Path(folder) / "source", [corpus.speeches(40)])
        vocabulary = corpus.vocab_bpe()
        corpus.prepare_set(source, "s3://chaos/set", vocabulary)
        happened = chaos("s3://chaos/set", "s3://chaos", arguments.kills, arguments.steps, arguments.seed)
    seconds = time.monotonic() - begun
    short = {name: value for name, value in happened.items() if name != "lives"}
    print(f"bit-identical after {len(happened['lives']) - 1} kills, {seconds:.0f} s: {json.dumps(short, indent=1)}")
    if arguments.out:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
        facts = {"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__, "seconds": seconds}
        arguments.out.write_text(json.dumps(facts | happened, indent=1) + "\n")


if __name__ == "__main__":
    main()
