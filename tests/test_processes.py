"""demo.processes: what descends from a process is found and ended, with few tools."""

import subprocess
import time

import pytest

from demo.processes import descendants, kill_tree
from tests import launching
from tests.patience import PATIENCE_SECONDS


def test_a_tree_is_ended_where_there_is_no_ps(monkeypatch, tmp_path):
    parent = subprocess.Popen(["/bin/sh", "-c", "sleep 1000 & sleep 1000 & wait"])
    try:
        monkeypatch.setenv("PATH", str(tmp_path))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(children := descendants(parent.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        kill_tree(parent)
    while any(map(launching.is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_has_ended_is_left_alone(monkeypatch):
    process = subprocess.Popen(["true"])
    process.wait()
    # Its number may be another process's by now.
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("a signal was sent"))
    kill_tree(process)
