"""Forecasts the final validation loss of a run while it trains, from its own losses and its learning rates.

The law is L(s) = L0 + A S1^-a - C S2 (Tissue et al. 2024, arXiv 2408.11029). S1 is the sum of the learning rates up to
step s, as shares of the peak. S2 is the sum of a momentum: each drop of the rate is added to the momentum, which keeps
the share DECAY of its value per step. The constants L0, A, a and C are fitted to the run's losses.

C says how much a cooldown lowers the loss. Before the cooldown, the losses do not determine C, so the fit assumes that
a whole cooldown gains USUAL_GAIN, as in public logs. The law is fitted to training losses, so the difference to the
newest validation loss is added. The fitted law is used up to FAR times the steps seen. Beyond that, the law of public
runs (core.loss.law) says how the loss falls with further tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.loss.law import LEAST_TOKENS, Law
from trainer.optim.schedule import Schedule

DECAY = 0.999
POINTS = 512  # points of the grid on which the sums are computed
BINS = 64
LEAST_BINS = 12
EXPONENTS = tuple(np.linspace(0.1, 1.2, 12))
# A linear cooldown over 28.6 % of the steps gained 0.10 to 0.14 nats in public runs of 124M to 1.5B parameters.
USUAL_GAIN, GAIN_ERROR = 0.12, 0.03
PRIOR = 0.02  # weight of the expected USUAL_GAIN in the fit, relative to the weight of the losses
# Errors of the law in nats, in public logs of 124M and 1.5B parameters, by the ratio of all steps to the steps seen.
# The error was 0.01 up to a ratio of FAR, 0.043 at 4.2, and 0.068 at 6.
FAR = 1.7
ERRORS = ((FAR, 0.01), (4.2, 0.043), (6.0, 0.068))


@dataclass(frozen=True)
class LossForecast:
    """The expected validation loss at step `end`, and its likely error in nats. `ratio` is `end` / steps seen.

    If the run has not been validated yet (`is_training`), `loss` is the training loss.
    """

    loss: float
    error: float
    end: int
    ratio: float
    is_training: bool


class LossHistory:
    """The training losses, as up to 2 x BINS means over equal numbers of steps, and the newest validation loss."""

    def __init__(self):
        self._width = 1
        self._means: list[tuple[float, float, int]] = []  # mean step, mean loss, number of steps
        self._open: tuple[float, float, int] = (0.0, 0.0, 0)  # sums and number
        self._validation: tuple[int, float] | None = None

    def add(self, step: int, loss: float, weight: int = 1) -> None:
        """Add the loss of a step, or the mean loss of `weight` steps around it."""
        steps, losses, count = self._open
        self._open = steps + weight * step, losses + weight * loss, count + weight
        if self._open[2] >= self._width:
            self._close()

    def validated(self, step: int, loss: float) -> None:
        self._validation = (step, loss)

    def forecast(
        self, schedule: Schedule, end: int, warmup: int, tokens_per_step: int = 0, public: Law | None = None
    ) -> LossForecast | None:
        """The forecast for step `end` of a schedule, or None while too few steps after the warm-up are known.

        The law `public` is used if the run ends far beyond the steps seen and takes at least LEAST_TOKENS in all.
        """
        known = [each for each in self._means if each[0] > max(2 * warmup, 0.1 * self._means[-1][0])]
        if len(known) < LEAST_BINS:
            return None
        steps, losses, weights = (np.array(column, dtype=float) for column in zip(*known, strict=True))
        last = max(1.0, known[-1][0])
        at = [*steps, *([self._validation[0]] if self._validation else []), float(end)]
        heat, fallen = sums(schedule, end, at)
        more = 0.0
        if public and end > FAR * last and end * tokens_per_step >= LEAST_TOKENS:
            # The fitted law is used up to FAR times the steps seen, and it also gives the gain of the whole cooldown.
            # Beyond, the public law is used.
            heat[-1] = heat[-1] * FAR * last / end
            more = public.gain_of_tokens(FAR * last * tokens_per_step, end * tokens_per_step)
        count = len(steps)
        full = fallen[-1]
        fitted = fit(heat[:count], fallen[:count], losses, weights, full)
        predicted = fitted.at(heat, fallen)
        loss, is_training = float(predicted[-1]) - more, self._validation is None
        if self._validation:
            loss += self._validation[1] - float(predicted[count])
        # A part of the cooldown may be over. Its gain is already in the measured losses, so it adds no error.
        ahead = max(0.0, 1 - fallen[count - 1] / full) if full > 0 else 0.0
        error = math.hypot(law_error(end / last), GAIN_ERROR * ahead)
        return LossForecast(loss, error, end, end / last, is_training)

    def _close(self) -> None:
        steps, losses, count = self._open
        self._means.append((steps / count, losses / count, count))
        self._open = (0.0, 0.0, 0)
        if len(self._means) >= 2 * BINS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [_joined(*pair) for pair in pairs]
            self._width *= 2


def _joined(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, int]:
    count = a[2] + b[2]
    return (a[0] * a[2] + b[0] * b[2]) / count, (a[1] * a[2] + b[1] * b[2]) / count, count


def law_error(ratio: float) -> float:
    """The error of the law for a ratio of all steps to the steps seen.

    It is interpolated or extrapolated from ERRORS.
    """
    logs, errors = zip(*((math.log(each), error) for each, error in ERRORS), strict=True)
    beyond = max(0.0, math.log(max(ratio, 1.0)) - logs[-1])
    slope = (errors[-1] - errors[-2]) / (logs[-1] - logs[-2])
    return float(np.interp(math.log(max(ratio, 1.0)), logs, errors)) + slope * beyond


def sums(schedule: Schedule, end: int, at: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The sums S1 and S2 at the steps `at`. They are computed on a grid of at most POINTS steps up to `end`."""
    grid = np.unique(np.linspace(1, max(2, end), POINTS).round().astype(int))
    rates = np.array([schedule.factor(int(step)) for step in grid])
    gaps = np.diff(grid, prepend=0)
    heat = np.cumsum(rates * gaps)
    fallen, momentum, total = [0.0], 0.0, 0.0
    for drop, gap in zip(-np.diff(rates), gaps[1:], strict=True):
        keep = DECAY**gap
        # Only drops count, so the rise in the warm-up is ignored. Between two points of the grid, the drop is assumed
        # to be even.
        before, momentum = momentum, momentum * keep + max(0.0, drop) * (1 - keep) / (gap * (1 - DECAY))
        total += (before + momentum) / 2 * gap
        fallen.append(total)
    return np.interp(at, grid, heat), np.interp(at, grid, fallen)


