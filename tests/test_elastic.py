"""The trainer where machines come and go: other world sizes, other sharding, two nodes, clocks and disks that fail.

Real torchrun processes, a real S3 server; every run must end as one that nothing disturbed.
"""

import itertools
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest

from core.run import journal
from core.run.folder import RunFolder
from demo.processes import descendants
from tests import corpus, launching
from tests.chaos import compare, is_rank
from tests.faulty_proxy import FaultyProxy

pytestmark = pytest.mark.slow

STEPS = 60


@pytest.fixture(scope="module")
def data_url(s3, tmp_path_factory, vocab_bpe) -> str:
    s3.make_bucket("elastic")
    source = corpus.write_parquet(tmp_path_factory.mktemp("source"), [corpus.speeches(16)])
    corpus.prepare_set(source, "s3://elastic/set", vocab_bpe)
    return "s3://elastic/set"


@pytest.fixture(scope="module")
def straight(data_url: str) -> str:
    """A run on one rank that nothing interrupted."""
    run_url = data_url.replace("/set", "/straight")
    launching.train(1, *flags(data_url, run_url))
    return run_url


def flags(data_url: str, run_url: str, *more: str) -> list[str]:
    return [
        f"--data.url={data_url}",
        f"--run.url={run_url}",
        f"--train.steps={STEPS}",
        "--checkpoint.every_steps=3",
        *more,
    ]


def reached(run_url: str) -> int:
    return max(launching.metrics(run_url), default=0)


def spans_of(run_url: str, segment: int) -> tuple[list[dict], list[dict]]:
    """A segment's spans and marks; spans must be gapless, and their phases add up to them."""
    folder = RunFolder(run_url).segment(segment).events
    events, problems = journal.read(folder)
    assert not problems
    spans = [event for event in events if event["event"] == "span"]
    assert all(before["end"] == after["start"] for before, after in itertools.pairwise(spans))
    for span in spans:
        assert span["end"] > span["start"]
        assert min(span["phases"].values()) >= 0
        assert sum(span["phases"].values()) == pytest.approx(span["end"] - span["start"], abs=1e-6)
    return spans, [event for event in events if event["event"] == "mark"]


def test_any_number_of_ranks_sharded_or_not_in_turn(data_url: str, straight: str):
    """1, 2, 4, 2 and 1 ranks, the optimizer's state sharded in every second life: the bits of one undisturbed rank."""
    run_url = straight.replace("straight", "elastic")
    ways = list(zip((1, 2, 4, 2, 1), (1, 0, 1, 1, 0), strict=True))
    for life, (ranks, zero) in enumerate(ways):
        process = launching.start(ranks, *flags(data_url, run_url, f"--optimizer.zero={zero}"))
        if life == len(ways) - 1:
            code, output = launching.finish(process)
            assert code == 0, output
            break
        goal = STEPS * (life + 1) // len(ways)
        launching.wait_until(lambda goal=goal: reached(run_url) >= goal, process)
        process.send_signal(signal.SIGTERM)
        code, output = launching.finish(process)
        assert code != 0
        assert reached(run_url) < STEPS, f"this life was to leave before the end:\n{output}"
        last = launching.completed(run_url)[0]
        assert len(launching.manifest(run_url, last).files) == ranks
    compare(run_url, straight, STEPS)


def test_a_lost_worker_of_two_nodes_is_restarted_by_torchrun(data_url: str, straight: str, tmp_path):
    """Two agents on loopback; one loses its worker to SIGKILL, both start theirs again, from the checkpoint."""
    run_url = straight.replace("straight", "nodes")
    port = free_port()
    together = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic", "--max-restarts=3"]
    nodes = [
        launching.start(
            1, *flags(data_url, run_url), environment={"DATA_CACHE_DIR": str(tmp_path / str(node))}, torchrun=together
        )
        for node in range(2)
    ]
    # Their output is collected while they run: a full pipe would hold them.
    outputs: dict[int, str] = {}
    readers = [
        threading.Thread(target=lambda node=node: outputs.update({node: nodes[node].stdout.read()})) for node in (0, 1)
    ]
    for reader in readers:
        reader.start()
    try:
        deadline = time.monotonic() + launching.PATIENCE_SECONDS
        while not (launching.completed(run_url) or [0])[0] >= 9:
            assert time.monotonic() < deadline
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.05)
        victim = next(pid for pid in descendants(nodes[1].pid) if is_rank(pid))
        os.kill(victim, signal.SIGKILL)
        for node in nodes:
            node.wait(launching.PATIENCE_SECONDS)
    finally:
        for node in nodes:
            if node.poll() is None:
                launching.kill_tree(node)
        for reader in readers:
            reader.join()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "resumed from step" in outputs[0] + outputs[1]
    assert len(RunFolder(run_url).segment_numbers()) == 2
    compare(run_url, straight, STEPS)


