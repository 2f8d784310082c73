"""Dollars as a function of time: what had been spent, on which phase, when a loss was reached. Pure."""

from collections.abc import Sequence

import numpy as np

from core.run.model import Run
from core.run.phases import REPORT_PHASES
from costs.cells import Attributed, paid_to_endpoints
from costs.model import OutsideTime


class Spend:
    """Cumulative dollars of a run by phase. Time without a known price counts as no dollars; `complete` says so."""

    def __init__(self, run: Run, attributed: Attributed, outside: Sequence[OutsideTime] = ()):
        self.complete = True
        pieces: dict[str, list[tuple[float, float, float]]] = {}
        for segment in run.segments:
            self.complete &= segment.price is not None
            for span in attributed[segment.number] if segment.price else ():
                for phase, seconds in span.phases.items():
                    if seconds > 0:
                        pieces.setdefault(phase, []).append((span.start, span.end, segment.price.usd(seconds)))
        for time in outside:
            self.complete &= time.price is not None
            usd = time.price.usd(time.end - time.start) if time.price else 0.0
            pieces.setdefault(time.phase, []).append((time.start, time.end, usd))
        for segment, usd in paid_to_endpoints(run):
            pieces.setdefault("api", []).append((segment.started_at, segment.ended_at, usd))
        names = [*(p for p in REPORT_PHASES if p in pieces), *sorted(set(pieces) - set(REPORT_PHASES))]
        self.curves = {name: _ramp(pieces[name]) for name in names}
        edges = [edge for phase in pieces.values() for start, end, _ in phase for edge in (start, end)]
        self.start, self.end = (min(edges), max(edges)) if edges else (0.0, 0.0)

    def by_phase(self, times: Sequence[float]) -> dict[str, np.ndarray]:
        """Cumulative dollars of each phase at each time."""
        return {name: np.interp(times, *curve) for name, curve in self.curves.items()}

    def at(self, times: Sequence[float]) -> np.ndarray:
        """Cumulative dollars of all phases at each time."""
        return sum(self.by_phase(times).values(), np.zeros(len(times)))


def _ramp(pieces: list[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Times and cumulative dollars of overlapping stretches, each spent evenly. Touching stretches share a corner."""
    start, end, usd = (np.array(column) for column in zip(*pieces, strict=True))
    rate = usd / np.maximum(end - start, 1e-9)
    corners = np.unique(np.concatenate([start, end]))
    change = np.zeros(len(corners))
    np.add.at(change, np.searchsorted(corners, start), rate)
    np.add.at(change, np.searchsorted(corners, end), -rate)
    spent = np.concatenate([[0.0], np.cumsum(np.cumsum(change)[:-1] * np.diff(corners))])
    return corners, spent
