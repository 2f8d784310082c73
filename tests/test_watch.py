"""trainer.loop and the checkpoint interval: notices, the dollar cap, when to save. The metadata service in trouble."""

import time

import pytest

from clouds import aws, machine, metadata
from core.errors import ConfigError
from core.run.cap import Bounds, SpendingCap, spent_by_earlier_segments
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import Spent
from core.settings.training import CheckpointConfig
from tests.fake_metadata import metadata_service
from tests.patience import PATIENCE_SECONDS
from trainer.checkpoint.save import Cadence
from trainer.loop.requests import GIVE_UP_AFTER, SpotWatch, StopRequests


def wait_for(holds) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_spot_interruption_asks_to_leave_and_rebalance_to_save():
    with metadata_service() as (service, environment):
        requests = StopRequests()
        watch = SpotWatch(requests, environment, poll_seconds=0.02)
        wait_for(lambda: service.tokens)
        time.sleep(0.1)
        assert requests.stop is None
        assert requests.take_save() is None
        service.items["events/recommendations/rebalance"] = '{"noticeTime": "2026-11-20T08:00:00Z"}'
        found = []
        wait_for(lambda: found.append(requests.take_save()) or found[-1])
        assert found[-1] == "rebalance recommendation of 2026-11-20T08:00:00Z"
        time.sleep(0.1)
        assert requests.take_save() is None, "one notice is one save"
        service.tokens.append("another one: ours has expired")
        service.items["spot/instance-action"] = '{"action": "terminate", "time": "2026-11-20T08:02:00Z"}'
        wait_for(lambda: requests.stop)
        assert (requests.stop.kind, requests.stop.detail) == ("spot", "terminate at 2026-11-20T08:02:00Z")
        watch.close()


def test_elsewhere_without_a_metadata_service_the_watch_ends_quietly(caplog: pytest.LogCaptureFixture):
    requests = StopRequests()
    with metadata_service() as (_, gone):
        pass
    watch = SpotWatch(requests, {**gone, "CLOUD": "unknown-cloud"}, poll_seconds=0.01)
    wait_for(lambda: not watch._thread.is_alive())
    assert requests.stop is None
    assert caplog.text == ""
    assert SpotWatch(requests, {**gone, "CLOUD": "Lambda"})._thread is None, "it gives no notices"
    assert SpotWatch(requests, {"AWS_EC2_METADATA_DISABLED": "true"})._thread is None


TROUBLE = (
    *("503", "500", "302", "403", "cut", "no HTTP", "no text"),
    *("says []", 'says "terminate"', "says {}", "says {", "says null", f"says {'[' * 100_000}"),
)


@pytest.mark.parametrize("cloud", ["aws", "AWS"])
def test_on_aws_the_watch_outlives_whatever_the_service_does(cloud, caplog: pytest.LogCaptureFixture):
    """In answer to a token as well as to a question for a notice, and with nothing listening for a while."""
    with metadata_service() as (service, environment):
        requests = StopRequests()
        service.trouble += [kind for kind in TROUBLE for _ in range(2)] * 2
        watch = SpotWatch(requests, {**environment, "CLOUD": cloud}, poll_seconds=0.01)
        wait_for(lambda: not service.trouble)
        service.items["spot/instance-action"] = '{"action": "terminate", "time": "2026-11-20T08:02:00Z"}'
        wait_for(lambda: requests.stop)
        assert requests.stop.kind == "spot"
        assert "metadata hop limit of 2" in caplog.text
        wait_for(lambda: "answers again" in caplog.text)
        watch.close()
    requests = StopRequests()
    watch = SpotWatch(requests, {**environment, "CLOUD": cloud}, poll_seconds=0.01)
    caplog.clear()
    wait_for(lambda: "does not answer" in caplog.text)
    assert watch._thread.is_alive()
    watch.close()


@pytest.mark.parametrize("kind", ["drip of headers", "drip with a length", "drip without"])
def test_an_answer_that_drips_ends_at_the_deadline(kind, monkeypatch):
    monkeypatch.setattr(metadata, "REQUEST_SECONDS", 0.5)
    with metadata_service() as (service, environment):
        requests = StopRequests()
        service.trouble += [kind] * (GIVE_UP_AFTER + 1)
        service.items["spot/instance-action"] = '{"action": "stop", "time": "2026-11-20T08:02:00Z"}'
        watch = SpotWatch(requests, {**environment, "CLOUD": "aws"}, poll_seconds=0.01)
        wait_for(lambda: requests.stop)
        assert requests.stop.kind == "spot"
        watch.close()


