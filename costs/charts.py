"""The lines that a page or a plot draws, as plain lists of a few hundred points. Pure."""

from dataclasses import dataclass, field

import numpy as np

from core.run.model import Run
from costs.spend import Spend

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
    points = _thin(run.points("train"))
    with_loss = [point for point in points if point.values["loss"] is not None] if spend.complete else []
    with_eval = run.points("eval") if spend.complete else []
    return Charts(
        spend_time=[float(time) for time in times],
        spend_usd={name: [float(usd) for usd in curve] for name, curve in by_phase.items()},
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
    """Every n-th point, and the last."""
    stride = max(1, len(points) // POINTS)
    return points[::stride] + ([points[-1]] if points and (len(points) - 1) % stride else [])
