"""Cooldowns that are decided while a run trains: the schedule, the decision, and real processes."""

import dataclasses
import itertools
import math
import re
import signal
from types import SimpleNamespace

import pytest

from core import storage
from core.errors import RunError
from core.run import course
from core.run.course import Change
from core.run.folder import RunFolder, open_run
from core.run.reader import spent_usd_at_most
from core.settings.training import OptimizerConfig
from launch import anneal
from tests import corpus, launching
from trainer.loop.anneal import Annealer, describe_end
from trainer.loop.requests import StopRequests
from trainer.optim.schedule import Schedule

WSD = OptimizerConfig(schedule="wsd", warmup_steps=10)


# --- the schedule ----------------------------------------------------------------------------------------------


def test_the_rate_stays_until_the_cooldown_and_its_last_step_still_moves():
    schedule = Schedule(WSD, 100)
    assert [schedule.factor(step) for step in (5, 10, 50, 100)] == [0.5, 1.0, 1.0, 1.0]
    schedule.add(Change("anneal", 60, 15, "budget"))
    assert (schedule.end, schedule.trunk) == (75, 60)
    assert schedule.factor(60) == 1.0
    factors = [schedule.factor(step) for step in range(61, 76)]
    assert factors == pytest.approx([1 - math.sqrt(k / 16) for k in range(1, 16)])
    linear = Schedule(dataclasses.replace(WSD, anneal_shape="linear"), 100, [Change("anneal", 60, 15)])
    assert [linear.factor(step) for step in (61, 75)] == pytest.approx([15 / 16, 1 / 16])


def test_a_re_plan_goes_on_from_the_rate_that_is_reached():
    schedule = Schedule(WSD, 100, [Change("anneal", 60, 15)])
    reached = schedule.factor(66)
    schedule.add(Change("replan", 66, 4))
    assert schedule.end == 70
    assert schedule.factor(66) == reached, "what was computed stays"
    factors = [schedule.factor(step) for step in range(66, 71)]
    assert all(after < before for before, after in itertools.pairwise(factors))
    progress = 6 / 16 + (10 / 16) * 4 / 5
    assert factors[-1] == pytest.approx(1 - math.sqrt(progress))


def test_a_re_plan_of_a_segment_that_lost_steps_of_the_trunk_begins_earlier():
    changes = [Change("anneal", 60, 15), Change("replan", 55, 10)]
    schedule = Schedule(WSD, 100, changes)
    assert (schedule.trunk, schedule.end, schedule.factor(55)) == (55, 65, 1.0)
    assert schedule.factor(56) == pytest.approx(1 - math.sqrt(1 / 11))
    assert course.kept_steps(changes) == {55}


def test_an_extension_climbs_back_and_the_rates_before_it_stay():
    cooled = [Change("anneal", 80, 20)]
    before = [Schedule(WSD, 100, cooled).factor(step) for step in range(1, 101)]
    extended = Schedule(WSD, 150, [*cooled, Change("extend", 100, 150, before=100, warmup=10, factor=before[-1])])
    assert [extended.factor(step) for step in range(1, 101)] == before
    assert extended.factor(105) == pytest.approx((before[-1] + 1) / 2)
    assert [extended.factor(step) for step in (110, 150)] == [1.0, 1.0]
    assert (extended.end, extended.cooldown) == (150, None)
    extended.add(Change("anneal", 120, 30))
    assert extended.factor(121) == pytest.approx(1 - math.sqrt(1 / 31))
    assert course.kept_steps(extended.changes) == {80, 100, 120}


@pytest.mark.parametrize(("optimizer", "share"), [("adamw", 0.20), ("muon", 0.35)])
def test_a_cooldown_takes_the_share_of_all_steps_that_its_optimizer_needs(optimizer: str, share: float):
    schedule = Schedule(dataclasses.replace(WSD, name=optimizer), 10_000)
    for step in (1000, 5000):
        assert schedule.wanted(step) / (step + schedule.wanted(step)) == pytest.approx(share, abs=1e-3)
    assert schedule.last_trunk_step() == round(10_000 * (1 - share))
    assert schedule.is_too_short(900, 99, 0.10)
    assert not schedule.is_too_short(900, 100, 0.10)


# --- the stored course -----------------------------------------------------------------------------------------


def test_a_change_is_stored_once_and_read_as_it_was(tmp_path):
    folder = RunFolder(str(tmp_path))
    changes = [Change("anneal", 60, 15, "budget", facts={"spent_usd": 1.5}), Change("replan", 66, 4, "replan")]
    for number, change in enumerate(changes, 1):
        course.add(folder, number, change)
    assert course.read(folder) == changes
    with pytest.raises(RunError, match="another machine of this run has stored a change already"):
        course.add(folder, 2, changes[1])
    storage.delete(f"{folder.course}/000001.json")
    with pytest.raises(RunError, match=r"holds the changes \[2\], so one is missing"):
        course.read(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "course", "version": 9}', '{"format": "course", "version": 1}'])
