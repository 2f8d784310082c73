import dataclasses
import json
import time
from pathlib import Path

import pytest

from core import storage
from core.run import paid
from core.run.cap import Bounds, OthersWatch, SpendingCap, newest_saving_segment, restarts_too_dear
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import Detail, Spent, read_run, spent_usd_at_most
from core.settings import loader
from core.settings.spot import too_few_checkpoints
from core.settings.training import PretrainConfig
from launch.spent import spent_line
from tests.golden import NOON, GoldenRun, mark, preempted_and_resumed, span
from tests.patience import PATIENCE_SECONDS

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


# --- machines without a segment, other stages, other trainers ---------------------------------------------------


def machine_record(
    run: str, name: str, started_at: float, seen_at: float, ended_at: float | None = None, **more
) -> None:
    document = {"started_at": started_at, "time": seen_at, "usd_per_hour": 36.0, "host": "a", **more}
    storage.write_bytes(f"{run}/machines/{name}/start.json", json.dumps(document).encode())
    if ended_at is not None:
        storage.write_bytes(f"{run}/machines/{name}/end.json", json.dumps({"time": ended_at}).encode())


def test_a_refused_node_counts_from_the_time_that_it_was_paid_for(tmp_path: Path):
    machine_record(str(tmp_path), "refused", NOON - 3600, NOON - 20, NOON)
    assert spent_usd_at_most(str(tmp_path)) == pytest.approx(36.0)
    machine_record(str(tmp_path), "killed", NOON - 60, NOON)  # long ago, and nothing says when it ended
    assert spent_usd_at_most(str(tmp_path)) == pytest.approx(36.0 + 0.01 * (60 + paid.STARTING_SECONDS))
    machine_record(str(tmp_path), "starting", time.time() - 100, time.time())
    assert spent_usd_at_most(str(tmp_path)) == pytest.approx(36.0 + 0.01 * (60 + paid.STARTING_SECONDS + 100), abs=0.5)


def test_a_machine_with_a_segment_counts_once(tmp_path: Path):
    run, began = str(tmp_path), float(int(time.time()) - 60)
    for folder, host in ((RunFolder(run), "a"), (RunFolder(RunFolder(run).evaluations), "b")):
        machine_record(run, host, began, began + 9, began + 60, host=host)
        Ledger(folder, Machine(usd_per_hour=36.0, host=host), {}, started_at=began).close("finished")
    assert spent_usd_at_most(run) == pytest.approx(2 * 0.60, abs=0.1), "the evaluation is one of the run's stages"
    machine_record(run, "c", began, began + 9, began + 60, host="c")
    assert spent_usd_at_most(run) == pytest.approx(3 * 0.60, abs=0.1)
    assert spent_usd_at_most(run, here=("c", began)) == pytest.approx(2 * 0.60, abs=0.1), "its segment is to come"
    assert spent_usd_at_most(run, without=1) == pytest.approx(2 * 0.60, abs=0.1)


def test_a_machine_at_an_unknown_price_makes_the_sum_unknown(tmp_path: Path):
    machine_record(str(tmp_path), "refused", NOON - 3600, NOON - 20, NOON, usd_per_hour=None)
    assert spent_usd_at_most(str(tmp_path)) is None


def test_the_cap_hears_of_another_trainer_of_the_same_run(tmp_path: Path):
    """Both opened the run when nothing was spent; each one's machine costs 36 dollars an hour."""
    run = str(tmp_path)
    mine = Ledger(RunFolder(run), Machine(usd_per_hour=36.0, host="a"), {})
    cap = SpendingCap(mine, Bounds(5.0), 60, Spent(0.0, 0.0))
    assert not cap.reached(0.0, 0.0)
    Ledger(RunFolder(run), Machine(usd_per_hour=36.0, host="b"), {}, started_at=time.time() - 450).close("preempted")
    watch = OthersWatch(cap, run, mine.segment, seconds=0.01)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not cap.reached(0.0, 0.0):
        assert time.monotonic() < deadline, "the cap has not heard"
        time.sleep(0.01)
    watch.close()
    cap.others_have_spent(Spent(None, 0.0))
    cap.others_have_spent(Spent(0.0, 0.0))
    assert cap.spent_usd() > 4.4, "less or nothing known frees no money"
    mine.close("cap")


# --- restarts --------------------------------------------------------------------------------------------------


def test_restarts_without_a_newer_checkpoint_are_bounded(tmp_path: Path):
    """Three machines of a dollar each; the first stores a checkpoint, the others only restart."""
    folder, began = RunFolder(str(tmp_path)), time.time()
    assert restarts_too_dear(folder, 1.5) == ""
    for number in (1, 2, 3):
        started_at = began - 100 * (4 - number)
        book = Ledger(folder, Machine(usd_per_hour=36.0, host=str(number)), {}, started_at=started_at)
        monotonic = book._monotonic_origin
        book._monotonic_origin = monotonic + 100 * (3 - number)  # each lives for 100 seconds
        book.close("failed")
        if number == 1:
            place = f"{folder.checkpoint(10)}"
            storage.write_bytes(f"{place}/manifest-segment-000001.json", b"{}")
            assert newest_saving_segment(folder) == 0, "it is not complete"
            storage.write_bytes(f"{place}/COMPLETE", b"{}")
    assert newest_saving_segment(folder) == 1
    assert restarts_too_dear(folder, 2.5) == ""
    said = restarts_too_dear(folder, 1.5)
    assert said == "restarts have cost $2.00 since segment 1 stored the newest checkpoint, and MAX_RESTART_USD is $1.5"
    assert restarts_too_dear(folder, 1.5, without=3) == "", "the machine that asks is no restart yet"
    assert restarts_too_dear(folder, 0.0) == ""
    # A node that was refused has no segment, but its time is paid too.
    machine_record(str(tmp_path), "refused", began - 60, began - 50, began)
    assert "$2.60" in restarts_too_dear(folder, 2.5)


def test_spot_without_a_checkpoint_is_refused_with_the_arithmetic():
    config = loader.load(PretrainConfig, ["--run.url=run", "--data.url=data", "--train.steps=1000"], {})
    assert too_few_checkpoints(config) == "", "by time, the default"

    def said(**checkpoint) -> str:
        changed = dataclasses.replace(config.checkpoint, **checkpoint)
        return too_few_checkpoints(dataclasses.replace(config, checkpoint=changed), hours=48.5)

    assert said(every_steps=100) == ""
    rare = said(every_steps=1000, expected_hours_between_failures=20.0)
    assert "checkpoint.every_steps is 1,000 and train.steps is 1,000" in rare
    # 20 (e^2.425 - 1) = 20 x 10.3023 hours
    assert "48.5 h of training take 20 x (e^(48.5/20) - 1) = 206 paid hours" in rare
