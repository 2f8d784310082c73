"""The local cache: the same report, from less reading."""

import json
from pathlib import Path

import pytest

from core import storage
from core.run import cache
from core.run.reader import read_run
from costs.report import build
from tests.golden import NOON, GoldenRun, lines, mark, preempted_and_resumed, span

LATER = NOON + 86400


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that were fetched."""
    names: list[str] = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, *most: names.append(uri.rsplit("/", 1)[-1]) or real(uri))
    return names


def test_a_second_report_fetches_nothing_but_the_description(tmp_path: Path, fetched: list[str]):
    run = preempted_and_resumed(tmp_path / "run")
    file = tmp_path / "cache.npz"
    first = build(read_run(run.url, cache_file=file), LATER)
    assert len(fetched) == 7
    fetched.clear()
    second = build(read_run(run.url, cache_file=file), LATER)
    assert fetched == ["run.json"]
    assert second == first == build(read_run(run.url), LATER)


def test_a_live_run_is_followed_by_fetching_only_the_new_objects(tmp_path: Path, fetched: list[str]):
    run = GoldenRun(tmp_path / "run")
    file = tmp_path / "cache.npz"
    run.segment(1, NOON, [mark("restored", step=0), span(NOON, NOON + 30, setup=30.0)], usd_per_hour=36.0)
    read_run(run.url, cache_file=file)
    fetched.clear()
    new = span(NOON + 30, NOON + 50, [[1, 20.0, 0.0]], train=20.0)
    run.write("ledger/segment-000001/events/00000002-00000002.jsonl", lines(new))
    followed = build(read_run(run.url, cache_file=file), NOON + 51)
    assert fetched == ["run.json", "00000002-00000002.jsonl"]
    assert followed == build(read_run(run.url), NOON + 51)
    # The writer put its objects together: nothing new, nothing to fetch.
    events = tmp_path / "run/ledger/segment-000001/events"
    whole = "".join(path.read_text() for path in sorted(events.iterdir()))
    for path in list(events.iterdir()):
        path.unlink()
    run.write("ledger/segment-000001/events/00000000-00000002.jsonl", whole)
    fetched.clear()
    assert build(read_run(run.url, cache_file=file), NOON + 51) == followed
    assert fetched == ["run.json"]


def test_another_run_in_the_same_place_is_read_anew(tmp_path: Path):
    file = tmp_path / "cache.npz"
    run = preempted_and_resumed(tmp_path / "run")
    read_run(run.url, cache_file=file)
    run.segment(1, NOON + 1, [span(NOON + 1, NOON + 11, setup=10.0)], usd_per_hour=36.0)
    (tmp_path / "run/ledger/segment-000001/events/00000000-00000003.jsonl").unlink()
    assert build(read_run(run.url, cache_file=file), LATER).segments[0].usd == 0.10


def test_what_could_not_be_read_is_tried_again(tmp_path: Path):
    file = tmp_path / "cache.npz"
    run = preempted_and_resumed(tmp_path / "run")
    path = tmp_path / "run/ledger/segment-000001/events/00000000-00000003.jsonl"
    good = path.read_text()
    path.write_text(good[: len(good) // 2])
    assert build(read_run(run.url, cache_file=file), LATER).total.usd < 4.92
    path.write_text(good)
    assert build(read_run(run.url, cache_file=file), LATER).total.usd == 4.92


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_a_damaged_cache_is_ignored(tmp_path: Path, content: bytes):
    file = tmp_path / "cache.npz"
    file.write_bytes(content)
    run = preempted_and_resumed(tmp_path / "run")
    assert build(read_run(run.url, cache_file=file), LATER).total.usd == 4.92
    assert cache.load(file).keys() == {1, 2}


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path):
    (tmp_path / "file").write_text("")
    run = preempted_and_resumed(tmp_path / "run")
    assert build(read_run(run.url, cache_file=tmp_path / "file" / "cache.npz"), LATER).total.usd == 4.92


def test_the_same_url_at_another_endpoint_has_another_file():
    here, there = ({"COST_CACHE_DIR": "/c", "AWS_ENDPOINT_URL": url} for url in ("http://a", "http://b"))
    assert cache.path_for("s3://bucket/run", here) != cache.path_for("s3://bucket/run", there)
    assert cache.path_for("s3://bucket/run/", here) == cache.path_for("s3://bucket/run", here)


@pytest.mark.slow
def test_thousands_of_segments_and_a_month_of_metrics_are_the_same_from_the_cache(tmp_path: Path):
    run = GoldenRun(tmp_path / "run")
    for number in range(1, 3001):
        start = NOON + 600 * number
        steps = [[step, 1.0, 0.0] for step in range(10 * number - 9, 10 * number + 1)]
        events = [mark("restored", step=10 * number - 10), span(start, start + 10, steps, train=10.0)]
        run.segment(number, start, events, usd_per_hour=36.0)
        run.metrics(number, [{"kind": "train", "time": start + s[0] % 10, "step": s[0], "loss": 3.0} for s in steps])
    month = 30 * 86400
    start = NOON + 600 * 3001
    lines_of_day = [
        json.dumps(span(start + at, start + at + 3, [[30000 + at // 3 + 1, 3.0, 0.0]], train=3.0))
        for at in range(0, month, 3)
    ]
    run.segment(3001, start, [mark("restored", step=30000)], usd_per_hour=36.0)
    for first in range(0, len(lines_of_day), 2000):
        part = lines_of_day[first : first + 2000]
        name = f"{first + 1:08d}-{first + len(part):08d}.jsonl"
        run.write(f"ledger/segment-003001/events/{name}", "\n".join(part) + "\n")
    file = tmp_path / "cache.npz"
    first = build(read_run(run.url, cache_file=file), LATER + month)
    second = build(read_run(run.url, cache_file=file), LATER + month)
    assert second.total == first.total
    assert first.total.seconds == pytest.approx(30000 + month)


def test_objects_put_together_while_we_read_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "cache.npz"
    run = GoldenRun(tmp_path / "run")
    run.segment(1, NOON, [span(NOON, NOON + 30, setup=30.0)], usd_per_hour=36.0)
    events = tmp_path / "run/ledger/segment-000001/events"
    old = (events / "00000000-00000000.jsonl").read_text()
    real = storage.list_objects

    def list_then_compact(folder: str):
        found = real(folder)
        if (events / "00000000-00000000.jsonl").exists():
            (events / "00000000-00000000.jsonl").unlink()
            more = lines(span(NOON + 30, NOON + 50, train=20.0))
            run.write("ledger/segment-000001/events/00000000-00000001.jsonl", old + more)
        return found

    monkeypatch.setattr(storage, "list_objects", list_then_compact)
    for _ in range(2):
        assert build(read_run(run.url, cache_file=file), NOON + 51).total.seconds == pytest.approx(50)
