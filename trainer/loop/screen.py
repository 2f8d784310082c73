"""Shows a run on a terminal: loss, throughput, dollars spent and left, remaining time, updated in place.

This is a separate module, because the package rich is optional.
"""

import itertools
import logging
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from core.figures import duration, quantity
from core.run.cap import SpendingCap

REFRESHES_PER_SECOND = 4
CURVE_COLUMNS = 60
_BARS = "▁▂▃▄▅▆▇█"


class Screen:
    """A panel at the bottom of the terminal. Log lines appear above it."""

    def __init__(self, steps: int, cap: SpendingCap | None):
        self._steps = steps
        self._cap = cap
        self._losses: list[float] = []
        self._step: Mapping[str, Any] = {}
        self._spent: float | None = None
        self._remaining = 0.0
        self._evaluations: dict[str, str] = {}
        console = Console(file=sys.stderr)
        self._live = Live(self._panel(), console=console, refresh_per_second=REFRESHES_PER_SECOND)
        self._live.start()
        # rich has replaced sys.stderr, to show log lines above the panel. Log handlers still hold the old stream.
        self._moved = [
            (handler, handler.setStream(sys.stderr))
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler)
        ]

    def step(self, values: Mapping[str, Any], spent_usd: float | None, remaining_seconds: float) -> None:
        self._step, self._spent, self._remaining = values, spent_usd, remaining_seconds
        self._losses.append(values["loss"])
        self._live.update(self._panel())

    def metric(self, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "eval":
            self._evaluations["validation loss"] = f"{values['val_loss']:.4f} at step {values['step']}"
        elif kind == "forecast" and "val_loss" in values:
            dollars = "" if values["usd"] is None else f", {_usd(values['usd'])}"
            expected = f"{values['val_loss']:.3f} ± {values['error']:.3f} at step {values['end']}{dollars}"
            self._evaluations["expected"] = expected
        elif kind == "hellaswag":
            self._evaluations["HellaSwag"] = f"{100 * values['accuracy_norm']:.2f} % at step {values['step']}"
        elif kind == "sample":
            self._evaluations["sample"] = " ".join(values["text"].split())[:200]

    def close(self) -> None:
        self._live.stop()
        for handler, stream in self._moved:
            if stream is not None:
                handler.setStream(stream)

    def _panel(self) -> Panel:
        step = self._step.get("step", 0)
        table = Table.grid(padding=(0, 3))
        for _ in range(4):
            table.add_column()
        if step:
            mfu = self._step["mfu"]
            table.add_row(
                "loss", f"[bold]{self._step['loss']:.4f}[/]", "tokens/s", quantity(self._step["tokens_per_second"])
            )
            table.add_row(
                "grad norm", f"{self._step['grad_norm']:.3f}", "MFU", "?" if mfu is None else f"{100 * mfu:.1f} %"
            )
            table.add_row("spent", _usd(self._spent), "left under the cap", self._left())
            table.add_row("tokens", quantity(self._step["tokens"]), "time to go", duration(self._remaining))
        for name, text in self._evaluations.items():
            table.add_row(name, Text(text, overflow="ellipsis"))
        title = f"step {step:,} of {self._steps:,}"
        bar = ProgressBar(total=self._steps, completed=step)
        return Panel(Group(bar, Text(curve(self._losses), style="cyan"), table), title=title)

    def _left(self) -> str:
        maximum = self._cap.max_usd if self._cap else 0.0
        return _usd(maximum - self._spent) if maximum and self._spent is not None else "no cap"


def curve(values: list[float], columns: int = CURVE_COLUMNS) -> str:
    """A line of bars for the values, averaged into at most `columns` bars."""
    if not values:
        return ""
    count = min(columns, len(values))
    edges = [len(values) * index // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _usd(value: float | None) -> str:
    return "?" if value is None else f"${value:.2f}"