def test_a_storage_that_hangs_for_ten_seconds_is_waited_out(s3, data_url: str, straight: str, tmp_path):
    run_url = straight.replace("straight", "hangs")
    with FaultyProxy(s3.endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.url, "DATA_CACHE_DIR": str(tmp_path / "cache")}
        process = launching.start(2, *flags(data_url, run_url), environment=environment)
        launching.wait_until(lambda: (launching.completed(run_url) or [0])[0] >= 6, process)
        proxy.stall(10.0)
        code, output = launching.finish(process)
    assert code == 0, output
    compare(run_url, straight, STEPS)
    spans_of(run_url, 1)


def test_listings_that_are_seconds_old_cost_steps_and_nothing_else(s3, data_url: str, straight: str, tmp_path):
    """A successor may not see the newest checkpoint, sees deleted ones, and meets its predecessor's segment number."""
    run_url = straight.replace("straight", "stale")
    with FaultyProxy(s3.endpoint, listing_lag_seconds=4.0) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.url, "DATA_CACHE_DIR": str(tmp_path / "cache")}
        for goal in (12, 30):
            process = launching.start(2, *flags(data_url, run_url), environment=environment)
            launching.wait_until(lambda goal=goal: (launching.completed(run_url) or [0])[0] >= goal, process)
            launching.kill(process)
        code, output = launching.finish(launching.start(1, *flags(data_url, run_url), environment=environment))
        assert code == 0, output
        assert proxy.injected["omitted"] > 0
        assert proxy.injected["shown though deleted"] > 0, proxy.injected
    assert len(RunFolder(run_url).segment_numbers()) == 3
    compare(run_url, straight, STEPS)


JUMPING = '''
"""The trainer with a wall clock that is set by whoever writes seconds into the file CLOCK."""
import os, runpy, time
from pathlib import Path

clock, real = Path(os.environ["CLOCK"]), time.time
time.time = lambda: real() + float(clock.read_text())
runpy.run_module("trainer.train", run_name="__main__", alter_sys=True)
'''


def test_a_clock_that_is_set_back_and_forth_changes_no_duration(data_url: str, straight: str, tmp_path):
    run_url = straight.replace("straight", "clock")
    clock = tmp_path / "clock"
    clock.write_text("0")
    (tmp_path / "jumping.py").write_text(JUMPING)

    def set_clock(seconds: float) -> None:
        (tmp_path / "next").write_text(f"{seconds}")
        (tmp_path / "next").replace(clock)

    environment = {"CLOCK": str(clock), "PYTHONPATH": f"{tmp_path}{os.pathsep}{launching.REPOSITORY}"}
    began = time.time()
    process = launching.start(
        2, *flags(data_url, run_url, "--checkpoint.every_steps=2"), environment=environment, module="jumping"
    )
    for goal, seconds in ((6, -86400.0), (20, 86400.0), (34, 0.0)):
        launching.wait_until(lambda goal=goal: (launching.completed(run_url) or [0])[0] >= goal, process)
        set_clock(seconds)
    code, output = launching.finish(process)
    lasted = time.time() - began
    assert code == 0, output
    compare(run_url, straight, STEPS)
    spans, marks = spans_of(run_url, 1)
    jumps = [mark["seconds"] for mark in marks if mark["name"] == "clock_jump"]
    assert jumps, "the books are to say that the clock was set"
    assert sum(jumps) == pytest.approx(0.0, abs=10.0), "back at the right time in the end"
    assert all(abs(jump) > 80_000 for jump in jumps)
    assert 0 < spans[-1]["end"] - spans[0]["start"] < lasted + 5.0
    times = [record["time"] for _, record in sorted(launching.metrics(run_url).items())]
    assert times == sorted(times)


def test_a_full_disk_for_the_shards_slows_down_and_does_not_stop(data_url: str, straight: str, tmp_path):
    """The cache is a file system of its own that holds two shards, though the settings allow for all of them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = f'mount -t tmpfs -o size=24k none {cache} && exec "$@"'
    within = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let its users mount a small file system")
    run_url = straight.replace("straight", "full-disk")
    process = launching.start(2, *flags(data_url, run_url), environment={"DATA_CACHE_DIR": str(cache)}, within=within)
    code, output = launching.finish(process)
    assert code == 0, output
    assert "the disk is full" in output
    compare(run_url, straight, STEPS)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
