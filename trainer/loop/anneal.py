"""Decides when the cooldown of a run begins and how many steps it takes. Rank 0 makes this decision once per cooldown.

The money that is left must pay for the cooldown, the last evaluation, the last checkpoint and the machine's shutdown.
On spot it must also pay for one lost checkpoint interval and one restart. The cooldown begins when one more step would
leave too little money. It begins earlier if `make anneal` requests it, if the forecast loss of an immediate cooldown
reaches train.target_loss, or if the steps left of train.steps are only enough for the cooldown.

The decision is stored in the run's course (core.run.course) before the cooldown's first step. A preemption or a higher
price can take money that the cooldown needs. In this case the cooldown is shortened, at most once. A cooldown of less
than a tenth of the steps would change little, so if the money pays for less than that, the run saves and stops without
a cooldown.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

from core.errors import LauncherError, RunError, StorageError
from core.run import course
from core.run.cap import SAFETY
from core.run.course import Change
from core.run.folder import RunFolder
from core.run.ledger import check_owner
from core.run.segment import SegmentLog
from trainer.checkpoint.save import Saver
from trainer.loop.evaluation import TrainingEvaluator
from trainer.loop.requests import StopRequests
from trainer.optim.schedule import Schedule
from trainer.stages.stage import Stage

log = logging.getLogger("train")

SHORTEST = 0.10  # the shortest cooldown, as a share of the steps; 10 % are enough, 2.5 % are not (Hu et al. 2024)
LATE = 0.15  # a re-plan waits until the money pays for at most this share of the cooldown (see `_replanned`)
MARGIN = 1.02  # factor on the expected time of a cooldown
WINDOW_STEPS = 500  # steps over which the pace is measured
REPLAN_MARGIN, REPLAN_STEPS = 0.20, 3  # steps that a re-plan leaves unused: this share of them, and this number more
RECENT_STEPS = 200  # the mean of fewer steps follows short disturbances, and then a re-plan leaves money unused
LEAST_STEPS = 3  # measured steps before a decision
LOOK_SECONDS = 10.0


class Pace:
    """Measures the seconds per step by the wall clock. This includes waits, evaluations and checkpoints."""

    def __init__(self):
        self._passed: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS + 1)

    def passed(self, step: int, now: float) -> None:
        if not self._passed or step > self._passed[-1][0]:
            self._passed.append((step, now))

    def seconds(self, newest: int = WINDOW_STEPS) -> float | None:
        """The mean seconds per step over the `newest` steps, or over the whole window.

        None until LEAST_STEPS are measured.
        """
        if len(self._passed) <= LEAST_STEPS:
            return None
        (first, began), (last, now) = self._passed[max(0, len(self._passed) - 1 - newest)], self._passed[-1]
        return (now - began) / (last - first)


class RequestWatch:
    """Looks for a request to anneal (`make anneal`) in a background thread."""

    def __init__(self, folder: RunFolder, answered: set[str], seconds: float | None = None):
        self.request: str | None = None
        self._folder, self._answered = folder, answered
        self._seconds = LOOK_SECONDS if seconds is None else seconds
        self._end = threading.Event()
        threading.Thread(target=self._run, name="requests to anneal", daemon=True).start()

    def close(self) -> None:
        self._end.set()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                found = course.requested_anneal(self._folder)
                if found and found not in self._answered:
                    self.request = found
                    return
            except LauncherError as error:  # the thread looks again after a pause
                log.debug("requests to anneal cannot be read now: %s", error)
            self._end.wait(self._seconds)


class Annealer:
    """Decides on rank 0, between two steps. `failure` is set if another machine has taken over the run."""

    def __init__(
        self,
        stage: Stage,
        segment: SegmentLog,
        saver: Saver,
        requests: StopRequests,
        evaluator: TrainingEvaluator,
        first_step: int,
    ):
        self.failure: RunError | None = None
        self.is_target_reached: Callable[[], bool] = lambda: False
        self._stage, self._segment, self._saver = stage, segment, saver
        self._requests, self._evaluator = requests, evaluator
        self._first_step = first_step
        self._folder = RunFolder(stage.settings.run.url)
        # Number of steps between a decision and its first effect.
        self._ahead = 2 if stage.ranks.device.type == "cuda" else 1
        self._pace = Pace()
        self._watch: RequestWatch | None = None
        if segment.ledger and self._is_active():
            answered = {each.facts["request"] for each in stage.schedule.changes if "request" in each.facts}
            self._watch = RequestWatch(self._folder, answered)

    def close(self) -> None:
        if self._watch:
            self._watch.close()

    def decide(self, step: int) -> Change | None:
        """The change of course after `step`, or None. A returned change is already stored.

        Requests a stop if the money is spent.
        """
        schedule = self._stage.schedule
        if step > self._first_step:  # the first step compiles
            self._pace.passed(step, self._segment.ledger.now())
        if not self._is_active() or step >= schedule.end or self._requests.stop:
            return None
        change = self._replanned(step) if schedule.cooldown else self._begun(step)
        return change and self._stored(change)

    def expected(self, step: int) -> tuple[int, float | None]:
        """The last step that the money pays for, and the dollars that the run will have cost after it.

        The dollars are None if no price is known.
        """
        schedule, seconds, cap = self._stage.schedule, self._pace.seconds(), self._segment.cap
        end = min(schedule.end, step + self._pays(seconds, full=False))
        spent, price = cap.spent_usd(), self._segment.ledger.machine.price
        if seconds is None or spent is None or price is None:
            return end, None
        shutdown = self._stage.settings.run.shutdown_reserve_seconds
        rest = (end - step) * seconds + self._reserve(seconds, full=False) + shutdown
        return end, spent + price.usd(rest)

    def _is_active(self) -> bool:
        return self._stage.schedule.anneals and not self._stage.settings.train.overfit

    def _begun(self, step: int) -> Change | None:
        """The cooldown, if it must begin directly after `step`. Otherwise None."""
        schedule, seconds = self._stage.schedule, self._pace.seconds()
        left = schedule.end - step
        wanted, pays = min(left, schedule.wanted(step)), self._pays(seconds, full=True)
        if step >= schedule.last_trunk_step():
            return self._cooldown(step, left, pays, "length", seconds)
        if step > schedule.config.warmup_steps and self._watch and self._watch.request:
            return self._cooldown(step, wanted, pays, "request", seconds, request=self._watch.request)
        if self.is_target_reached():
            return self._cooldown(step, wanted, pays, "target", seconds)
        if seconds is not None and pays < schedule.wanted(step + self._ahead) + self._ahead:
            return self._cooldown(step, wanted, pays, "budget", seconds)
        return None

    def _replanned(self, step: int) -> Change | None:
        """A shorter cooldown, if the money no longer pays for the rest of the current cooldown. Otherwise None.

        There is only one re-plan, and noise in the pace can look like a small shortage of money. So the re-plan waits
        until the money pays for at most max(steps left / 2, LATE * steps of the cooldown) steps.
        """
        schedule, seconds = self._stage.schedule, self._pace.seconds()
        plan = schedule.cooldown
        left = schedule.end - step
        if seconds is None or plan.kind == "replan" or self._pays(seconds, full=False) >= left:
            return None
        # There is only one re-plan. To be safe, it uses the slower of two paces: the mean pace and the recent pace.
        pays = self._pays(max(seconds, self._pace.seconds(RECENT_STEPS)), full=True)
        # The new cooldown cannot be shortened again. The margin protects its last steps if training slows down further.
        pays = max(0, math.floor(pays * (1 - REPLAN_MARGIN)) - REPLAN_STEPS)
        if pays > max(left / 2, LATE * plan.steps):
            return None
        begun = min(plan.step, step)
        return self._cooldown(step, left, pays, "replan", seconds, begun)

    def _cooldown(
        self, step: int, wanted: int, pays: int, why: str, seconds: float | None, begun: int | None = None, **facts
    ) -> Change | None:
        """A cooldown after `step`: of `wanted` steps, or of `pays` steps if the money pays for fewer.

        Requests a stop and returns None if the money pays for too few.
        """
        schedule = self._stage.schedule
        trunk = step if begun is None else begun
        cooled = min(wanted, pays)
        whole = step - trunk + cooled
        if pays < wanted and (not cooled or schedule.is_too_short(trunk, whole, SHORTEST)):
            spent = self._segment.cap.describe()
            self._requests.request_stop(
                "cap",
                f"{spent}; {NOT_ANNEALED}: the money left pays for a cooldown of {max(0, whole)} steps, fewer than "
                f"{SHORTEST:.0%} of the steps",
            )
            return None
        cap = self._segment.cap
        facts |= {
            "spent_usd": cap.spent_usd(),
            "max_usd": cap.max_usd or None,
            "seconds_per_step": seconds,
            "reserve_seconds": None if seconds is None else self._reserve(seconds, full=True),
        }
        return Change("replan" if why == "replan" else "anneal", step, cooled, why=why, facts=facts)

    def _pays(self, seconds: float | None, full: bool) -> int:
        """The number of steps that the money pays for at `seconds` per step; a large number if there is no cap.

        If `full` is true, the full reserve and a margin are kept back. A new plan keeps them back, so that small delays
        cause no re-plan.
        """
        if seconds is None:
            return 1 << 40
        cap = self._segment.cap
        have = cap.latest(self._reserve(seconds, full)) - cap.now()
        return int(max(0.0, min(have / (seconds * (MARGIN if full else 1.0)), 1 << 40)))

    def _reserve(self, seconds: float, full: bool) -> float:
        """Seconds needed after the last step of the cooldown.

        The shutdown and a restart are not included, because the cap reserves time for them. If `full` is true and the
        machine is on spot, one lost checkpoint interval is added.
        """
        tokens = self._stage.settings.batch.tokens_per_step
        ending = self._evaluator.last_seconds(seconds / tokens) + SAFETY * self._saver.seconds()
        if not full or not self._segment.ledger.machine.spot:
            return ending
        every = self._saver.config.every_steps
        return ending + (every * seconds if every else self._saver.cadence.interval_seconds())

    def _stored(self, change: Change) -> Change | None:
        """Stores the change in the run's course. Returns None if the store fails; the next step tries again."""
        try:
            check_owner(self._folder, self._segment.number)
            course.add(self._folder, len(self._stage.schedule.changes) + 1, change)
        except RunError as error:
            self.failure = error
            return None
        except StorageError as error:
            log.warning("the cooldown cannot begin yet, because its plan is not stored: %s", error)
            return None
        self._segment.mark("anneal", kind=change.kind, step=change.step, steps=change.steps, why=change.why)
        log.info("%s", describe(change, self._segment.cap.describe()))
        return change


