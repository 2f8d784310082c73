"""Forecasts a run while it trains: its final validation loss, its dollars, and whether it can reach a target loss.

Only rank 0 forecasts, and only pretraining, because the law was tested on losses of pretraining. A resumed run reads
its earlier losses in the background and forecasts once they are loaded.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import LauncherError
from core.loss import law
from core.run.course import Change
from core.run.reader import read_run
from trainer.loop.forecast import LossForecast, LossHistory
from trainer.optim.schedule import Schedule
from trainer.stages.stage import Stage

log = logging.getLogger("train")

SHARE = 0.01  # share of the run's steps between two forecasts
# With fewer steps, a fit is worse than the law's error says: runs of 200 steps ended 0.3 to 1 nats above the forecast.
LEAST_STEPS = 1000
# A function that takes the current step. It returns the last step that the money pays for, and the dollars that the run
# will have cost then (None if no price is known).
Expected = Callable[[int], tuple[int, float | None]]


@dataclass(frozen=True)
class View:
    """A forecast made after `step`: loss and dollars at the end of the run. `usd` is None if no price is known."""

    step: int
    loss: LossForecast
    usd: float | None

    def __str__(self) -> str:
        what = "training loss" if self.loss.is_training else "loss"
        usd = "" if self.usd is None else f" for ${self.usd:.2f}"
        return f"{what} {self.loss.loss:.3f} \u00b1 {self.loss.error:.3f} at step {self.loss.end}{usd}"

    def as_metric(self) -> dict:
        found = {"step": self.step, "end": self.loss.end, "error": self.loss.error, "usd": self.usd}
        return found | {"train_loss" if self.loss.is_training else "val_loss": self.loss.loss}


class Outlook:
    """Keeps the losses of a run and makes forecasts. `expected` gives the last step that the money pays for."""

    def __init__(self, stage: Stage, expected: Expected, first_step: int):
        self.view: View | None = None
        self.target_reached = False
        self._stage, self._expected = stage, expected
        self._history = LossHistory()
        self._waiting: list[tuple[int, float]] = []
        self._views: list[View] = []
        self._loader: threading.Thread | None = None
        self._found: list[tuple[int, float]] | None = []
        self._validation: tuple[int, float] | None = None
        if first_step:
            self._loader = threading.Thread(target=self._load, args=(first_step,), name="earlier losses", daemon=True)
            self._loader.start()

    def add(self, step: int, loss: float) -> None:
        """Add the training loss of a step."""
        if self._loader:
            self._waiting.append((step, loss))
            self._take_loaded()
        else:
            self._history.add(step, loss)

    def validated(self, step: int, loss: float) -> None:
        self._validation = (step, loss)
        self._history.validated(step, loss)

    def refreshed(self, step: int) -> View | None:
        """A new forecast, if a forecast is due and the earlier losses are loaded. Otherwise None."""
        if self._loader or (self.view and step - self.view.step < SHARE * self.view.loss.end):
            return None
        if self._stage.name != "pretrain" or self._stage.settings.train.overfit:
            return None
        schedule, warmup = self._stage.schedule, self._stage.settings.optimizer.warmup_steps
        end, usd = self._expected(step)
        if end < LEAST_STEPS:
            return None
        per_step = self._stage.settings.batch.tokens_per_step
        loss = self._history.forecast(with_cooldown(schedule, end), end, warmup, per_step, law.load())
        if loss is None:
            return None
        self.view = View(step, loss, usd)
        self._views.append(self.view)
        target = self._stage.settings.train.target_loss
        if target and schedule.anneals and not schedule.cooldown:
            now = step + schedule.wanted(step)
            annealed = self._history.forecast(with_cooldown(schedule, now, step), now, warmup, per_step)
            self.target_reached = annealed is not None and not annealed.is_training and annealed.loss <= target
        return self.view

    def compared(self, spent_usd: float | None) -> str:
        """A line that compares the outcome of the run with the forecast at half of the steps. "" without a forecast."""
        if not self._views or not self._validation or self._validation[0] < self._views[-1].loss.end:
            return ""
        half = min(self._views, key=lambda view: abs(view.step - self._validation[0] / 2))
        came = f"loss {self._validation[1]:.3f}" + ("" if spent_usd is None else f", ${spent_usd:.2f}")
        return f"forecast at step {half.step}: {half}; it came to {came}"

    def _load(self, first_step: int) -> None:
        try:
            run = read_run(self._stage.settings.run.url)
            points = [(each.step, each.values["loss"]) for each in run.points("train") if each.step <= first_step]
            self._found = [(step, loss) for step, loss in points if loss is not None]
            evals = [each for each in run.points("eval") if each.step <= first_step]
            if evals and not self._validation:
                self._validation = (evals[-1].step, evals[-1].values["val_loss"])
        except LauncherError as error:
            log.debug("there is no forecast, because earlier losses cannot be read: %s", error)
            self._found = None

    def _take_loaded(self) -> None:
        """Once the earlier losses are loaded, add them to the history.

        Then add the losses that were reported meanwhile.
        """
        if self._loader.is_alive() or self._found is None:
            return
        before = 0
        for step, loss in self._found:
            self._history.add(step, loss, max(1, step - before))
            before = step
        for step, loss in self._waiting:
            self._history.add(step, loss)
        if self._validation:
            self._history.validated(*self._validation)
        self._loader, self._waiting = None, []


def with_cooldown(schedule: Schedule, end: int, trunk: int | None = None) -> Schedule:
    """A copy of the schedule, with a cooldown that ends at `end`.

    Returns the schedule itself if it has no cooldown that is decided while the run trains, or if this cooldown is
    decided already.
    """
    if not schedule.anneals or schedule.cooldown:
        return schedule
    expected = Schedule(schedule.config, schedule.first_steps, schedule.changes)
    expected.end = end
    trunk = min(end - 1, expected.last_trunk_step()) if trunk is None else trunk
    expected.add(Change("anneal", trunk, end - trunk))
    return expected
