import time
from pathlib import Path

import pytest

from core.ledger import Ledger, Machine
from core.spending import spent_before
from tests.golden import NOON, RunFolder, mark, preempted_and_resumed, span

# The first machine of the golden run was killed, at a cent a second: it may have lived for one interval more.
KILLED = 3.72 + 0.03


def test_a_killed_machine_is_counted_for_as_long_as_it_may_have_lived(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    assert spent_before(run.url, 1) == 0
    assert spent_before(run.url, 2) == pytest.approx(KILLED)
    assert spent_before(run.url, 3) == pytest.approx(KILLED + 1.20)


def test_it_agrees_with_what_the_writer_says(tmp_path: Path):
    book = Ledger(str(tmp_path), Machine(usd_per_hour=3600.0), {}, started_at=time.time() - 60)
    book.close("finished")
    assert spent_before(str(tmp_path), 2) == pytest.approx(book.spent_usd(), abs=0.5)


def test_an_object_without_a_span_does_not_hide_the_one_before(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.write("ledger/segment-000001/events/00000004-00000004.jsonl", '{"event":"mark","name":"notice"}\n')
    run.write("ledger/segment-000001/events/00000005-00000005.jsonl", '{"event":"spa')
    assert spent_before(run.url, 2) == pytest.approx(KILLED)


def test_a_machine_without_heartbeat_counts_one_interval(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.segment(1, NOON, [], usd_per_hour=3600.0)
    assert spent_before(run.url, 2) == pytest.approx(3.0)


@pytest.mark.parametrize("price", [None, 0, -1.0, "free", float("inf")])
def test_one_unknown_price_makes_the_sum_unknown(tmp_path: Path, price: object):
    run = preempted_and_resumed(tmp_path)
    run.segment(2, NOON, [mark("restored", step=0), span(NOON, NOON + 9, train=9.0)], usd_per_hour=price)
    assert spent_before(run.url, 2) == pytest.approx(KILLED)
    assert spent_before(run.url, 3) is None


def test_a_newer_or_damaged_ledger_is_unknown_too(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    run.segment(2, NOON, [span(NOON, NOON + 9, train=9.0)], version=2, usd_per_hour=1.0)
    assert spent_before(run.url, 3) is None
    run.write("ledger/segment-000002/start.jsonl", '{"event"')
    assert spent_before(run.url, 3) is None