def as_numbers(change: Change | None) -> tuple[float, float]:
    """Encodes a cooldown that begins after the current step as numbers, which the ranks can exchange."""
    return (course.COOLDOWNS.index(change.kind) + 1, change.steps) if change else (0, 0)


def from_numbers(step: int, numbers: Sequence[float]) -> Change | None:
    """Decodes the numbers of `as_numbers`. The change then has no reason and no facts."""
    kind, steps = map(int, numbers)
    return Change(course.COOLDOWNS[kind - 1], step, steps) if kind else None


NOT_ANNEALED = "not annealed"
WHY = {
    "budget": "the money left just pays for it",
    "request": "`make anneal` has requested it",
    "target": "the expected loss has reached train.target_loss",
    "length": "these are the last of train.steps",
    "replan": "the money no longer paid for the longer cooldown",
}


def describe(change: Change, spent: str) -> str:
    """The line in the log about a cooldown."""
    what = "the cooldown is re-planned" if change.kind == "replan" else "the cooldown begins"
    length = f"{change.steps} steps to step {change.end}"
    return f"{what} after step {change.step}: {length}, because {WHY[change.why]} ({spent})"


def describe_end(schedule: Schedule, reached: int, run_url: str) -> str:
    """A sentence that says whether the cooldown is complete at step `reached`. It is empty if no cooldown has begun."""
    plan = schedule.cooldown
    if plan is None or reached <= schedule.trunk:
        return ""
    begun, cooled = schedule.trunk, reached - schedule.trunk
    if reached < schedule.end:
        return f"{NOT_ANNEALED}: {cooled} of the {schedule.end - begun} steps of the cooldown are done"
    return (
        f"annealed over {cooled} steps; the checkpoint before the cooldown, step {begun}, is kept: "
        f"a new run can start from it with --from={run_url}@{begun} and another run.url"
    )
