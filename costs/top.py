"""Renders the top of a run's page: the model, the dates, the machines, and the dollars with cap and forecast."""

from collections.abc import Sequence
from html import escape

from core import figures
from core.figures import quantity
from core.run.phases import label
from costs.about import waits
from costs.report import RUNNING, CostReport
from costs.tables import clock, hellaswag_rows, money, notes, sums

COMMIT_SHOWN = 12
NOTES_OPEN = 3  # the others are folded
GOOD = ("finished", RUNNING)


def top(report: CostReport) -> str:
    parts = [
        f"<h1>{escape(name_of(report.run))} {state(report)}</h1>",
        f'<p class="lead">{escape(report.run)}</p>',
        _facts(facts(report)),
        _cards(report),
        f'<p class="sums">{escape(sums(report))}</p>',
        _notes(report),
    ]
    return "\n".join(part for part in parts if part)


def name_of(run_url: str) -> str:
    """The name of a run, which is the last part of its URL."""
    return run_url.rstrip("/").rpartition("/")[2] or run_url


def state(report: CostReport) -> str:
    """The state of a run as a coloured word."""
    css = "good" if report.state in GOOD else "bad"
    return f'<span class="state {css}">{escape(report.state)}</span>'


def facts(report: CostReport) -> list[tuple[str, str]]:
    """Name and value of each known fact about the training."""
    of = report.about
    known = [] if of.parameters is None else [f"{quantity(of.parameters)} parameters"]
    found = [
        ("stage", report.stage or ""),
        ("model", ", ".join([*known, of.model] if of.model else known)),
        ("tokens", _tokens(report)),
        ("machines", of.machines),
        ("data", of.data),
        ("config", of.config),
        ("commit", of.commit[:COMMIT_SHOWN]),
        ("time (UTC)", _time(report)),
        ("tags", ", ".join(report.tags)),
    ]
    return [(name, value) for name, value in found if value]


def _tokens(report: CostReport) -> str:
    trained, whole = report.units.tokens, report.about.tokens
    if trained is None:
        return ""
    steps = f"{report.units.last_step:,} steps" if report.units.last_step is not None else ""
    if whole and report.state != "finished":
        return f"{quantity(trained)} of {quantity(whole)} ({100 * trained / whole:.0f} %, {steps})"
    return f"{quantity(trained)} ({steps})"


def _time(report: CostReport) -> str:
    of = report.about
    if of.began_at is None or of.ended_at is None:
        return ""
    waited = sum(end - start for start, end in waits(report.curves.machines))
    without = f", of which {figures.duration(waited)} without a machine" if waited else ""
    return f"{clock(of.began_at)} to {clock(of.ended_at)}: {figures.duration(of.ended_at - of.began_at)}{without}"


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _cards(report: CostReport) -> str:
    of, phases = report.units, {line.name: line for line in report.phases}
    cards = []
    if "train_kept" in phases:
        for name in ("train_kept", "train_lost"):
            line = phases[name]
            cards.append((f"{label(name)}, {100 * line.share:.1f} %", f"${money(report, line)}"))
        each = of.usd_per_billion_tokens
        cards.append(("per billion tokens", "$" + figures.dollars(each, 0 if each and each >= 1000 else 2)))
        cards.append(("goodput", "?" if of.goodput is None else f"{100 * of.goodput:.1f} %"))
        cards.append(("validation loss" + _expected_loss(report), "?" if of.val_loss is None else f"{of.val_loss:.4f}"))
        cards += [(name.partition(",")[0], value) for name, value in hellaswag_rows(of)[:1]]
    return (
        f'<div class="cards">{_money(report)}'
        + "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in cards)
        + "</div>"
    )


def _expected_loss(report: CostReport) -> str:
    expected = report.about.forecast_loss
    return "" if expected is None else f", forecast {expected:.3f}"


def _money(report: CostReport) -> str:
    """The card of the total, with bars for the cap and the forecast."""
    usd, cap = report.total.usd, report.about.cap_usd
    forecast = report.foreseen.usd if report.foreseen else report.about.forecast_usd
    lines, bar = ["total"], ""
    if usd is not None and cap:
        lines = [f"of ${figures.dollars(cap)} allowed, {100 * usd / cap:.0f} %"]
    if usd is not None and forecast:
        lines.append(f"forecast ${figures.dollars(forecast, report.places)}, {100 * (usd / forecast - 1):+.0f} %")
    if usd is not None and (cap or forecast):
        whole = max(usd, cap or 0.0, forecast or 0.0)
        mark = f'<u style="left:{100 * forecast / whole:.2f}%"></u>' if forecast else ""
        over = ' class="over"' if cap and usd > cap else ""
        bar = f'<div class="bar"><i{over} style="width:{100 * usd / whole:.2f}%"></i>{mark}</div>'
    said = "".join(f"<span>{escape(line)}</span>" for line in lines)
    return f'<div class="card money"><b>{escape("$" + money(report, report.total))}</b>{bar}{said}</div>'


def _notes(report: CostReport) -> str:
    items = [f"<li>{escape(note)}</li>" for note in notes(report)]
    if not items:
        return ""
    rest = "".join(items[NOTES_OPEN:])
    count = figures.counted(len(items) - NOTES_OPEN, "more note")
    folded = f"<details><summary>{count}</summary><ul>{rest}</ul></details>" if rest else ""
    return f'<aside class="notes"><ul>{"".join(items[:NOTES_OPEN])}</ul>{folded}</aside>'
