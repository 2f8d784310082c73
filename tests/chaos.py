"""One training run under many SIGKILLs, compared bit by bit with a run that nothing interrupted.

    python -m tests.chaos --kills=100            (or: make chaos)

Every life of the run starts on 1, 2 or 4 ranks, with the optimizer's state sharded or not, and is killed at a random
moment after its start: all processes at once (a machine goes away) or a single rank. Then the run is finished, and
its weights, its optimizer state, the metrics of every step and the kept steps of its ledger must be those of the
run that was never touched.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo.processes import descendants
from demo.s3_server import S3Server
from tests import corpus, launching


def chaos(data_url: str, base_url: str, kills: int, steps: int, seed: int, longest_life: float) -> dict:
    """Run both and compare. Returns what happened; raises AssertionError where the two differ."""
    choose = random.Random(seed)
    flags = [
        f"--data.url={data_url}",
        f"--train.steps={steps}",
        "--train.log_every=100",
        "--checkpoint.max_lost_seconds=2",
    ]
    straight, killed = f"{base_url}/straight", f"{base_url}/killed"
    patience = 60 + steps  # seconds; a step takes a fraction of one
    launching.train(2, *flags, f"--run.url={straight}", patience_seconds=patience)
    happened = {"kills of everything": 0, "kills of one rank": 0, "died before its kill": 0, "lives": 0}
    while happened["lives"] < kills:
        ranks, shard = choose.choice([1, 2, 4]), choose.choice(["true", "false"])
        process = launching.start(ranks, *flags, f"--run.url={killed}", f"--optimizer.shard={shard}")
        happened["lives"] += 1
        time.sleep(choose.uniform(0.0, longest_life))
        if process.poll() is not None:
            # Nothing killed it: it must have finished, and what is left of the kills has nothing to hit.
            code, output = launching.finish(process)
            assert code == 0, output
            happened["died before its kill"] += 1
            break
        workers = [pid for pid in descendants(process.pid) if is_rank(pid)]
        if ranks > 1 and workers and choose.random() < 0.3:
            os.kill(choose.choice(workers), signal.SIGKILL)
            code, output = launching.finish(process)
            assert code != 0, output
            happened["kills of one rank"] += 1
        else:
            launching.kill(process)
            happened["kills of everything"] += 1
        newest = (launching.completed(killed) or ["none"])[0]
        print(f"life {happened['lives']}: {ranks} ranks, newest checkpoint {newest}", flush=True)
    launching.train(2, *flags, f"--run.url={killed}", patience_seconds=patience)
    compare(killed, straight, steps)
    return happened | {"steps": steps}


def compare(killed: str, straight: str, steps: int) -> None:
    """Same bits in the last checkpoint, same numbers per step, and each step kept exactly once in the books."""
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


def kept_steps(report: dict) -> int:
    return sum(segment["steps_kept"] for segment in report["segments"])


def is_rank(pid: int) -> bool:
    try:
        return b"trainer.train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest-life", type=float, default=20.0, help="seconds from a start to its kill, at most")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder) / "s3") as server:
        os.environ.update(server.environment(), DATA_CACHE_DIR=f"{folder}/cache", AWS_EC2_METADATA_DISABLED="true")
        server.make_bucket("chaos")
        source = corpus.write_parquet(Path(folder) / "source", [corpus.speeches(40)])
        vocabulary = corpus.vocab_bpe()
        corpus.prepare_set(source, "s3://chaos/set", vocabulary)
        happened = chaos(
            "s3://chaos/set", "s3://chaos", arguments.kills, arguments.steps, arguments.seed, arguments.longest_life
        )
    print(f"bit-identical after {happened}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
