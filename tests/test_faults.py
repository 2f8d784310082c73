"""core.storage behind a store and a network that break requests: every operation comes out right."""

import os
import signal
import subprocess
import sys

import pytest

from core import storage
from core.errors import ObjectExists
from core.stores import faults, retries
from tests import warm
from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.patience import PATIENCE_SECONDS


@pytest.fixture
def flaky(s3, bucket: str, monkeypatch: pytest.MonkeyPatch):
    """The bucket, seen through a proxy that breaks one request in three."""
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(faults, "THROTTLED_SECONDS", 0.01)
    monkeypatch.setattr(retries, "ATTEMPTS", 20)
    monkeypatch.setattr("tests.faulty_proxy.HANG_SECONDS", 0.1)
    with FaultyProxy(s3.endpoint, share=0.33, seed=11) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield bucket, proxy


def test_everything_comes_out_right(flaky, tmp_path):
    bucket, proxy = flaky
    contents = {f"{bucket}/f/{number:02d}": os.urandom(20_000 + number) for number in range(15)}
    for uri, data in contents.items():
        storage.write_bytes(uri, data)
    for uri, data in contents.items():
        assert storage.read_bytes(uri) == data
        assert storage.read_range(uri, 100, 9000) == data[100:9000]
        storage.download(uri, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == data
    assert {info.uri: info.size for info in storage.list_objects(f"{bucket}/f")} == {
        u: len(d) for u, d in contents.items()
    }
    assert set(proxy.injected) == set(FAULTS), "every kind of fault was met"


WAITS = """
import sys
from core import storage
from core.console import run_entry
from core.stores import remote

remote.SILENT_SECONDS = 1_000_000
run_entry(lambda arguments: storage.read_bytes(arguments[0]) and 0)
"""


def test_ctrl_c_ends_a_request_that_hangs(s3, bucket):
    with FaultyProxy(s3.endpoint) as proxy:
        proxy.away = "hang"
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS, f"{bucket}/object"],
            env={**os.environ, "AWS_ENDPOINT_URL": proxy.url},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=warm.default_signals,
        )
        assert proxy.hung.wait(PATIENCE_SECONDS)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert said == "interrupted\n"
    assert process.returncode == 130


FORKS = """
import os, sys
from core import storage

storage.read_bytes(sys.argv[1])
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    storage.read_bytes(sys.argv[1])
except Exception as error:
    print(error)
"""


def test_a_forked_process_is_told_and_does_not_wait_for_ever(s3, bucket):
    storage.write_bytes(f"{bucket}/object", b"x")
    command = [sys.executable, "-c", FORKS, f"{bucket}/object"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout == "storage was used before this process was forked; start it by forkserver or spawn\n"
    assert done.returncode == 0


def test_an_exclusive_write_whose_answer_is_lost_is_ours(flaky, monkeypatch: pytest.MonkeyPatch):
    bucket, proxy = flaky
    monkeypatch.setattr("tests.faulty_proxy.FAULTS", ("answer lost",))
    for number in range(12):
        storage.write_bytes(f"{bucket}/claim/{number}", b"mine %d" % number, exclusive=True)
    assert proxy.injected["answer lost"] > 1
    for number in range(12):
        with pytest.raises(ObjectExists):
            storage.write_bytes(f"{bucket}/claim/{number}", b"theirs", exclusive=True)
        assert storage.read_bytes(f"{bucket}/claim/{number}") == b"mine %d" % number
