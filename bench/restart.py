"""Measures the time from the start of a process to its first step.

Each preemption costs this time in addition to lost work.

    python -m bench.restart --scratch=/tmp/bench [--rounds=3] [--ranks=1] [--setting=FLAG] [--out=FILE]

torchrun starts the trainer on this CPU: GPT-2 124M with AdamW's moments (1.49 GB on an S3 server on loopback), one
sequence per step, an empty shard cache at each start. The first process trains until its first step is in the ledger
and stops on SIGTERM with a checkpoint. Each further process restores that checkpoint and gets SIGKILL after its first
step.

The seconds by phase come from the ledger. They cover the time from the start of torchrun to the beginning of the first
step. Here, programs and checkpoint are in a warm page cache. A machine that has just booted reads them from disk and
network, which takes longer.
"""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from bench import harness, tokens
from core.run import journal
from core.run.folder import RunFolder
from demo.processes import kill_tree

DATA, RUN = "s3://bench/tokens", "s3://bench/run"
PATIENCE_SECONDS = 300.0
TOKENS = 1 << 20  # per split


def main() -> None:
    parser = harness.options(__doc__, rounds=3)
    parser.add_argument("--scratch", type=Path, required=True, help="existing folder for files, about 6 GB")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--setting", action="append", default=[], help="another setting for the trainer; repeatable")
    options = parser.parse_args()
    with harness.s3_server(options.scratch):
        tokens.write(DATA, {name: [tokens.random_ids(TOKENS, seed=1)] for name in ("train", "val")})
        fresh = first_step(options, 1, signal.SIGTERM)
        sides = {"restored": lambda number: first_step(options, number + 2, signal.SIGKILL)}
        runs = harness.interleaved(sides, options.rounds)["restored"]
    results = {
        **harness.header("torch"),
        "ranks": options.ranks,
        "rounds": options.rounds,
        "fresh": fresh,
        "median": harness.median(runs),
        "largest": {key: max(run[key] for run in runs) for key in runs[0]},
    }
    harness.finish(results, show, options.out)


def first_step(options: argparse.Namespace, segment: int, end: signal.Signals) -> dict[str, float]:
    """Run the trainer until its first step is in the ledger. Returns seconds by phase up to that step."""
    with tempfile.TemporaryDirectory() as cache:
        process = _start(options, cache)
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
                raise SystemExit(f"segment {segment} did not reach its first step:\n{process.stdout.read()}")
            time.sleep(0.5)
        if end == signal.SIGTERM:
            process.send_signal(end)
            process.communicate(timeout=PATIENCE_SECONDS)
        else:
            kill_tree(process)
    (mark,) = marks
    phases: dict[str, float] = {}
    for span in spans:
        if span["start"] < mark["time"] - mark["step_seconds"]:
            for name, seconds in span["phases"].items():
                phases[name] = phases.get(name, 0.0) + seconds
    found = {name: phases.get(name, 0.0) for name in ("setup", "init", "restore")}
    return found | {"process": mark["seconds"], "all": found["setup"] + mark["seconds"]}


def _start(options: argparse.Namespace, cache: str) -> subprocess.Popen:
    command = [*harness.TORCHRUN, f"--nproc-per-node={options.ranks}"]
    command += ["-m", "trainer.train", "trainer/configs/gpt2-124m.yaml", f"--data.url={DATA}", f"--run.url={RUN}"]
    command += ["--train.device=cpu", f"--batch.tokens_per_step={1024 * options.ranks}", "--batch.micro_batch_size=1"]
    command += ["--train.eval_every=0", "--train.sample_tokens=0", "--train.log_every=1", *options.setting]
    return subprocess.Popen(
        command,
        cwd=harness.REPOSITORY,
        env={**os.environ, "DATA_CACHE_DIR": cache, "SEGMENT_STARTED_AT": str(time.time())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=harness.end_with_parent,
    )


def show(results: dict) -> None:
    title = f"seconds to the first step, {results['ranks']} ranks, {results['machine']['cores']} cores"
    rows = [
        [name, *(f"{seconds:.2f}" for seconds in results[name].values())] for name in ("fresh", "median", "largest")
    ]
    harness.print_table(title, ["start", *results["fresh"]], rows)


if __name__ == "__main__":
    main()
