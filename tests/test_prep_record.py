"""What a preparation costs: its ledger, as the cost report reads it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import storage
from core.run.reader import read_run
from costs.report import CostReport, build
from tests import patched, warm
from tests.corpus import documents, speeches, write_parquet
from tests.patience import PATIENCE_SECONDS


def start(source: str, url: str, vocab: Path, run_url: str, *flags: str, **variables: str) -> subprocess.Popen:
    settings = (f"--source.url={source}", f"--data.url={url}", f"--tokenizer.vocab_url={vocab}", "--workers=2")
    environment = os.environ | {"RUN_URL": run_url, "USD_PER_HOUR": "3.6", "CLOUD": "aws"} | variables
    command = [sys.executable, *patched.module_of("data_prep.prepare", patched.PROMPT), *settings, *flags]
    return warm.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def report_of(run_url: str) -> CostReport:
    return build(read_run(run_url), time.time())


def test_prep_stands_in_the_report_by_stage(tmp_path: Path, vocab_bpe: Path):
    source = write_parquet(tmp_path / "source", [speeches(40)])
    run = str(tmp_path / "run")
    done = start(source, f"{tmp_path}/set", vocab_bpe, run)
    errors = done.communicate()[1]
    assert done.returncode == 0, errors
    report = report_of(run)
    assert report.stage == "prep"
    assert report.state == "finished"
    assert [line.name for line in report.by["stage"]] == ["prep"]
    seconds = {line.name: line.seconds for line in report.phases}
    assert min(seconds["init"], seconds["prep"], seconds["finalize"]) > 0
    assert sum(seconds.values()) == pytest.approx(report.total.seconds)
    assert report.segments[0].usd_per_hour == 3.6


def test_every_node_books_its_own_segment_at_its_share_of_the_price(tmp_path: Path, vocab_bpe: Path):
    source = write_parquet(tmp_path / "source", [documents(100), documents(200)[100:]])
    run = str(tmp_path / "run")
    nodes = [
        start(source, f"{tmp_path}/set", vocab_bpe, run, SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK=str(rank))
        for rank in (0, 1)
    ]
    for node in nodes:
        errors = node.communicate()[1]
        assert node.returncode == 0, errors
    report = report_of(run)
    assert [(line.usd_per_hour, line.end) for line in report.segments] == [(1.8, "finished")] * 2
    assert report.total.usd == pytest.approx(report.total.seconds * 1.8 / 3600, abs=10.0**-report.places)


def test_an_error_is_booked_as_one(tmp_path: Path, vocab_bpe: Path):
    done = start(f"{tmp_path}/none/*.parquet", f"{tmp_path}/set", vocab_bpe, f"{tmp_path}/run")
    assert "no file matches" in done.communicate()[1]
    assert done.returncode == 1
    assert report_of(f"{tmp_path}/run").state == "failed"


def test_a_killed_prep_leaves_a_readable_ledger(tmp_path: Path, vocab_bpe: Path):
    source = write_parquet(tmp_path / "source", [speeches(240)] * 2)
    run = str(tmp_path / "run")
    # Slow enough to be there still when the events of its work are stored.
    slow = ("--tokenizer.engine=tiktoken", "--workers=1")
    process = start(source, f"{tmp_path}/set", vocab_bpe, run, *slow)
    deadline = time.monotonic() + PATIENCE_SECONDS

    def phases_if_killed() -> set[str]:
        return {line.name for line in build(read_run(run), time.time() + 3600).phases if line.seconds}

    while not storage.list_objects(f"{run}/ledger/segment-000001/events") or not phases_if_killed() >= {"init", "prep"}:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert build(read_run(run), time.time() + 3600).state == "killed (end: last heartbeat)"
    assert phases_if_killed() >= {"init", "prep"}
