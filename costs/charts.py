"""Draws the charts of a report: dollars over time, phases, loss over dollars, speed over time."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core import figures
from core.figures import quantity
from core.run.phases import colour_class, label
from costs import about, svg
from costs.report import CostReport
from costs.units import Curves

# Each chart is drawn once per width, and costs/page.css shows the drawing that fits the screen. Widths are in pixels:
# WIDTHS for a chart in one column of the page, FULL_WIDTHS for a chart across both columns.
WIDTHS = {"wide": 700, "middle": 470, "narrow": 320}
FULL_WIDTHS = {"full": 1440, "most": 960, **WIDTHS}
HEIGHT = 280
LANE = 28  # of one machine
TOP, BOTTOM, RIGHT = 14, 28, 12
# Phases below this share of the dollars are merged into "other".
SMALL_SHARE = 0.005
LOSSES_SHOWN = 0.97

Draw = Callable[[Any, int, str], str]  # draws a chart of one report, or of several reports


def all_widths(draw: Draw, report: Any, widths: Mapping[str, int] = WIDTHS) -> str:
    """One drawing per width. The style sheet shows one of them."""
    return "".join(draw(report, width, kind) for kind, width in widths.items())


def stacked(report: CostReport) -> dict[str, list[float]]:
    """Cumulative dollars by phase for the stacked chart. Small phases are merged into "other"."""
    usd = report.curves.spend_usd
    whole = sum(curve[-1] for curve in usd.values())
    small = [name for name, curve in usd.items() if curve[-1] < SMALL_SHARE * whole]
    kept = {name: curve for name, curve in usd.items() if name not in small}
    if small:
        kept["other"] = [sum(values) for values in zip(*(usd[name] for name in small), strict=True)]
    # Kept training comes first, at the bottom, where its growth is easiest to read.
    return {name: kept[name] for name in sorted(kept, key=lambda name: name != "train_kept")}


def spend_over_time(report: CostReport, width: int, kind: str) -> str:
    times = report.curves.spend_time
    curves = stacked(report)
    total = [sum(values) for values in zip(*curves.values(), strict=True)]
    x = svg.time_axis(times[0], times[-1], 52, width - RIGHT)
    y = svg.value_axis(0.0, total[-1], HEIGHT - BOTTOM, TOP, _dollars(total[-1]))
    parts = svg.frame(x, y)
    low = [0.0] * len(times)
    for name, curve in curves.items():
        high = [below + value for below, value in zip(low, curve, strict=True)]
        parts.append(svg.area(x, y, times, low, high, colour_class(name)))
        low = high
    hints = []
    for index, at in enumerate(times):
        spent = f"{figures.duration(at - x.low)}: ${figures.dollars(total[index], report.places)}"
        hints.append((at, spent + "".join(_parts(curves, index, report.places))))
    parts += _machines(report, x)
    parts += svg.hover(x, TOP, HEIGHT - BOTTOM, hints)
    return svg.chart(width, HEIGHT, parts, "Dollars spent over time, by phase", kind)


def machines(report: CostReport, width: int, kind: str) -> str:
    """A bar for the time of each machine, in the colours of the machine's phases.

    A dashed line shows the time in which the run had no machine.
    """
    found = report.curves.machines
    lanes = max(each.lane for each in found) + 1
    bottom = TOP + LANE * lanes
    times = report.curves.spend_time
    first, last = min(each.start for each in found), max(each.end for each in found)
    x = svg.time_axis(min([first, *times]), max([last, *times]), RIGHT, width - RIGHT)
    parts = svg.x_labels(x, bottom)
    for each in found:
        hint = (
            f"segment {each.segment}, {each.machine}: {label(each.phase)}, {figures.duration(each.end - each.start)} "
            f"from {figures.duration(each.start - x.low)}"
        )
        y = TOP + LANE * each.lane
        parts.append(svg.bar(x(each.start), y, x(each.end) - x(each.start), LANE - 6, colour_class(each.phase), hint))
    for start, end in about.waits(found):
        hint = f"no machine for {figures.duration(end - start)}"
        parts.append(svg.horizontal(x(start), x(end), TOP + (LANE - 6) / 2, "line wait", hint))
    return svg.chart(width, bottom + BOTTOM, parts, "Machines over time, by phase, and the waiting between them", kind)


def waterfall(report: CostReport, width: int, kind: str) -> str:
    """A bar per phase. Each bar begins where the previous one ends, so that the last one ends at the total."""
    rows = [line for line in report.phases if line.usd]
    left, right, pitch = (96, 58, 24) if kind == "narrow" else (118, 70, 24)
    height = TOP + pitch * (len(rows) + 1) + 8
    total = report.total.usd
    x = svg.value_axis(0.0, total, left, width - right, str)
    parts, reached = [], 0.0
    for row, line in enumerate(rows):
        y = TOP + pitch * row
        parts.append(svg.words(left - 8, y + 13, label(line.name), anchor="end"))
        hint = f"{label(line.name)}: ${figures.dollars(line.usd, report.places)}, {figures.duration(line.seconds)}"
        parts.append(svg.bar(x(reached), y, x(reached + line.usd) - x(reached), 16, colour_class(line.name), hint))
        reached += line.usd
        parts.append(svg.words(width - right + 8, y + 13, figures.dollars(line.usd, report.places), "value"))
    y = TOP + pitch * len(rows)
    parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y - 4}" y2="{y - 4}"/>')
    parts.append(svg.words(left - 8, y + 13, "total", "value", "end"))
    parts.append(
        svg.bar(left, y, width - right - left, 16, "p-total", f"total: ${figures.dollars(total, report.places)}")
    )
    parts.append(svg.words(width - right + 8, y + 13, figures.dollars(total, report.places), "value"))
    return svg.chart(width, height, parts, "Dollars by phase, as a waterfall that ends at the total", kind)


def loss_over_dollars(report: CostReport, width: int, kind: str) -> str:
    curves = report.curves
    train = list(zip(curves.loss_usd, curves.loss, strict=True))
    val = list(zip(curves.val_usd, curves.val_loss, strict=True))
    # The first losses, near ln(vocabulary), are cut, because they would flatten the rest of the curve.
    losses = sorted(loss for _, loss in train + val)
    losses = losses[: max(1, math.ceil(len(losses) * LOSSES_SHOWN))]
    room = (losses[-1] - losses[0]) * 0.05 or 0.1
    train, val = ([(usd, loss if loss <= losses[-1] else None) for usd, loss in curve] for curve in (train, val))
    x = svg.value_axis(0.0, max(usd for usd, _ in train + val), 52, width - RIGHT, _dollars(report.total.usd))
    train = _interrupted(curves.loss_time, train, curves.starts)
    y = svg.value_axis(losses[0] - room, losses[-1] + room, HEIGHT - BOTTOM, TOP, "{:g}".format)
    parts = [*svg.frame(x, y), svg.line(x, y, train, "s-train"), svg.line(x, y, val, "s-val")]
    hints = [
        (usd, f"${figures.dollars(usd, report.places)}: train loss {loss:.4f}")
        for usd, loss in zip(curves.loss_usd, curves.loss, strict=True)
    ]
    parts += svg.hover(x, TOP, HEIGHT - BOTTOM, hints)
    parts += svg.dots(x, y, val, "s-val", lambda u, v: f"${figures.dollars(u, report.places)}: validation loss {v:.4f}")
    return svg.chart(width, HEIGHT, parts, "Loss over dollars spent", kind)


def losses(report: CostReport) -> list[tuple[float, float]]:
    """The points (dollars, validation loss) of a run or, if it has no validation loss, (dollars, training loss).

    The result is empty if the run has neither loss.
    """
    curves = report.curves
    return list(zip(curves.val_usd, curves.val_loss, strict=True)) or list(
        zip(curves.loss_usd, curves.loss, strict=True)
    )


def losses_compared(reports: Sequence[CostReport], width: int, kind: str) -> str:
    """A line per run with the validation loss over dollars. A run without validation loss shows its training loss."""
    lines = [losses(report) for report in reports]
    every = sorted(loss for line in lines for _, loss in line)
    every = every[: max(1, math.ceil(len(every) * LOSSES_SHOWN))]
    room = (every[-1] - every[0]) * 0.05 or 0.1
    most = max(usd for line in lines for usd, _ in line)
    x = svg.value_axis(0.0, most, 52, width - RIGHT, _dollars(most))
    y = svg.value_axis(every[0] - room, every[-1] + room, HEIGHT - BOTTOM, TOP, "{:g}".format)
    parts = svg.frame(x, y)
    for number, (report, line) in enumerate(zip(reports, lines, strict=True)):
        points = [(usd, loss if loss <= every[-1] else None) for usd, loss in line]
        say = f"{report.run.rstrip('/').rpartition('/')[2]}: ${{:,.{report.places}f}}, loss {{:.4f}}".format
        parts.append(svg.line(x, y, points, f"c-{number}"))
        parts += svg.dots(x, y, points, f"c-{number}", say)
    return svg.chart(width, HEIGHT, parts, "Loss over dollars spent, a line per run", kind)


def speed_over_time(report: CostReport, width: int, kind: str) -> str:
    """Two plots on one time axis: tokens per second and, below, the MFU if it is known.

    Marks show where machines ended.
    """
    curves = report.curves
    has_mfu = any(value is not None for value in curves.mfu)
    split = HEIGHT - BOTTOM if not has_mfu else round(HEIGHT * 0.55)
    times = curves.spend_time or curves.speed_time
    x = svg.time_axis(times[0], times[-1], 52, width - RIGHT)
    fastest = max(value for value in curves.tokens_per_second if value is not None)
    y = svg.value_axis(0.0, fastest * 1.3, split, TOP, quantity)
    speed = _over_time(curves, curves.tokens_per_second)
    parts = [*svg.frame(x, y, labels=not has_mfu), svg.line(x, y, speed, "s-speed")]
    parts.append(svg.words(x.start + 4, TOP + 10, "tokens/s", "caption"))
    if has_mfu:
        percent = [None if value is None else 100 * value for value in curves.mfu]
        top = split + 22
        most = max(value for value in percent if value is not None)
        below = svg.value_axis(0.0, max(1.0, most * 1.5), HEIGHT - BOTTOM, top, lambda value: f"{value:g} %")
        parts += svg.frame(x, below)
        parts.append(svg.line(x, below, _over_time(curves, percent), "s-mfu"))
        parts.append(svg.words(x.start + 4, top + 10, "MFU", "caption"))
    hints = [
        (at, f"{figures.duration(at - x.low)}: {'?' if speed is None else quantity(speed)} tokens/s" + _mfu(mfu))
        for at, speed, mfu in zip(curves.speed_time, curves.tokens_per_second, curves.mfu, strict=True)
    ]
    parts += svg.hover(x, TOP, HEIGHT - BOTTOM, hints)
    parts += _machines(report, x)
    return svg.chart(width, HEIGHT, parts, "Training speed over time; dashed lines mark the ends of machines", kind)


def _machines(report: CostReport, x: svg.Axis) -> list[str]:
    """A dashed line at the end of each of the first hundred machines. More lines would hide the chart."""
    return [
        svg.vertical(x, TOP, HEIGHT - BOTTOM, at, "gone", f"machine of segment {number} ended")
        for number, at in enumerate(report.curves.losses_of_machines[:100], 1)
    ]


def _interrupted(times: Sequence[float], points: svg.Points, starts: Sequence[float]) -> svg.Points:
    """The points of a line, measured at `times`, with a gap in the line where a new machine started."""
    found: list[tuple[float, float | None]] = []
    starts = sorted(starts)
    for index, (time, point) in enumerate(zip(times, points, strict=True)):
        if index and bisect.bisect_right(starts, times[index - 1]) < bisect.bisect_right(starts, time):
            found.append((point[0], None))
        found.append(point)
    return found


def _over_time(curves: Curves, values: Sequence[float | None]) -> svg.Points:
    return _interrupted(curves.speed_time, list(zip(curves.speed_time, values, strict=True)), curves.starts)


def _parts(curves: dict[str, list[float]], index: int, places: int) -> list[str]:
    return [
        f"\n{label(name)} ${figures.dollars(curve[index], places)}" for name, curve in curves.items() if curve[index]
    ]


def _mfu(mfu: float | None) -> str:
    return "" if mfu is None else f", MFU {100 * mfu:.1f} %"


def _dollars(most: float) -> Callable[[float], str]:
    """A function that formats a tick in dollars, with the digits that the axis needs."""
    digits = 0 if most >= 10 else 2 if most >= 0.1 or most <= 0 else 1 - math.floor(math.log10(most))
    return lambda value: f"${value:,.{digits}f}"