@dataclass(frozen=True)
class Fit:
    """The fitted constants: L0, A, C and the exponent a."""

    floor: float
    scale: float
    gain: float
    exponent: float

    def at(self, heat: np.ndarray, fallen: np.ndarray) -> np.ndarray:
        return self.floor + self.scale * heat**-self.exponent - self.gain * fallen


def fit(heat: np.ndarray, fallen: np.ndarray, losses: np.ndarray, weights: np.ndarray, full: float) -> Fit:
    """Fits the law to the losses. `full` is S2 of the whole cooldown; C x `full` is drawn towards USUAL_GAIN."""
    found: list[tuple[float, Fit]] = []
    root = np.sqrt(weights / weights.sum())
    for exponent in EXPONENTS:
        columns = np.stack([np.ones_like(heat), heat**-exponent, -fallen], axis=1) * root[:, None]
        target = losses * root
        if full > 0:  # one more row for the usual gain
            columns = np.vstack([columns, [0.0, 0.0, full * PRIOR]])
            target = np.append(target, USUAL_GAIN * PRIOR)
        solution, *_ = np.linalg.lstsq(columns, target, rcond=None)
        if solution[1] < 0:  # the loss rises, which the law cannot describe
            mean = float((losses * weights).sum() / weights.sum())
            solution = np.array([mean, 0.0, USUAL_GAIN / full if full else 0.0])
        error = float(((columns @ solution - target) ** 2).sum())
        found.append((error, Fit(*map(float, solution), float(exponent))))
    return min(found, key=lambda each: each[0])[1]
