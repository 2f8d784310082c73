"""Computes the unit costs of a run, such as dollars per token, and the points of its charts.

If a second of the run has no price, the unit costs are None. So a unit cost is never too low.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import LauncherError
from core.run.model import Point, Run
from core.run.phases import PREPARATION_PHASES
from core.settings import model as architecture
from core.settings.loader import from_dict
from core.settings.model import ModelConfig
from costs.cells import Attributed, Spend
from costs.model import OutsideTime, Stretch

# Validation losses, besides multiples of 0.1, for which a report states the dollars. 3.28 is the loss of GPT-2 124M on
# FineWeb (llm.c discussion 481).
QUOTED_LEVELS = (3.28,)
LEVELS_SHOWN = 8


@dataclass(frozen=True)
class Level:
    """The first kept step with a validation loss of at most `val_loss`, and the dollars up to it."""

    val_loss: float
    step: int
    usd: float | None


@dataclass(frozen=True)
class Units:
    """Unit costs and other figures of a run. None means unknown.

    Dollars are not rounded. If the dollars of the run are a range, its lower end is used.
    """

    last_step: int | None
    tokens: float | None
    train_loss: float | None
    val_loss: float | None
    hellaswag: float | None
    hellaswag_norm: float | None
    usd_per_billion_tokens: float | None
    usd_per_exaflop: float | None
    usd_per_loss_point: float | None
    gpu_hours: float | None
    usd_per_gpu_hour: float | None
    mfu: float | None
    goodput: float | None
    tokens_per_second: float | None
    restarts: int
    usd_per_restart: float | None
    usd_on_demand: float | None
    usd_saved: float | None
    hour_more_usd: float | None
    hour_more_tokens: float | None
    hour_more_val_loss: float | None
    usd_to_val_loss: list[Level] = field(default_factory=list)


def units(
    run: Run,
    attributed: Attributed,
    spend: Spend,
    seconds: Mapping[str, float],
    usd: float | None,
    usd_on_demand: float | None,
    outside: Sequence[OutsideTime],
    points: Mapping[str, Sequence[Point]],
) -> Units:
    """Unit costs from `seconds` by phase and the run's `usd`, which is None if it is unknown.

    `usd_on_demand` is the price of the same hours on demand. `points` holds the run's metrics (Run.points) by kind.
    """
    evals, hellaswag, train = points["eval"], points["hellaswag"], points["train"]
    tokens = newest(train, "tokens")
    flops = flops_per_token(run.config)
    whole = math.fsum(seconds.values())
    trained = seconds.get("train_kept", 0.0)
    gpu_hours = _gpu_hours(run, attributed, outside)
    drop = evals[0].values["val_loss"] - evals[-1].values["val_loss"] if len(evals) > 1 else 0.0
    speed = tokens / trained if tokens and trained else None
    hour_tokens = tokens / whole * 3600 if tokens and whole else None
    restarts = len(run.segments) - 1
    return Units(
        last_step=run.last_step,
        tokens=tokens,
        train_loss=newest(train, "loss"),
        val_loss=evals[-1].values["val_loss"] if evals else None,
        hellaswag=hellaswag[-1].values["accuracy"] if hellaswag else None,
        hellaswag_norm=hellaswag[-1].values["accuracy_norm"] if hellaswag else None,
        usd_per_billion_tokens=_ratio(usd, tokens, 1e9),
        usd_per_exaflop=_ratio(usd, tokens * flops if tokens and flops else None, 1e18),
        usd_per_loss_point=_ratio(usd, drop if drop > 0 else None),
        gpu_hours=gpu_hours,
        usd_per_gpu_hour=_ratio(usd, gpu_hours),
        mfu=_mean_mfu(run),
        goodput=trained / whole if whole and trained else None,
        tokens_per_second=speed,
        restarts=restarts,
        usd_per_restart=_usd_per_restart(run, attributed, restarts),
        usd_on_demand=usd_on_demand,
        usd_saved=None if usd is None or usd_on_demand is None else usd_on_demand - usd,
        hour_more_usd=run.segments[-1].machine.usd_per_hour if hour_tokens else None,
        hour_more_tokens=hour_tokens,
        hour_more_val_loss=_loss_after(evals, hour_tokens),
        usd_to_val_loss=levels(evals, spend),
    )


def flops_per_token(config: Mapping[str, Any]) -> float | None:
    """FLOPs per token of a run's model, forward and backward. None if this release cannot read the model's settings."""
    model = model_of(config)
    return None if model is None else architecture.flops_per_token(model)


def model_of(config: Mapping[str, Any]) -> ModelConfig | None:
    """A run's model. None if the run has no model, or if this release cannot read the model's settings."""
    try:
        return from_dict(ModelConfig, config["model"], "run.json")
    except (KeyError, TypeError, LauncherError):
        return None


def newest(points: Sequence[Point], name: str) -> float | None:
    """The newest known value of a metric."""
    return next((value for point in reversed(points) if (value := point.values[name]) is not None), None)


def levels(evals: Sequence[Point], spend: Spend) -> list[Level]:
    """The dollars spent until each level of validation loss was first reached, for the LEVELS_SHOWN lowest levels."""
    if not evals:
        return []
    best = min(each.values["val_loss"] for each in evals)
    lowest = math.ceil(best * 10 - 1e-9)
    highest = min(math.ceil(evals[0].values["val_loss"] * 10), lowest + LEVELS_SHOWN)
    tenths = [tenth / 10 for tenth in range(lowest, highest)]
    wanted = sorted({*tenths, *(level for level in QUOTED_LEVELS if best <= level < evals[0].values["val_loss"])})
    reached = []
    for level in wanted[:LEVELS_SHOWN][::-1]:
        first = next(each for each in evals if each.values["val_loss"] <= level + 1e-9)
        usd = float(spend.at([first.time])[0]) if spend.complete else None
        reached.append(Level(level, first.step, usd))
    return reached


def _ratio(usd: float | None, amount: float | None, per: float = 1.0) -> float | None:
    return None if usd is None or not amount else usd / amount * per


def _gpu_hours(run: Run, attributed: Attributed, outside: Sequence[OutsideTime]) -> float | None:
    """GPU-hours of segments and outside time, or None if a segment has no GPUs."""
    if not run.segments or not all(segment.gpus for segment in run.segments):
        return None
    inside = math.fsum(
        math.fsum(math.fsum(span.phases.values()) for span in attributed[segment.number]) * segment.gpus
        for segment in run.segments
    )
    others = math.fsum((each.end - each.start) * (each.segment.gpus if each.segment else 0) for each in outside)
    return (inside + others) / 3600


def _mean_mfu(run: Run) -> float | None:
    known = [mfu for segment in run.segments for each in segment.records("train") if (mfu := each["mfu"]) is not None]
    return math.fsum(known) / len(known) if known else None


def _usd_per_restart(run: Run, attributed: Attributed, restarts: int) -> float | None:
    """Mean dollars per restart, for repeated steps and for the preparation of the new machine."""
    if not restarts:
        return None
    usd = []
    for segment in run.segments:
        if segment.price is None:
            return None
        counted = {"train_lost"} | (set() if segment is run.segments[0] else PREPARATION_PHASES)
        for span in attributed[segment.number]:
            usd += [segment.price.usd(seconds) for phase, seconds in span.phases.items() if phase in counted]
    return math.fsum(usd) / restarts


def _loss_after(evals: Sequence[Point], more_tokens: float | None) -> float | None:
    """Estimated validation loss after more tokens: the last two evaluations, extrapolated linearly in log(tokens)."""
    if len(evals) < 2 or not more_tokens:
        return None
    before, now = (each.values for each in evals[-2:])
    if not before["tokens"] or not now["tokens"] or now["tokens"] <= before["tokens"]:
        return None
    slope = (now["val_loss"] - before["val_loss"]) / math.log(now["tokens"] / before["tokens"])
    return now["val_loss"] + slope * math.log(1 + more_tokens / now["tokens"])


POINTS = 300


@dataclass(frozen=True)
class Curves:
    """Points of the charts. Times are unix seconds. All lists of one chart have the same length (0 without data)."""

    spend_time: list[float] = field(default_factory=list)
    spend_usd: dict[str, list[float]] = field(default_factory=dict)
    loss_time: list[float] = field(default_factory=list)
    loss_usd: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    val_usd: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    speed_time: list[float] = field(default_factory=list)
    tokens_per_second: list[float | None] = field(default_factory=list)
    mfu: list[float | None] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    losses_of_machines: list[float] = field(default_factory=list)
    machines: list[Stretch] = field(default_factory=list)


def curves(run: Run, spend: Spend, known: Mapping[str, Sequence[Point]]) -> Curves:
    """The points of the charts. Loss over dollars is left out if a price is unknown."""
    times = np.linspace(spend.start, spend.end, POINTS) if spend.end > spend.start else np.array([])
    by_phase = spend.by_phase(times) if len(times) else {}
    points = _thin(known["train"])
    with_loss = [point for point in points if point.values["loss"] is not None] if spend.complete else []
    with_eval = known["eval"] if spend.complete else []
    return Curves(
        spend_time=[float(time) for time in times],
        spend_usd={name: [float(usd) for usd in curve] for name, curve in by_phase.items()},
        loss_time=[point.time for point in with_loss],
        loss_usd=[float(usd) for usd in spend.at([point.time for point in with_loss])],
        loss=[point.values["loss"] for point in with_loss],
        val_usd=[float(usd) for usd in spend.at([point.time for point in with_eval])],
        val_loss=[point.values["val_loss"] for point in with_eval],
        speed_time=[point.time for point in points],
        tokens_per_second=[point.values["tokens_per_second"] for point in points],
        mfu=[point.values["mfu"] for point in points],
        starts=[segment.started_at for segment in run.segments if segment.started_at is not None],
        losses_of_machines=[s.ended_at for s in run.segments[:-1] if s.ended_at is not None],
    )


def _thin(points: list) -> list:
    """Every n-th point and the last one, about POINTS in total."""
    stride = max(1, len(points) // POINTS)
    return points[::stride] + ([points[-1]] if points and (len(points) - 1) % stride else [])
