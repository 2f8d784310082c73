import time
from pathlib import Path

import pytest

from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import Detail, read_run, spent_usd_at_most
from launch.spent import spent_line
from tests.golden import NOON, GoldenRun, mark, preempted_and_resumed, span

# The first machine of the golden run was killed, at a cent a second: it may have lived for one interval more.
KILLED = 3.72 + 0.03


def first_usd_at_most(run: GoldenRun) -> float | None:
    return read_run(run.url, Detail.MONEY).segments[0].usd_at_most


def test_a_killed_machine_is_counted_for_as_long_as_it_may_have_lived(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    assert [segment.usd_at_most for segment in read_run(run.url, Detail.MONEY).segments] == pytest.approx(
        [KILLED, 1.20]
    )
    assert spent_usd_at_most(run.url) == pytest.approx(KILLED + 1.20)


def test_a_run_that_has_not_begun_has_cost_nothing(tmp_path: Path):
    assert spent_usd_at_most(str(tmp_path)) == 0.0


def test_a_segment_that_is_being_started_costs_nothing_yet(tmp_path: Path):
    """Another node's claim is a folder before it is an object."""
    (tmp_path / "ledger/segment-000001").mkdir(parents=True)
    assert spent_usd_at_most(str(tmp_path)) == 0.0
    assert spent_line(str(tmp_path)).endswith("no run here yet; check RUN and BUCKET")


def test_it_agrees_with_what_the_writer_says(tmp_path: Path):
    book = Ledger(RunFolder(str(tmp_path)), Machine(usd_per_hour=3600.0), {}, started_at=time.time() - 60)
    book.close("finished")
    assert spent_usd_at_most(str(tmp_path)) == pytest.approx(book.spent_usd(), abs=0.5)


def test_an_object_without_a_span_does_not_hide_the_one_before(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.write("ledger/segment-000001/events/00000004-00000004.jsonl", '{"event":"mark","name":"notice"}\n')
    run.write("ledger/segment-000001/events/00000005-00000005.jsonl", '{"event":"spa')
    assert first_usd_at_most(run) == pytest.approx(KILLED)


def test_a_machine_without_heartbeat_counts_one_interval(tmp_path: Path):
    run = GoldenRun(tmp_path)
    run.segment(1, NOON, [], usd_per_hour=3600.0)
    assert spent_usd_at_most(run.url) == pytest.approx(3.0)


@pytest.mark.parametrize("price", [None, 0, -1.0, "free", float("inf")])
def test_one_unknown_price_makes_the_sum_unknown(tmp_path: Path, price: object):
    run = preempted_and_resumed(tmp_path)
    run.segment(2, NOON, [mark("restored", step=0), span(NOON, NOON + 9, train=9.0)], usd_per_hour=price)
    assert first_usd_at_most(run) == pytest.approx(KILLED)
    assert spent_usd_at_most(run.url) is None


def test_a_newer_or_damaged_ledger_is_unknown_too(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.segment(2, NOON, [span(NOON, NOON + 9, train=9.0)], version=2, usd_per_hour=1.0)
    assert spent_usd_at_most(run.url) is None
    run.write("ledger/segment-000002/start.jsonl", '{"event"')
    assert spent_usd_at_most(run.url) is None
