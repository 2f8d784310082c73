"""Preparation that is killed (SIGKILL, the whole process group, at random moments) ends up with the same bytes."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from core.data import manifest
from core.run.reader import read_run
from tests import warm
from tests.corpus import prepare_set, speeches, stored, write_parquet
from tests.patience import PATIENCE_SECONDS

# Set to repeat a failure.
SEED = int(os.environ.get("KILL_SEED", "0")) or random.randrange(1, 10**6)
PARTS = ("--data.part_bytes=100000", "--data.shard_tokens=30000", "--data.val_fraction=0.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = speeches(160)
    return write_parquet(tmp_path_factory.mktemp("source"), [texts[::2], texts[1::2]])


@pytest.fixture(scope="module")
def expected(source: str, vocab_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The objects of an uninterrupted run."""
    url = str(tmp_path_factory.mktemp("expected"))
    prepare_set(source, url, vocab_bpe, *PARTS)
    return stored(url)


def start(
    source: str, url: str, vocab: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """A preparation in a process group of its own, slow enough (tiktoken) to be hit in the middle."""
    settings = (f"--source.url={source}", f"--data.url={url}", f"--tokenizer.vocab_url={vocab}", *PARTS)
    command = [sys.executable, "-m", "data_prep.prepare", *settings, "--tokenizer.engine=tiktoken", "--workers=2"]
    environment = {**os.environ, **(environment or {})}
    return warm.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)


def wait_for_work(process: subprocess.Popen) -> None:
    for line in process.stderr:
        if re.match(r"[\d:]+ source: ", line):  # and not the setting of that name
            return
    raise AssertionError("ended before its work began")


def kill_at_random(process: subprocess.Popen, chance: random.Random, longest_seconds: float) -> bool:
    """SIGKILL to the whole group some time after the work began. False if it was done before."""
    wait_for_work(process)
    time.sleep(chance.uniform(0, longest_seconds))
    finished = process.poll() is not None
    os.killpg(process.pid, signal.SIGKILL) if not finished else None
    process.communicate()
    return not finished


def run_to_the_end(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors


def killed_again_and_again(kills: int, source: str, url: str, vocab: Path) -> None:
    chance = random.Random(SEED)
    hits = 0
    while hits < kills and not manifest.exists(url):
        # Short at first, so that the set is not complete before the last kill.
        hits += kill_at_random(start(source, url, vocab), chance, 0.4)
    assert hits >= min(kills, 2), f"seed {SEED}: only {hits} kills before it was done"
    run_to_the_end(start(source, url, vocab))


def test_killed_twice_then_resumed(source: str, expected: dict[str, str], tmp_path: Path, vocab_bpe: Path):
    killed_again_and_again(2, source, str(tmp_path / "set"), vocab_bpe)
    assert stored(str(tmp_path / "set")) == expected, f"seed {SEED}"


def test_asked_to_stop_it_leaves_with_33_and_is_resumed(
    source: str, expected: dict[str, str], tmp_path: Path, vocab_bpe: Path
):
    """As a spot machine that goes away: the ledger says so, and its workers go too."""
    url, run_url, code = str(tmp_path / "set"), str(tmp_path / "run"), tmp_path / "code"
    environment = {"RUN_URL": run_url, "EXIT_CODE_FILE": str(code)}
    process = start(source, url, vocab_bpe, environment=environment)
    wait_for_work(process)
    process.send_signal(signal.SIGTERM)
    process.communicate()  # ends when no worker holds its output any more
    assert process.returncode == 33
    assert code.read_text() == "33\n"
    (segment,) = read_run(run_url).segments
    assert segment.end["reason"] == "preempted"
    run_to_the_end(start(source, url, vocab_bpe))
    assert stored(url) == expected


@pytest.mark.slow
def test_killed_ten_times_then_resumed(source: str, expected: dict[str, str], tmp_path: Path, vocab_bpe: Path):
    chance = random.Random(SEED)
    for number in range(10):
        # Each from the start: a moment anywhere in the work, from its first part to its manifest.
        url = str(tmp_path / f"set{number}")
        kill_at_random(start(source, url, vocab_bpe), chance, 4.0)
        run_to_the_end(start(source, url, vocab_bpe))
        assert stored(url) == expected, f"seed {SEED}, kill {number}"


def test_three_nodes_of_which_one_is_killed_and_restarted(
    source: str, expected: dict[str, str], tmp_path: Path, vocab_bpe: Path
):
    url = str(tmp_path / "set")
    nodes = [start(source, url, vocab_bpe, "--num-nodes=3", f"--node-rank={rank}", "--workers=1") for rank in range(3)]
    wait_for_work(nodes[1])
    time.sleep(0.2)
    os.killpg(nodes[1].pid, signal.SIGKILL)
    nodes[1].communicate()
    for node in (nodes[0], nodes[2]):
        run_to_the_end(node)
    assert not manifest.exists(url)
    run_to_the_end(start(source, url, vocab_bpe, "--num-nodes=3", "--node-rank=1", "--workers=1"))
    assert stored(url) == expected


def test_workers_end_with_their_parent(source: str, tmp_path: Path, vocab_bpe: Path):
    process = start(source, str(tmp_path / "set"), vocab_bpe)
    wait_for_work(process)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(group_of(process.pid)) < 3 and time.monotonic() < deadline:  # parent, server, a worker
        time.sleep(0.05)
    assert len(group_of(process.pid)) >= 3
    process.kill()
    process.communicate()
    while group_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_of(process.pid)


def group_of(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
