"""Draws lines, areas and bars as inline SVG. Colours are CSS classes of costs/page.css, which has a dark variant.

A chart is drawn for a given width. A page contains each chart in several widths, because scaling would shrink the text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float | None]]
HOVER_COLUMNS, TAB_STOPS = 40, 8
CHARACTER = 7.2  # estimated width in pixels of a character in the box of a hint
MOST_TIMES = 10
EDGE = 14  # pixels: half the width of a label of the time axis
PIXELS_PER_TIME, PIXELS_PER_VALUE, PIXELS_PER_LINE = 56, 60, 40  # pixels that a label needs, with the space around it


@dataclass(frozen=True)
class Axis:
    """An axis of values `low` to `high` from pixel `start` to `end`; `text` formats a tick."""

    low: float
    high: float
    start: float
    end: float
    text: Callable[[float], str]
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 2)


def nice_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    """At most `most` (2 or more) round values from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return (low,)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (factor * power for factor in (1, 2, 5, 10, 20) if power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return tuple(round(index * step, 12) for index in range(first, last + 1))
    return (low,)  # the span is too small for a float


def time_axis(low: float, high: float, start: float, end: float) -> Axis:
    """An axis of the time since the run's start, in a suitable unit."""
    span = high - low
    unit, name = next(
        ((size, name) for size, name in ((86400, "d"), (3600, "h"), (60, "min")) if span >= 2 * size), (1, "s")
    )
    ticks = nice_ticks(0.0, span / unit, min(MOST_TIMES, max(3, int((end - start) / PIXELS_PER_TIME))))
    return Axis(
        low, high, start, end, lambda value: f"{(value - low) / unit:g} {name}", tuple(low + t * unit for t in ticks)
    )


def value_axis(low: float, high: float, start: float, end: float, text: Callable[[float], str]) -> Axis:
    most = max(3, int(abs(end - start) / (PIXELS_PER_VALUE if end > start else PIXELS_PER_LINE)))
    return Axis(low, high, start, end, text, nice_ticks(low, high, most))


def chart(width: int, height: int, body: Sequence[str], label: str, kind: str) -> str:
    return (
        f'<svg class="{escape(kind)}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def frame(x: Axis, y: Axis, *, labels: bool = True) -> list[str]:
    """Draws horizontal grid lines with their values, and the labels of the x axis."""
    parts = []
    for tick in y.ticks:
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 6}" y="{y(tick) + 4}" text-anchor="end">{escape(y.text(tick))}</text>'
        )
    return parts + (x_labels(x, y.start) if labels else [])


def x_labels(x: Axis, bottom: float) -> list[str]:
    """The labels of a horizontal axis. A label that would extend beyond the chart is moved inwards."""
    parts = []
    for tick in x.ticks:
        anchor = "end" if x.end - x(tick) < EDGE else "start" if x(tick) - x.start < 1 and x.start < EDGE else "middle"
        parts.append(words(x(tick), bottom + 16, x.text(tick), anchor=anchor))
    return parts


def line(x: Axis, y: Axis, points: Points, css: str) -> str:
    """A line through points, with a gap where a value is None."""
    path, pen_up = [], True
    for at, value in points:
        if value is None:
            pen_up = True
            continue
        path.append(f"{'M' if pen_up else 'L'}{x(at)} {y(value)}")
        pen_up = False
    return f'<path class="line {escape(css)}" d="{"".join(path)}"/>'


def area(x: Axis, y: Axis, times: Sequence[float], low: Sequence[float], high: Sequence[float], css: str) -> str:
    upper = [f"{x(at)} {y(value)}" for at, value in zip(times, high, strict=True)]
    lower = [f"{x(at)} {y(value)}" for at, value in zip(times, low, strict=True)]
    return f'<path class="area {escape(css)}" d="M{"L".join(upper + lower[::-1])}Z"/>'


def dots(x: Axis, y: Axis, points: Points, css: str, hint: Callable[[float, float], str]) -> list[str]:
    return [
        f'<circle class="{escape(css)}" cx="{x(at)}" cy="{y(value)}" r="3.5"><title>{escape(hint(at, value))}</title>'
        "</circle>"
        for at, value in points
        if value is not None
    ]


def vertical(x: Axis, top: float, bottom: float, at: float, css: str, hint: str) -> str:
    return (
        f'<line class="{escape(css)}" x1="{x(at)}" x2="{x(at)}" y1="{top}" y2="{bottom}"><title>{escape(hint)}</title>'
        "</line>"
    )


def horizontal(start: float, end: float, y: float, css: str, hint: str) -> str:
    return f'<line class="{escape(css)}" x1="{start}" x2="{end}" y1="{y}" y2="{y}"><title>{escape(hint)}</title></line>'


def hover(x: Axis, top: float, bottom: float, hints: Sequence[tuple[float, str]]) -> list[str]:
    """Invisible columns that show a text at the mouse pointer, at a tap, and on the tab key, without a script."""
    stride = max(1, len(hints) // HOVER_COLUMNS)
    shown = hints[::stride]
    edges = [x(at) for at, _ in shown]
    parts = []
    for index, (_, hint) in enumerate(shown):
        left = (edges[index - 1] + edges[index]) / 2 if index else edges[index]
        right = (edges[index] + edges[index + 1]) / 2 if index + 1 < len(edges) else x.end
        # The tab key stops only at about TAB_STOPS of the columns, so that a user soon gets past the chart.
        stop = 0 if index % max(1, len(shown) // TAB_STOPS) == 0 else -1
        column = (
            f'<rect class="hover" x="{left:.2f}" y="{top}" width="{max(0.0, right - left):.2f}" '
            f'height="{bottom - top}"/>'
        )
        parts.append(f'<g class="tip" tabindex="{stop}">{column}{_box(x, top, edges[index], hint)}</g>')
    return parts


def _box(x: Axis, top: float, at: float, hint: str) -> str:
    """The lines of a hint in a box beside `at`, on the side with more room."""
    lines = hint.split("\n")
    width = max(map(len, lines)) * CHARACTER + 16
    left = at + 10 if at < (x.start + x.end) / 2 else at - 10 - width
    left = max(0.0, min(left, x.end - width))
    text = "".join(f'<tspan x="{left + 8:.1f}" dy="16">{escape(line)}</tspan>' for line in lines)
    height = 16 * len(lines) + 10
    box = f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height}" rx="4"/>'
    return f'<g class="box">{box}<text y="{top + 1}">{text}</text></g>'


def bar(x: float, y: float, width: float, height: float, css: str, hint: str) -> str:
    return (
        f'<rect class="area {escape(css)}" x="{x}" y="{y}" width="{max(width, 1.0):.2f}" height="{height}" rx="2">'
        f"<title>{escape(hint)}</title></rect>"
    )


def words(x: float, y: float, text: str, css: str = "tick", anchor: str = "start") -> str:
    return f'<text class="{escape(css)}" x="{x}" y="{y}" text-anchor="{escape(anchor)}">{escape(text)}</text>'