def test_a_damaged_change_stops_a_resume_by_name(tmp_path, text: str):
    folder = RunFolder(str(tmp_path))
    storage.write_bytes(f"{folder.course}/000001.json", text.encode())
    with pytest.raises(RunError, match=r"000001\.json: is not a change of a run's course"):
        course.read(folder)


# --- the decision ----------------------------------------------------------------------------------------------


class Clock:
    """A run whose steps take `seconds` each and whose machine costs a dollar a second."""

    def __init__(self, folder: str, max_usd: float, changes=(), spot=False, steps=100_000, **more):
        self.now, self.usd_per_second, self.reserve = 0.0, 1.0, 20.0
        self.spent, self.max_usd, self.requests, self.marks = 0.0, max_usd, StopRequests(), []
        cap = SimpleNamespace(latest=self.latest, now=lambda: self.now, describe=lambda: f"${self.spent:.2f} spent")
        cap.spent_usd, cap.max_usd = (lambda: self.spent), max_usd
        ledger = SimpleNamespace(machine=SimpleNamespace(spot=spot), now=lambda: self.now)
        self.schedule = Schedule(dataclasses.replace(WSD, **more), steps, changes)
        stage = SimpleNamespace(schedule=self.schedule, ranks=SimpleNamespace(device=SimpleNamespace(type="cpu")))
        stage.settings = SimpleNamespace(
            run=SimpleNamespace(url=folder),
            train=SimpleNamespace(overfit=False),
            batch=SimpleNamespace(tokens_per_step=100),
        )
        mark = lambda name, **fields: self.marks.append(fields)  # noqa: E731
        segment = SimpleNamespace(ledger=ledger, cap=cap, number=1, mark=mark)
        cadence = SimpleNamespace(interval_seconds=lambda: 30.0)
        saver = SimpleNamespace(seconds=lambda: 4.0, cadence=cadence, config=SimpleNamespace(every_steps=0))
        evaluator = SimpleNamespace(last_seconds=lambda each: 10.0)
        self.annealer = Annealer(stage, segment, saver, self.requests, evaluator, first_step=0)
        self.annealer.close()

    def latest(self, seconds: float) -> float:
        """20 seconds are for the shutdown."""
        return self.now + (self.max_usd - self.spent) / self.usd_per_second - seconds - 20

    def spend(self, seconds: float) -> None:
        self.now += seconds
        self.spent += seconds * self.usd_per_second

    def train(self, step: int = 0, seconds: float = 1.0, until: int = 10**9) -> int:
        """Take steps, as the loop does, to the end of the run or a request to stop. Returns the last one."""
        while step < until:
            if change := self.annealer.decide(step):
                self.schedule.add(change)
            if self.requests.stop or step >= self.schedule.end:
                break
            self.spend(seconds)
            step += 1
        return step


def test_the_budget_decides_once_and_pays_for_the_rest(tmp_path):
    clock = Clock(str(tmp_path), max_usd=1000.0)
    end = clock.train()
    [change] = course.read(RunFolder(str(tmp_path)))
    assert [change] == clock.schedule.changes
    assert (change.kind, change.why, change.end) == ("anneal", "budget", end)
    assert change.steps / end == pytest.approx(0.20, abs=0.003)
    # What is left pays for an evaluation of 10 s, a checkpoint of 6 s with its margin, and 20 s of shutdown.
    assert 0.97 * 1000 < clock.spent + 10 + 6 + 20 <= 1000
    assert clock.requests.stop is None


def test_on_spot_a_lost_interval_is_reserved_too(tmp_path):
    ends = []
    for spot in (False, True):
        clock = Clock(str(tmp_path / str(spot)), max_usd=1000.0, spot=spot)
        ends.append(clock.train())
    assert ends[0] - ends[1] == pytest.approx(30, abs=3)


def test_a_price_that_doubles_in_the_cooldown_gives_one_shorter_plan(tmp_path):
    clock = Clock(str(tmp_path), max_usd=1000.0)
    clock.train(until=850)
    assert clock.schedule.cooldown
    planned = clock.schedule.end
    clock.usd_per_second = 2.0
    end = clock.train(850)
    assert [change.kind for change in clock.schedule.changes] == ["anneal", "replan"]
    assert clock.schedule.changes[1].step < 870, "half of the money for it is missing, so it is re-planned soon"
    assert end < planned
    assert clock.spent + 2 * 36 <= 1000
    assert clock.requests.stop is None
    assert describe_end(clock.schedule, end, "RUN").startswith("annealed over ")


