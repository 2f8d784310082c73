import json
import threading
from pathlib import Path

import pytest

from core import storage
from core.errors import StorageError
from core.run import journal
from core.run.journal import Journal
from tests.patience import PATIENCE_SECONDS

NEVER = 3600.0  # no background flush: the test decides


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_events_come_back_in_order_and_numbers_that_are_not_finite_as_null(tmp_path: Path):
    writer = Journal(str(tmp_path), NEVER)
    for number in range(3):
        writer.add({"n": number, "loss": [float("nan"), {"x": float("inf")}]})
    assert writer.close()
    events, problems = journal.read(str(tmp_path))
    assert [event["n"] for event in events] == [0, 1, 2]
    assert events[0]["loss"] == [None, {"x": None}]
    assert problems == []


def test_killed_without_close_it_loses_only_what_was_not_flushed(tmp_path: Path):
    writer = Journal(str(tmp_path), NEVER)
    writer.add({"n": 0})
    assert writer.flush()
    writer.add({"n": 1})
    assert [event["n"] for event in journal.read(str(tmp_path))[0]] == [0]
    writer.close()


def test_it_flushes_by_itself_with_a_fresh_heartbeat(tmp_path: Path):
    beaten = threading.Event()

    def beat() -> None:
        if not beaten.is_set():
            beaten.set()
            writer.add({"beat": True})

    writer = Journal(str(tmp_path), 0.01, beat)
    assert beaten.wait(5)
    writer.close()
    assert journal.read(str(tmp_path))[0] == [{"beat": True}]


def test_small_objects_become_one_and_nothing_is_read_twice(tmp_path: Path):
    writer = Journal(str(tmp_path), NEVER)
    for number in range(5):
        writer.add({"n": number})
        writer.flush()
    small = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(small) == 5
    writer.close()
    assert stored(tmp_path) == ["00000000-00000004.jsonl"]
    # Killed between the two halves of putting together: both forms are there.
    for name, content in list(small.items())[:3]:
        (tmp_path / name).write_bytes(content)
    assert [event["n"] for event in journal.read(str(tmp_path))[0]] == [0, 1, 2, 3, 4]


def test_a_store_that_is_away_delays_events_but_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(*_, **__):
        raise StorageError("s3://bucket: no answer")

    writer = Journal(str(tmp_path), NEVER)
    with monkeypatch.context() as outage:
        outage.setattr(storage, "write_bytes", away)
        writer.add({"n": 0})
        assert not writer.flush()
        writer.add({"n": 1})
    assert writer.close()
    assert [event["n"] for event in journal.read(str(tmp_path))[0]] == [0, 1]


def test_a_reader_can_ask_for_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for first in (0, 2, 4):
        lines = [json.dumps({"n": first}), json.dumps({"n": first + 1})]
        (tmp_path / f"{first:08d}-{first + 1:08d}.jsonl").write_text("\n".join(lines) + "\n")
    fetched = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, *most: fetched.append(uri) or real(uri))
    events, _ = journal.read(str(tmp_path), after=2)
    assert [event["n"] for event in events] == [3, 4, 5]
    assert len(fetched) == 2


def test_objects_put_together_while_we_read_are_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = Journal(str(tmp_path), NEVER)
    for number in range(3):
        writer.add({"n": number})
        writer.flush()
    real = storage.list_objects

    def list_then_compact(folder: str):
        found = real(folder)
        writer.close()
        return found

    monkeypatch.setattr(storage, "list_objects", list_then_compact)
    events, problems = journal.read(str(tmp_path))
    assert [event["n"] for event in events] == [0, 1, 2]
    assert problems == []


def test_a_damaged_line_is_named_and_costs_only_itself(tmp_path: Path):
    (tmp_path / "00000000-00000002.jsonl").write_text('{"n":0}\n{"n":\n{"n":2}\n')
    (tmp_path / "00000003-00000003.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.txt").write_text("not ours")
    events, problems = journal.read(str(tmp_path))
    assert events == [{"n": 0}, {"n": 2}]
    assert [problem.rsplit("/", 1)[-1].split(":")[0] for problem in problems] == [
        "00000000-00000002.jsonl",
        "00000003-00000003.jsonl",
    ]
    assert "line 2 skipped" in problems[0]


def test_a_flood_is_stored_early_and_leaves_no_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Small objects are put together; those that are large already are not, and what follows keeps its numbers."""
    monkeypatch.setattr(journal, "FLUSH_BYTES", 1000)
    monkeypatch.setattr(journal, "CHUNK_BYTES", 1000)
    writer = Journal(str(tmp_path), NEVER)
    for size in (1, 1, 30, 1, 1, 30, 1, 30, 30, 1, 1):
        for _ in range(size):
            writer.add({"text": "x" * 50})
        writer.flush()
        assert writer.waiting_bytes == 0
        assert sum(map(len, writer._chunk_lines)) < 1000
    writer.close()
    lines = [path.read_text().count("\n") for path in sorted(tmp_path.iterdir())]
    assert lines == [2, 30, 2, 30, 1, 30, 30, 2]
    assert len(journal.read(str(tmp_path))[0]) == sum(lines)


def test_a_flood_does_not_wait_for_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stored_bytes = threading.Event()
    real = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda *given: (real(*given), stored_bytes.set()))
    monkeypatch.setattr(journal, "FLUSH_BYTES", 1000)
    writer = Journal(str(tmp_path), NEVER)
    writer.add({"text": "x" * 2000})
    assert stored_bytes.wait(PATIENCE_SECONDS)
    writer.close()
