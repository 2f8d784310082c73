"""The record that a machine is still up after its program: launch/node/alive.py."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.run import paid
from core.run.folder import RunFolder
from launch.node import alive
from tests.patience import PATIENCE_SECONDS
from tests.test_spending import machine_record

SET_UP, NODE = "20261130T120000Z-setup-1", "20261130T120100Z-node-1"


def test_the_record_ends_with_its_machine(tmp_path: Path):
    """The program is killed with its machine, and the cap counts two intervals more."""
    run, began, here = RunFolder(str(tmp_path)), time.time() - 60, socket.gethostname()
    machine_record(run.url, SET_UP, began, began, None, host=here, setup=True)
    machine_record(run.url, NODE, began, began + 9, began + 50, host=here)
    environment = {**os.environ, "RUN_URL": run.url, "SEGMENT_STARTED_AT": str(began)}
    process = subprocess.Popen([sys.executable, "-m", "launch.node.alive"], env=environment)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (alive_at := paid.machines(run)[NODE].alive_at) is None:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert began + 60 <= alive_at <= time.time()
    found = paid.machines(run)
    assert found[SET_UP].alive_at is None
    assert found[NODE].shutdown_seconds == pytest.approx(found[NODE].alive_at - began - 50 + 2 * paid.ALIVE_SECONDS)


@pytest.mark.parametrize("started_at", ["", "1000000000"])
def test_a_machine_without_a_run_or_a_start_is_refused(tmp_path: Path, monkeypatch, started_at):
    monkeypatch.setenv("SEGMENT_STARTED_AT", started_at)
    monkeypatch.setenv("RUN_URL", "" if started_at else str(tmp_path))
    with pytest.raises(ConfigError, match="RUN_URL or SEGMENT_STARTED_AT is not set"):
        alive.main([])


def test_only_a_machine_with_a_record_records_its_life(tmp_path: Path, monkeypatch):
    """The first node's record counts for all nodes of a training."""
    monkeypatch.setenv("RUN_URL", str(tmp_path))
    monkeypatch.setenv("SEGMENT_STARTED_AT", "1000000000")
    assert alive.main([]) == 0
    assert list(tmp_path.iterdir()) == []