def test_a_small_shortage_is_judged_near_the_end(tmp_path):
    """Steps that are 5 % slower: the one re-plan waits until little of the cooldown is left."""
    clock = Clock(str(tmp_path), max_usd=1000.0)
    clock.train(until=800)
    planned = clock.schedule.cooldown
    assert clock.train(800, seconds=1.08) < planned.end
    [_, replan] = clock.schedule.changes
    assert replan.step > planned.step + 0.6 * planned.steps
    assert clock.spent + 36 <= 1000


def test_a_short_disturbance_does_not_leave_money_unused(tmp_path):
    """Forty steps of twice the time, early in the cooldown: the pace before and after them counts more."""
    clock = Clock(str(tmp_path), max_usd=4000.0)
    clock.train(until=3300)
    assert clock.schedule.cooldown
    clock.train(3300, until=3340, seconds=2.0)
    end = clock.train(3340)
    assert clock.requests.stop is None
    assert end == clock.schedule.end
    assert 0.97 * 4000 < clock.spent + 36 <= 4000


def test_less_than_a_tenth_of_the_steps_is_not_called_a_cooldown(tmp_path):
    clock = Clock(str(tmp_path), max_usd=1000.0)
    clock.train(until=700)
    clock.usd_per_second = 5.0
    reached = clock.train(700)
    assert reached < 705
    assert course.read(RunFolder(str(tmp_path))) == []
    stop = clock.requests.stop
    assert stop.kind == "cap"
    assert "not annealed: the money left pays for a cooldown of" in stop.detail
    assert "fewer than 10% of the steps" in stop.detail


def test_a_second_shortage_is_left_to_the_cap_and_said(tmp_path):
    clock = Clock(str(tmp_path), max_usd=1000.0)
    clock.train(until=850)
    clock.usd_per_second = 2.0
    clock.train(850, until=870)
    clock.usd_per_second = 4.0
    clock.train(870, until=875)
    assert [change.kind for change in clock.schedule.changes] == ["anneal", "replan"]
    trunk, end = clock.schedule.trunk, clock.schedule.end
    said = describe_end(clock.schedule, 875, "RUN")
    assert said == f"not annealed: {875 - trunk} of the {end - trunk} steps of the cooldown are done"


def test_without_a_cap_the_last_share_of_the_steps_is_the_cooldown(tmp_path):
    clock = Clock(str(tmp_path), max_usd=math.inf, steps=50, anneal_fraction=0.3)
    assert clock.train() == 50
    [change] = clock.schedule.changes
    assert (change.step, change.steps, change.why) == (35, 15, "length")


def test_a_request_is_answered_once(tmp_path):
    folder = RunFolder(str(tmp_path))
    clock = Clock(str(tmp_path), max_usd=math.inf)  # whose watch is closed
    clock.train(until=80)
    clock.annealer._watch.request = request = course.request_anneal(folder)
    assert course.requested_anneal(folder) == request
    assert clock.train(80) == 100
    [change] = clock.schedule.changes
    assert (change.step, change.why, change.facts["request"]) == (80, "request", request)


def test_a_machine_that_was_replaced_decides_nothing(tmp_path):
    storage.write_bytes(RunFolder(str(tmp_path)).segment(2).start, b"{}")
    clock = Clock(str(tmp_path), max_usd=100.0)
    clock.train(until=60)
    assert not clock.schedule.changes
    assert "segment 2 has taken over this run" in str(clock.annealer.failure)


def test_the_request_of_a_user(tmp_path):
    folder = RunFolder(str(tmp_path))
    with pytest.raises(RunError, match="there is no run here; check RUN and BUCKET"):
        anneal.ask(folder)
    open_run(folder, {}, {"optimizer": {"schedule": "wsd"}}, "data")
    assert "the cooldown is requested" in anneal.ask(folder)
    assert course.requested_anneal(folder)
    course.add(folder, 1, Change("anneal", 80, 20, "request"))
    with pytest.raises(RunError, match="its cooldown is decided: it begins after step 80 and ends at step 100"):
        anneal.ask(folder)
    other = RunFolder(str(tmp_path / "cosine"))
    open_run(other, {}, {"optimizer": {"schedule": "cosine"}}, "data")
    with pytest.raises(RunError, match=r"schedule is cosine, which fixes .* only a run with optimizer\.schedule=wsd"):
        anneal.ask(other)


# --- real processes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    folder = tmp_path_factory.mktemp("anneal")
    source = corpus.write_parquet(folder / "source", [corpus.speeches(16)])
    corpus.prepare_set(source, str(folder / "set"), vocab_bpe)
    return str(folder / "set")


