"""From the start of a process to its first step: what a preemption costs besides the work that was lost.

    python -m bench.restart --scratch=/tmp/bench [--rounds=3] [--ranks=1] [--setting=FLAG] [--out=FILE]

The trainer itself, as its users start it (torchrun), on this CPU: GPT-2 124M with AdamW's moments (1.49 GB in a real
S3 server on loopback), one sequence per step, an empty shard cache each time. A first life trains two steps and is
asked to leave; every further one restores that and is killed after its first step. The seconds are the ledger's: from
the start of torchrun to the beginning of the first step, by phase; the step itself is not counted. Programs and the
checkpoint come from a warm page cache; a machine that has just booted reads both from its disk and network.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from core import storage
from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.data.shard import shard_bytes
from core.run import journal
from core.run.folder import RunFolder
from demo.processes import kill_tree
from demo.s3_server import S3Server

DATA, RUN = "s3://bench/tokens", "s3://bench/run"
PATIENCE_SECONDS = 300.0


def write_tokens() -> None:
    """A small set of random tokens: what is in them costs nothing here."""
    splits = {}
    for name in ("train", "val"):
        tokens = np.random.default_rng(1).integers(0, 50257, 1 << 20, dtype=np.uint16)
        data = shard_bytes(tokens)
        entry = ShardEntry(f"{name}/00000.bin", len(tokens), len(data), hashlib.sha256(data).hexdigest())
        storage.write_bytes(storage.join(DATA, entry.name), data)
        splits[name] = Split(entry.tokens, 1, (entry,))
    manifest.write(DATA, Manifest(TokenizerInfo("gpt2", 50257, 50256, "none", "0"), {}, {}, splits))


def start(options: argparse.Namespace, cache: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["-m", "trainer.train", "trainer/configs/gpt2-124m.yaml", f"--data.url={DATA}", f"--run.url={RUN}"]
    command += ["--train.device=cpu", f"--batch.tokens_per_step={1024 * options.ranks}", "--batch.micro_batch_size=1"]
    command += ["--train.eval_every=0", "--train.sample_every=0", "--train.log_every=1", *options.setting]
    return subprocess.Popen(
        command,
        env={**os.environ, "DATA_CACHE_DIR": cache, "SEGMENT_STARTED_AT": str(time.time())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def life(options: argparse.Namespace, segment: int, polite: bool) -> dict[str, float]:
    """Start, wait for the first step in the ledger, end it. Seconds by phase up to that step's beginning."""
    with tempfile.TemporaryDirectory() as cache:
        process = start(options, cache)
        deadline = time.monotonic() + PATIENCE_SECONDS
        folder = RunFolder(RUN).segment(segment).events
        while True:
            events = journal.read(folder)[0]
            marks = [event for event in events if event.get("name") == "first_step"]
            spans = [event for event in events if event["event"] == "span"]
            if marks and any(span["steps"] for span in spans):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                kill_tree(process)
                raise RuntimeError(process.stdout.read())
            time.sleep(0.5)
        if polite:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=PATIENCE_SECONDS)
        else:
            kill_tree(process)
    (mark,) = marks
    before = [span for span in spans if span["start"] < mark["time"] - mark["step_seconds"]]
    phases: dict[str, float] = {}
    for span in before:
        for name, seconds in span["phases"].items():
            phases[name] = phases.get(name, 0.0) + seconds
    found = {name: phases.get(name, 0.0) for name in ("setup", "init", "restore")}
    found["process"] = mark["seconds"]
    found["all"] = found["setup"] + mark["seconds"]
    return found


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder, S3Server(Path(folder) / "s3") as server:
        os.environ.update(server.environment())
        server.make_bucket("bench")
        write_tokens()
        fresh = life(options, 1, polite=True)
        runs = [life(options, number + 2, polite=False) for number in range(options.rounds)]
    results = {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "torch": torch.__version__,
        "ranks": options.ranks,
        "rounds": options.rounds,
        "fresh": fresh,
        "median": {key: statistics.median(run[key] for run in runs) for key in runs[0]},
        "largest": {key: max(run[key] for run in runs) for key in runs[0]},
    }
    table = Table("start", *fresh, title=f"seconds to the first step, {options.ranks} ranks, {os.cpu_count()} cores")
    for name in ("fresh", "median", "largest"):
        table.add_row(name, *(f"{seconds:.2f}" for seconds in results[name].values()))
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="existing folder for files, about 6 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--setting", action="append", default=[], help="a further setting of the trainer")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
