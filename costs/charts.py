"""The lines that a page or a plot draws, as plain lists of a few hundred points. Pure."""

from dataclasses import dataclass, field

import numpy as np

from costs.model import Run
from costs.spend import Spend
from costs.units import kept

POINTS = 300


@dataclass(frozen=True)
class Charts:
    """Times are unix seconds; the lists of one group are parallel. Empty where nothing is known."""

    spend_time: list[float] = field(default_factory=list)
    spend_usd: dict[str, list[float]] = field(default_factory=dict)
    loss_usd: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    val_usd: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    speed_time: list[float] = field(default_factory=list)
    tokens_per_second: list[float | None] = field(default_factory=list)
    mfu: list[float | None] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    losses_of_machines: list[float] = field(default_factory=list)


def charts(run: Run, spend: Spend) -> Charts:
    """Dollars over time by phase, loss over dollars, speed over time. Loss over dollars needs every price."""
    times = np.linspace(spend.start, spend.end, POINTS) if spend.end > spend.start else np.array([])
    by_phase = spend.by_phase(times) if len(times) else {}
    points = [
        (time, loss, speed, mfu)
        for segment in run.segments
        for time, loss, speed, mfu in zip(
            segment.curve.time,
            segment.curve.loss,
            segment.curve.tokens_per_second,
            segment.curve.mfu,
            strict=True,
        )
    ]
    points = _thin(points)
    evals = kept(run, "evals")
    with_loss = [(time, loss) for time, loss, _, _ in points if loss is not None] if spend.complete else []
    with_eval = evals if spend.complete else []
    return Charts(
        spend_time=[float(time) for time in times],
        spend_usd={name: [float(usd) for usd in curve] for name, curve in by_phase.items()},
        loss_usd=[float(usd) for usd in spend.at([time for time, _ in with_loss])],
        loss=[loss for _, loss in with_loss],
        val_usd=[float(usd) for usd in spend.at([each["time"] for each in with_eval])],
        val_loss=[each["val_loss"] for each in with_eval],
        speed_time=[time for time, _, _, _ in points],
        tokens_per_second=[speed for _, _, speed, _ in points],
        mfu=[mfu for _, _, _, mfu in points],
        starts=[segment.started_at for segment in run.segments if segment.started_at is not None],
        losses_of_machines=[s.ended_at for s in run.segments[:-1] if s.ended_at is not None],
    )


def _thin(points: list) -> list:
    """Every n-th point, and the last."""
    stride = max(1, len(points) // POINTS)
    return points[::stride] + ([points[-1]] if points and (len(points) - 1) % stride else [])
