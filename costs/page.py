"""Renders a report as one HTML page without scripts and references to other files."""

import itertools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from urllib.parse import urlencode

from core import figures
from core.run import phases
from core.run.phases import colour_class, label
from costs import charts, compare
from costs.about import waits
from costs.report import CostReport
from costs.tables import Sheet, sheets
from costs.top import top

# The browser runs no script and loads no other file. So text that was escaped wrongly does no harm.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("page.css")


def as_html(report: CostReport, now: float) -> str:
    return document(f"Cost of {report.run}", of_run(report), after=footer(now))


def of_run(report: CostReport) -> list[str]:
    """The parts of a run's page."""
    tables = {name: section(sheet.title, table(sheet), name) for name, sheet in sheets(report).items()}
    return [
        top(report),
        '<div class="grid">',
        *_charts(report),
        f'<div class="stack">{tables["phases"]}{tables.get("groups", "")}</div>',
        f'<div class="stack">{tables.get("forecast", "")}{tables.get("units", "")}{tables.get("storage", "")}</div>',
        tables["segments"],
        tables["origins"],
        "</div>",
    ]


def of_comparison(reports: Sequence[CostReport]) -> list[str]:
    """The parts of a page that shows several runs side by side."""
    sheet = compare.comparison(reports)
    found = ["<h1>Comparison</h1>", f'<p class="lead">{escape(", ".join(report.run for report in reports))}</p>']
    if all(charts.losses(report) for report in reports):
        names = compare.names(reports)
        key = _key([(f"c-{number}", name) for number, name in enumerate(names)])
        drawn = charts.all_widths(charts.losses_compared, reports, charts.FULL_WIDTHS)
        found.append(section("Loss against dollars", drawn + key, "machines"))
    return [*found, section(sheet.title, table(sheet))]


def comparison_as_html(reports: Sequence[CostReport], now: float) -> str:
    return document("Comparison of runs", of_comparison(reports), after=footer(now))


def overview_as_html(reports: Sequence[CostReport], now: float) -> str:
    """A page of tables about several runs."""
    sheets = [compare.overview(reports), compare.overview_groups(reports)]
    body = ["<h1>Costs of runs</h1>", *(section(sheet.title, table(sheet)) for sheet in sheets if sheet.rows)]
    return document("Costs of runs", body, after=footer(now))


def footer(now: float, more: str = "") -> str:
    """The last line of a page. `more` is HTML at the beginning of this line."""
    return (
        f"<footer>{more}Written {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC. All amounts are in US dollars; "
        "? means unknown. Times are UTC.</footer>"
    )


def document(title: str, body: Sequence[str], policy: str = POLICY, root: str = "", after: str = "") -> str:
    """A page. `policy` is its content security policy, `root` holds attributes of <html>, `after` follows `body`."""
    return (
        f'<!doctype html>\n<html lang="en" {root}><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE.read_text(encoding='utf-8')}{phases.css()}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>{after}</body></html>\n"
    )


def _charts(report: CostReport) -> Iterable[str]:
    curves = report.curves
    if curves.machines:
        legend = _legend_of_machines(report)
        yield section("Machines", charts.all_widths(charts.machines, report, charts.FULL_WIDTHS) + legend, "machines")
    if curves.spend_time and curves.spend_usd:
        yield section("Dollars over time", charts.all_widths(charts.spend_over_time, report) + _legend(report))
        yield section("Dollars by phase", charts.all_widths(charts.waterfall, report))
    if curves.loss or curves.val_loss:
        legend = _key([("s-train", "train loss"), ("s-val", "validation loss")])
        yield section("Loss against dollars", charts.all_widths(charts.loss_over_dollars, report) + legend)
    if any(value is not None for value in curves.tokens_per_second):
        legend = _key([("gone", "end of a machine")]) if curves.losses_of_machines else ""
        yield section("Speed", charts.all_widths(charts.speed_over_time, report) + legend)


def _legend(report: CostReport) -> str:
    """A legend of the chart of dollars over time: the phases from top to bottom, with their dollars."""
    items = []
    usd = {line.name: line.usd or 0.0 for line in report.phases}
    drawn = charts.stacked(report)
    usd["other"] = sum(amount for name, amount in usd.items() if name not in drawn)
    for name in reversed(drawn):
        items.append(_swatch(name, f"{label(name)} ${figures.dollars(usd[name], report.places)}"))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _legend_of_machines(report: CostReport) -> str:
    """A legend of the chart of machines: the phases, and the time in which the run had no machine."""
    shown = {each.phase for each in report.curves.machines}
    items = [_swatch(name, label(name)) for name in (line.name for line in report.phases) if name in shown]
    if found := waits(report.curves.machines):
        waited = figures.duration(sum(end - start for start, end in found))
        items.append(
            '<li><svg viewBox="0 0 10 10"><line class="line wait" x1="0" x2="10" y1="5" y2="5"/></svg>'
            f"no machine, nothing paid: {waited}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _swatch(name: str, text: str) -> str:
    css = colour_class(name)
    square = f'<rect class="area {css}" width="10" height="10" rx="2"/>'
    return f'<li><svg viewBox="0 0 10 10">{square}</svg>{escape(text)}</li>'


def _key(lines: Iterable[tuple[str, str]]) -> str:
    items = (
        f'<li><svg viewBox="0 0 10 10"><line class="line {escape(css)}" x1="0" x2="10" y1="5" y2="5"/></svg>'
        f"{escape(text)}</li>"
        for css, text in lines
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def section(title: str, content: str, css: str = "") -> str:
    return f'<section class="{escape(css)}"><h2>{escape(title)}</h2>{content}</section>'


def table(sheet: Sheet, runs: Sequence[str] = ()) -> str:
    """The table of a sheet. `runs` may hold the URL of a run for each row.

    If it does, the first cell of a row has a link to the page of the run, and a box that selects the run.
    """

    def cells(tag: str, row: Sequence[str], run: str = "") -> str:
        found = []
        for column, text in enumerate(row):
            inside = _linked(text, run) if run and not column else escape(text)
            inside = inside.replace(" to ", " to <wbr>")  # a phone may break the line inside a range
            css = "wrap" if column < sheet.words else "n"
            spare = " spare" if sheet.heads[column] in sheet.spare else ""
            found.append(f'<{tag} class="{css}{spare}">{inside}</{tag}>')
        return "".join(found)

    head = f"<thead><tr>{cells('th', sheet.heads)}</tr></thead>" if any(sheet.heads) else ""
    rows = itertools.zip_longest(sheet.rows, runs, fillvalue="")
    body = "".join(f"<tr>{cells('td', row, run)}</tr>" for row, run in rows)
    foot = f"<tfoot><tr>{cells('td', sheet.foot)}</tr></tfoot>" if sheet.foot else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody>{foot}</table></div>'


def _linked(text: str, run: str) -> str:
    """A box that selects a run for a comparison, and the link to the run's page."""
    box = f'<input type="checkbox" name="run" value="{escape(run)}" aria-label="compare {escape(text)}">'
    return f'<span class="pick">{box} <a href="/run?{escape(urlencode({"run": run}))}">{escape(text)}</a></span>'
