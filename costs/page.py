"""Renders a report as one HTML page without scripts and references to other files."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from core import figures
from core.run import phases
from core.run.phases import colour_class, label
from costs import charts
from costs.report import CostReport
from costs.tables import Sheet, headline, hellaswag_rows, money, notes, sheets, sums

# No script runs, of whatever origin, and nothing is loaded: a mistake in escaping stays text.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("page.css")


def as_html(report: CostReport, now: float) -> str:
    tables = {
        name: _section(sheet.title, _table(sheet) + (_notes(report) if name == "origins" else ""), name)
        for name, sheet in sheets(report).items()
    }
    body = [
        f"<h1>{escape(report.run)}</h1>",
        f'<p class="lead">{escape(headline(report))}</p>',
        f"<p>{escape(sums(report))}</p>",
        _cards(report),
        '<div class="grid">',
        *_charts(report),
        f'<div class="stack">{tables["phases"]}{tables.get("groups", "")}</div>',
        f'<div class="stack">{tables.get("units", "")}{tables.get("storage", "")}</div>',
        tables["segments"],
        tables["origins"],
        "</div>",
        _footer(now),
    ]
    return _document(f"Cost of {report.run}", body)


def of_sheets(sheets: Sequence[Sheet], now: float) -> str:
    """A page of tables about several runs."""
    body = ["<h1>Costs of runs</h1>", *(_section(sheet.title, _table(sheet)) for sheet in sheets if sheet.rows)]
    return _document("Costs of runs", [*body, _footer(now)])


def _footer(now: float) -> str:
    return (
        f"<footer>Written {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC. All amounts are in US dollars; ? "
        "means unknown. Times are UTC.</footer>"
    )


def _document(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE.read_text(encoding='utf-8')}{phases.css()}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _cards(report: CostReport) -> str:
    of, phases = report.units, {line.name: line for line in report.phases}
    cards = [("total", "$" + money(report, report.total))]
    if "train_kept" in phases:
        for name in ("train_kept", "train_lost"):
            line = phases[name]
            cards.append((f"{label(name)}, {100 * line.share:.1f} %", f"${money(report, line)}"))
        cards.append(("per billion tokens", "$" + figures.dollars(of.usd_per_billion_tokens)))
        cards.append(("goodput", "?" if of.goodput is None else f"{100 * of.goodput:.1f} %"))
        cards.append(("validation loss", "?" if of.val_loss is None else f"{of.val_loss:.4f}"))
        cards += [(name.partition(",")[0], value) for name, value in hellaswag_rows(of)[:1]]
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in cards)
        + "</div>"
    )


def _charts(report: CostReport) -> Iterable[str]:
    curves = report.curves
    if curves.spend_time and curves.spend_usd:
        yield _section("Dollars over time", charts.all_widths(charts.spend_over_time, report) + _legend(report))
        yield _section("Dollars by phase", charts.all_widths(charts.waterfall, report))
    if curves.loss or curves.val_loss:
        legend = _key([("s-train", "train loss"), ("s-val", "validation loss")])
        yield _section("Loss against dollars", charts.all_widths(charts.loss_over_dollars, report) + legend)
    if any(value is not None for value in curves.tokens_per_second):
        legend = _key([("gone", "end of a machine")]) if curves.losses_of_machines else ""
        yield _section("Speed", charts.all_widths(charts.speed_over_time, report) + legend)


def _legend(report: CostReport) -> str:
    """A legend of the stack's phases from top to bottom, with their dollars."""
    items = []
    usd = {line.name: line.usd or 0.0 for line in report.phases}
    drawn = charts.stacked(report)
    usd["other"] = sum(amount for name, amount in usd.items() if name not in drawn)
    for name in reversed(drawn):
        swatch = (
            f'<svg viewBox="0 0 10 10"><rect class="area {colour_class(name)}" width="10" height="10" rx="2"/></svg>'
        )
        items.append(f"<li>{swatch}{escape(label(name))} ${figures.dollars(usd[name], report.places)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _key(lines: Iterable[tuple[str, str]]) -> str:
    items = (
        f'<li><svg viewBox="0 0 10 10"><line class="line {escape(css)}" x1="0" x2="10" y1="5" y2="5"/></svg>'
        f"{escape(text)}</li>"
        for css, text in lines
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _section(title: str, content: str, css: str = "") -> str:
    return f'<section class="{escape(css)}"><h2>{escape(title)}</h2>{content}</section>'


def _table(sheet: Sheet) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="{"wrap" if column < sheet.words else "n"}">{escape(text)}</{tag}>'
            for column, text in enumerate(row)
        )

    head = f"<thead><tr>{cells('th', sheet.heads)}</tr></thead>" if any(sheet.heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in sheet.rows)
    foot = f"<tfoot><tr>{cells('td', sheet.foot)}</tr></tfoot>" if sheet.foot else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody>{foot}</table></div>'


def _notes(report: CostReport) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes(report))
    return f'<ul class="notes">{items}</ul>' if items else ""
