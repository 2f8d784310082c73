import dataclasses
import json
import subprocess
import threading
from pathlib import Path

import pytest

from core.errors import RunError
from core.run import journal, ledger, machine
from core.run.folder import RunFolder
from core.run.ledger import Ledger, check_owner, claim_segment
from core.run.machine import Machine
from core.run.segment import Opening, open_segment

START = 1_795_176_000.0


class Clock:
    """Stands in for the time module inside core.run.ledger."""

    def __init__(self) -> None:
        self.wall = START
        self.steady = 50.0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(ledger, "time", fake)
    return fake


def open_ledger(folder: Path, **details: object) -> Ledger:
    return Ledger(RunFolder(str(folder)), Machine(usd_per_hour=36.0), {"torch": "2"}, flush_seconds=3600.0, **details)


def events_of(folder: Path, segment: int = 1) -> list[dict]:
    return journal.read(str(folder / f"ledger/segment-{segment:06d}/events"))[0]


def test_phases_add_up_to_spans_and_spans_to_the_segment(tmp_path: Path, clock: Clock):
    book = open_ledger(tmp_path, started_at=START - 40)
    clock.pass_(5)
    for step in (1, 2):
        with book.phase("data_wait"):
            clock.pass_(1)
        with book.phase("train"):
            clock.pass_(10)
        book.step_done(step)
        book.flush()
    with book.phase("eval"):
        clock.pass_(3)
    assert book.spent_usd() == pytest.approx(0.70)
    assert book.close("finished", step=2)
    events = events_of(tmp_path)
    spans = [event for event in events if event["event"] == "span"]
    assert [sum(span["phases"].values()) for span in spans] == [span["end"] - span["start"] for span in spans]
    assert [before["end"] for before in spans[:-1]] == [after["start"] for after in spans[1:]]
    assert (spans[0]["start"], spans[-1]["end"]) == (START - 40, START + 30)
    assert spans[0]["phases"] == {"setup": 40.0, "init": 5.0, "data_wait": 1.0, "train": 10.0}
    assert [span["steps"] for span in spans] == [[[1, 10.0, 1.0]], [[2, 10.0, 1.0]], []]
    assert events[-1] == {"event": "end", "time": START + 30, "reason": "finished", "step": 2}


def test_a_clock_that_is_set_back_is_recorded_and_changes_no_duration(tmp_path: Path, clock: Clock):
    book = open_ledger(tmp_path)
    clock.pass_(10)
    clock.wall -= 3600
    book.flush()
    clock.pass_(10)
    book.close("finished")
    events = events_of(tmp_path)
    assert sum(event["end"] - event["start"] for event in events if event["event"] == "span") == pytest.approx(20)
    assert [event["seconds"] for event in events if event.get("name") == "clock_jump"] == [-3600]


def test_the_start_says_what_the_segment_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky-managed-2026_gpt2_7-0")
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", '{"cluster_name": "gpt2-7", "cloud": "aws"}')
    monkeypatch.setenv("RUN_TAGS", "paper, ablation ,")
    open_ledger(tmp_path).close("finished")
    start = json.loads((tmp_path / "ledger/segment-000001/start.jsonl").read_text())
    assert (start["event"], start["version"], start["segment"]) == ("start", 1, 1)
    assert start["machine"] == dataclasses.asdict(Machine(usd_per_hour=36.0))
    assert start["launcher"] == {"task_id": "sky-managed-2026_gpt2_7-0", "cluster": "gpt2-7"}
    assert start["tags"] == ["paper", "ablation"]


def test_a_cluster_description_that_is_no_json_is_left_out():
    assert machine.launcher_facts({"SKYPILOT_CLUSTER_INFO": "{", "SKYPILOT_TASK_ID": "t"}) == {"task_id": "t"}
    assert machine.launcher_facts({"SKYPILOT_CLUSTER_INFO": "[]"}) == {}


def test_machines_that_start_at_once_get_different_numbers(tmp_path: Path):
    got: list[int] = []
    threads = [
        threading.Thread(target=lambda: got.append(claim_segment(RunFolder(str(tmp_path)), {}))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(1, 9))


def test_a_machine_that_was_given_up_stops_writing(tmp_path: Path):
    first = claim_segment(RunFolder(str(tmp_path)), {})
    check_owner(RunFolder(str(tmp_path)), first)
    claim_segment(RunFolder(str(tmp_path)), {})
    with pytest.raises(RunError, match="segment 2 has taken over this run, so segment 1 stops"):
        check_owner(RunFolder(str(tmp_path)), first)


def test_without_a_price_nothing_is_claimed_to_be_spent(tmp_path: Path):
    book = Ledger(RunFolder(str(tmp_path)), Machine(), {}, flush_seconds=3600.0)
    assert book.spent_usd() is None
    book.close("finished")


def test_a_key_in_an_error_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIexample")
    with (
        pytest.raises(ValueError, match="denied"),
        open_segment(RunFolder(str(tmp_path)), Opening(stage="evaluate", config={})),
    ):
        raise ValueError("denied for wJalrXUtnFEMIexample")
    stored = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert "denied for" in stored
    assert "wJalrXUtnFEMIexample" not in stored


def test_the_commit_is_the_checkouts_own_and_not_that_of_a_repository_around_it(tmp_path: Path, monkeypatch):
    """The project's files may be copied into another repository."""

    def git(folder: Path, *arguments: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(folder), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    inner = tmp_path / "outer/inner"
    inner.mkdir(parents=True)
    assert machine.checkout_revision(inner) == ""
    git(tmp_path / "outer", "init")
    git(tmp_path / "outer", "commit", "--allow-empty", "-m", "theirs")
    assert machine.checkout_revision(inner) == ""
    git(inner, "init")
    (inner / "ours.py").write_text("")
    git(inner, "add", ".")
    git(inner, "commit", "-m", "ours")
    commit = git(inner, "rev-parse", "HEAD")
    assert machine.checkout_revision(inner) == commit
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as where a container mounts the checkout
    assert machine.checkout_revision(inner) == commit
    (inner / "ours.py").write_text("changed")
    assert machine.checkout_revision(inner) == f"{commit}+"