WSD_FLAGS = ["--optimizer.schedule=wsd", "--train.sample_tokens=0", "--run.shutdown_reserve_seconds=1"]


def test_the_money_decides_and_a_kill_in_the_cooldown_changes_no_bit(data_url: str, tmp_path):
    """A dollar per step. The run dies in its cooldown and goes on with two ranks; another one has the recorded course
    from its start and is left alone."""
    run_url, other = str(tmp_path / "run"), str(tmp_path / "undisturbed")
    flags = [f"--data.url={data_url}", *WSD_FLAGS, "--train.steps=100000", "--checkpoint.every_steps=3"]
    flags += ["--batch.tokens_per_step=64"]  # a micro-batch for each of two ranks

    def life(ranks: int, **environment: str) -> tuple[int, str]:
        money = {"USD_PER_HOUR": "3600", "MAX_USD": "30"} | environment
        run = [*flags, f"--run.url={run_url}"]
        return launching.finish(launching.start(ranks, *run, module="tests.dollar_steps", environment=money))

    code, output = life(1, DIE_AT_STEP="26")
    assert code == -signal.SIGKILL, output
    [plan] = course.read(RunFolder(run_url))
    assert plan.why == "budget"
    assert plan.step < 25 < plan.end
    assert plan.steps / plan.end == pytest.approx(0.20, abs=0.02)
    assert 27 <= plan.end <= 29, "30 dollars pay for the shutdown and an evaluation too"
    # A killed machine counts until its next heartbeat: these dollars are given back, because no re-plan is wanted here.
    code, output = life(2, MAX_USD="40")
    assert code == 0, output
    assert int(re.search(r"resumed from step (\d+)", output)[1]) >= plan.step
    assert f"annealed over {plan.steps} steps; the checkpoint before the cooldown, step {plan.step}, is kept" in output
    assert course.read(RunFolder(run_url)) == [plan]
    assert {plan.step, plan.end} <= set(launching.completed(run_url))
    assert spent_usd_at_most(run_url) <= 40

    course.add(RunFolder(other), 1, plan)
    launching.train(1, *flags, f"--run.url={other}")
    assert launching.tensors(other, plan.end) == launching.tensors(run_url, plan.end)
    mine, theirs = launching.metrics(run_url), launching.metrics(other)
    assert [mine[step]["lr"] for step in sorted(mine)] == [theirs[step]["lr"] for step in sorted(theirs)]
    assert mine[plan.end]["lr"] < 0.1 * mine[plan.step]["lr"]


def test_a_branch_begins_with_the_trunk_and_both_models_stay(data_url: str, tmp_path):
    """`make anneal`, then a branch from the trunk, which names another rate, and anneals again."""
    run_url, other = str(tmp_path / "run"), str(tmp_path / "more")
    flags = [f"--data.url={data_url}", *WSD_FLAGS, "--checkpoint.every_steps=100"]
    course.request_anneal(RunFolder(run_url))  # the trainer sees it at once, and answers after the warm-up
    launching.train(1, *flags, "--train.steps=100000", f"--run.url={run_url}")
    [plan] = course.read(RunFolder(run_url))
    assert (plan.why, sorted(launching.completed(run_url))) == ("request", [plan.step, plan.end])
    # A branch may change what it names, but neither model nor batch.
    branch = [*flags, f"--train.steps={plan.end + 4}", f"--run.url={other}", "--checkpoint.keep_last=9"]

    def refused(*more: str) -> str:
        code, output = launching.finish(launching.start(1, *branch, *more))
        assert code != 0
        return next(line for line in output.splitlines() if line.startswith("error: "))

    said = refused(f"--from={run_url}@trunk", "--batch.tokens_per_step=64")
    assert "that run has batch.tokens_per_step=128, this config has batch.tokens_per_step=64" in said
    assert f"has no complete checkpoint of step 7; it has those of steps {plan.step}, {plan.end}" in refused(
        f"--from={run_url}@7"
    )
    assert not storage.list_objects(other)
    output = launching.train(1, *branch, f"--from={run_url}", "--optimizer.lr=2e-2")
    assert f"resumed from step {plan.step}" in output
    again = course.read(RunFolder(other))
    assert [change.kind for change in again] == ["branch", "anneal"]
    assert again[0].source == f"{run_url}@{plan.step}"
    rates = {step: metric["lr"] for step, metric in launching.metrics(other).items()}
    assert min(rates) == plan.step + 1
    assert rates[plan.step + 1] == 2e-2
    assert launching.tensors(other, plan.step) == launching.tensors(run_url, plan.step)
    assert {plan.step, plan.end} <= set(launching.completed(run_url))
    assert "began from" in refused(f"--from={run_url}@{plan.end}")
