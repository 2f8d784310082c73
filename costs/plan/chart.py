"""Draws the lowest expected loss against dollars, one line per machine, as a self-contained SVG file."""

import math
from collections.abc import Callable, Mapping, Sequence

from costs import svg
from costs.plan.planner import Answer, Plan

LEAST_USD, MOST_USD, POINTS = 5.0, 500.0, 25
LINES = 6
WIDTH, HEIGHT = 880, 420
TICKS = (5, 10, 20, 50, 100, 200, 500)
# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLE = (
    "svg { background: #fff; font: 12px system-ui, sans-serif; } .grid { stroke: #dfe3e8; } "
    "text { fill: #5d6673; } .value { fill: #16191d; } .line { fill: none; stroke-width: 1.8; } "
)


def frontier(ask: Callable[[float], Answer]) -> dict[str, list[Plan]]:
    """The plans of each machine for sums from LEAST_USD to MOST_USD. The machine with the lowest losses comes first."""
    ratio = (MOST_USD / LEAST_USD) ** (1 / (POINTS - 1))
    found: dict[str, list[Plan]] = {}
    for index in range(POINTS):
        for each in ask(LEAST_USD * ratio**index).plans:
            found.setdefault(each.machine.name, []).append(each)
    return dict(sorted(found.items(), key=lambda item: item[1][-1].loss))


def draw(lines: Mapping[str, Sequence[Plan]], scale: str) -> str:
    """The chart of the first LINES machines. `scale` names the validation set of the losses."""
    shown = dict(list(lines.items())[:LINES])
    losses = [each.loss for plans in shown.values() for each in plans]
    ticks = tuple(math.log10(tick) for tick in TICKS)
    x = svg.Axis(ticks[0], ticks[-1], 56, WIDTH - 230, lambda value: f"${10**value:,.0f}", ticks)
    y = svg.value_axis(min(losses) - 0.02, max(losses) + 0.02, HEIGHT - 44, 34, "{:g}".format)
    parts = svg.frame(x, y)
    parts.append(svg.words(56, 18, f"Lowest expected validation loss on {scale} (nats per token) for a sum", "value"))
    parts.append(svg.words((x.start + x.end) / 2, HEIGHT - 8, "dollars, all in", anchor="middle"))
    style = _STYLE
    for index, (name, plans) in enumerate(shown.items()):
        style += f".m{index} {{ stroke: {COLOURS[index]}; }} circle.m{index} {{ fill: {COLOURS[index]}; }} "
        points = [(math.log10(each.usd), each.loss) for each in plans]
        by_point = dict(zip(points, plans, strict=True))
        parts.append(svg.line(x, y, points, f"m{index}"))
        parts += svg.dots(x, y, points, f"m{index}", lambda at, value, known=by_point: _hint(known[at, value]))
        height = 50 + 20 * index
        parts.append(
            f'<line class="line m{index}" x1="{x.end + 16}" x2="{x.end + 34}" y1="{height - 4}" y2="{height - 4}"/>'
        )
        parts.append(svg.words(x.end + 40, height, name, "value"))
    drawing = svg.chart(WIDTH, HEIGHT, [f"<style>{style}</style>", *parts], "Loss against dollars, by machine", "plan")
    return drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _hint(each: Plan) -> str:
    model = f"{each.candidate.size} {each.candidate.recipe}, {each.tokens / 1e9:.1f}B tokens, {each.hours:.1f} h"
    return f"${each.usd:,.2f}: {model}, loss {each.loss:.3f} ± {each.error:g}"
