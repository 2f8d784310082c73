"""A hard cap under kills: what machines really cost stays below it, and report and forecast say why the run stopped."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import storage
from core.exit_codes import CAPPED
from tests import corpus, launching, sky_tasks

USD_PER_HOUR = 21.957642  # of a p4d.24xlarge by the price snapshot
GENEROUS_USD = 100.0
KILLED_FIRST = 4
SHUTDOWN_SECONDS = 10
MACHINE = {"CLOUD": "aws", "REGION": "us-east-1", "INSTANCE_TYPE": "p4d.24xlarge", "USE_SPOT": "true"}
STEPS = 1_000_000


def life(run_url: str, data_url: str, max_usd: float, seconds: float, code_file: Path, begins="ledger") -> float:
    """A machine that is taken away so many seconds after it has opened its books (or has first written to another
    folder of the run). Returns how long it was paid."""
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", f"--train.steps={STEPS}", "--train.log_every=50"]
    flags += ["--checkpoint.max_lost_seconds=2", f"--run.shutdown_reserve_seconds={SHUTDOWN_SECONDS}"]
    folder = storage.join(run_url, begins)
    before = storage.list_names(folder)
    began = time.time()
    environment = MACHINE | {
        "USD_PER_HOUR": str(USD_PER_HOUR),
        "MAX_USD": str(max_usd),
        "SEGMENT_STARTED_AT": str(began),
        "EXIT_CODE_FILE": str(code_file),
    }
    process = launching.start(2, *flags, environment=environment)
    while process.poll() is None and storage.list_names(folder) == before:
        time.sleep(0.2)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        launching.kill(process)
    return time.time() - began


def usd(paid: list[float]) -> float:
    return sum(paid) / 3600 * USD_PER_HOUR


@pytest.mark.slow
def test_many_machines_together_never_cost_more_than_the_cap(s3, tmp_path, vocab_bpe):
    s3.make_bucket("cap")
    data_url, run_url, code_file = "s3://cap/set", "s3://cap/run", tmp_path / "code"
    corpus.prepare_set(corpus.write_parquet(tmp_path / "source", [corpus.speeches(16)]), data_url, vocab_bpe)
    choose = random.Random(7)
    paid = []
    max_usd = GENEROUS_USD
    while not code_file.exists():
        # Every other machine gets so far as to train.
        begins = "metrics" if len(paid) % 2 else "ledger"
        paid.append(life(run_url, data_url, max_usd, choose.uniform(2.0, 12.0), code_file, begins))
        if len(paid) == KILLED_FIRST:  # however fast this computer is, the cap is two or three machines away
            max_usd = 1.6 * usd(paid)
        assert usd(paid) <= max_usd, paid
    assert int(code_file.read_text()) == CAPPED
    assert len(paid) > KILLED_FIRST
    # Started once more, as by somebody who did not read why it ended, it spends what it takes to find out.
    code_file.unlink()
    paid.append(life(run_url, data_url, max_usd, 600.0, code_file))
    assert int(code_file.read_text()) == CAPPED

    report = run("cost_report.py", run_url, "--offline", "--json")
    assert report["state"] == "stopped by its cap"
    assert report["total"]["usd"] <= usd(paid)
    assert sum("stopped at the cap of" in note for note in report["notes"]) == 2
    program = f"torchrun -m trainer.train {' '.join(launching.TINY)} --train.steps={STEPS}"
    task = sky_tasks.write(tmp_path, "{infra: aws/us-east-1, accelerators: 'A100:8'}", program)
    expected = run("cost_report.py", "estimate", task, "--offline", "--json", "--like", run_url, "--cap", str(max_usd))
    assert expected["offers"][0]["kind"] == "measured"
    assert any(f"above the cap of ${max_usd:.2f}" in note for note in expected["notes"])
    print(
        f"{len(paid)} machines, cap ${max_usd:.3f}, paid ${usd(paid[:-1]):.3f} and ${usd(paid[-1:]):.3f} to find out,"
    )
    print(f"report ${report['total']['usd']:.3f}")


def run(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=launching.REPOSITORY, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