def test_the_launcher_waits_for_the_metadata_service(monkeypatch):
    """Without the type of its machine it does not know the price, and a cap would end the job."""
    monkeypatch.setattr(aws, "METADATA_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(metadata, "REQUEST_SECONDS", 0.5)
    with metadata_service() as (service, environment):
        service.trouble += ["503", "503", "cut", "drip without", "no HTTP"]
        service.items |= {"instance-type": "p4d.24xlarge\n", "instance-life-cycle": "on-demand"}
        service.items |= {"placement/region": "us-east-1", "placement/availability-zone": "us-east-1b"}
        environment |= {"CLOUD": "aws"}
        found = machine.describe(environment, [])
        assert (found["INSTANCE_TYPE"], found["USE_SPOT"], found["ZONE"]) == ("p4d.24xlarge", "false", "us-east-1b")
        assert "USD_PER_HOUR" in found
        assert "INSTANCE_TYPE" not in machine.describe({**environment, "AWS_EC2_METADATA_DISABLED": "true"}, [])
        service.trouble += ["503"] * 1000
        monkeypatch.setattr(aws, "METADATA_SECONDS", 0.2)
        assert "INSTANCE_TYPE" not in machine.describe(environment, [])


def test_the_first_reason_to_leave_counts_and_a_spot_notice_hurries():
    hurried = []
    requests = StopRequests(hurry=hurried.append)
    requests.on_signal("SIGUSR1")
    assert hurried == []
    requests.request_stop("spot", "terminate at 08:02")
    assert (requests.stop.kind, requests.stop.detail) == ("signal", "SIGUSR1")
    assert hurried == ["spot notice: terminate at 08:02"]


class Clock:
    """A ledger's clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seconds = 0.0
        monkeypatch.setattr(Ledger, "elapsed_seconds", lambda ledger: self.seconds)


def test_cap_counts_all_segments_and_keeps_a_reserve(tmp_path, monkeypatch: pytest.MonkeyPatch):
    run_url, machine = str(tmp_path / "run"), Machine(usd_per_hour=36.0)
    now = time.time()
    first = Ledger(RunFolder(run_url), machine, {}, started_at=now - 100)
    first.close("preempted")
    before = spent_by_earlier_segments(RunFolder(run_url), machine, Bounds(5.0))
    assert before.usd == pytest.approx(1.0, abs=0.02), "100 seconds at a cent a second"
    second = Ledger(RunFolder(run_url), machine, {})
    cap = SpendingCap(second, Bounds(5.0), 120, Spent(1.0, 100.0))
    clock = Clock(monkeypatch)
    # 4.00 are left for this segment: 120 s of shutdown, 1.5 x 20 s of checkpoint and a step of 10 s cost 1.60.
    clock.seconds = 239
    assert not cap.reached(step_seconds=10, checkpoint_seconds=20)
    clock.seconds = 241
    assert cap.reached(step_seconds=10, checkpoint_seconds=20)
    assert cap.describe() == "at most $3.41 of $5 spent"
    assert not SpendingCap(second, Bounds(), 120, Spent(1.0, 100.0)).reached(10, 20)
    # 0.15 hours are 540 s: 100 s of the first machine, and on this one 120 s of shutdown, 30 s and 10 s.
    cap = SpendingCap(second, Bounds(5.0, hours=0.15), 120, Spent(1.0, 100.0))
    assert cap.variable() == "MAX_USD", "which leaves 159 s"
    cap = SpendingCap(second, Bounds(50.0, hours=0.15), 120, Spent(1.0, 100.0))
    clock.seconds = 279
    assert not cap.reached(step_seconds=10, checkpoint_seconds=20)
    clock.seconds = 281
    assert cap.reached(step_seconds=10, checkpoint_seconds=20)
    assert cap.variable() == "MAX_HOURS"
    assert cap.describe() == "at most $3.81 of $50 spent, 0.11 of 0.15 hours paid"
    second.close("cap")


def test_on_spot_the_cap_pays_for_one_more_arrival(tmp_path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    clock.seconds = 100  # from the boot until now
    for spot, reached_at in ((True, 1000 - 120 - 150), (False, 1000 - 120)):
        book = Ledger(RunFolder(str(tmp_path / str(spot))), Machine(usd_per_hour=36.0, spot=spot), {})
        clock.seconds = 100
        cap = SpendingCap(book, Bounds(10.0), 120, Spent(0.0, 0.0))
        clock.seconds = reached_at - 1
        assert not cap.reached(step_seconds=0, checkpoint_seconds=0)
        clock.seconds = reached_at + 1
        assert cap.reached(step_seconds=0, checkpoint_seconds=0)
        book.close("cap")


def test_cap_without_a_known_price_is_refused(tmp_path):
    run_url = str(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"run\.max_usd is 20, but this machine's price is not known; set USD_PER_HOUR"
    ):
        spent_by_earlier_segments(RunFolder(run_url), Machine(), Bounds(20.0))
    assert spent_by_earlier_segments(RunFolder(run_url), Machine(), Bounds()).usd == 0.0
    Ledger(RunFolder(run_url), Machine(), {}).close("failed")
    with pytest.raises(ConfigError, match=r"an earlier segment of .* ran at an unknown price"):
        spent_by_earlier_segments(RunFolder(run_url), Machine(usd_per_hour=1.0), Bounds(20.0))


def test_interval_follows_costs_within_the_bound():
    cadence = Cadence(CheckpointConfig(max_lost_seconds=60, expected_hours_between_failures=4), now=0.0)
    assert cadence.interval_seconds() == 30
    # Young: sqrt(2 * 0.02 * 14400) = 24 s, within 60 - 3.
    cadence.measured(0.02, 3.0)
    assert cadence.interval_seconds() == pytest.approx(24.0)
    # A costly save would like 120 s; the bound wins.
    cadence.measured(0.5, 3.0)
    assert cadence.interval_seconds() == 57
    # Uploads that take longer than the bound follow each other.
    cadence.measured(0.5, 80.0)
    assert cadence.interval_seconds() == 80
    cadence.measured(0.5, 3.0)
    cadence.saved(now=100.0)
    assert not cadence.due(1, step_seconds=2.0, now=154.9)
    assert cadence.due(1, step_seconds=2.0, now=155.1)


def test_interval_in_steps():
    cadence = Cadence(CheckpointConfig(every_steps=50), now=0.0)
    assert [step for step in range(1, 200) if cadence.due(step, 1.0, now=1e9)] == [50, 100, 150]
