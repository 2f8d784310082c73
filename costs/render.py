"""Renders a report for the terminal, as Markdown, JSON and CSV."""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.output import FORMULA, visible
from costs.focus import charges
from costs.report import CostReport
from costs.tables import Sheet, headline, notes, sheets, sums

STYLES = {"train lost": "red", "train kept": "green"}


def render(report: CostReport, width: int | None = None) -> RenderableType:
    """All tables of a report, for a terminal of `width` columns."""
    return Group(
        Text(visible(report.run), style="bold"),
        Text(visible(headline(report))),
        Text(visible(sums(report)), style="dim"),
        *(terminal_table(sheet, width) for sheet in sheets(report).values()),
        *(Text(visible(f"note: {note}"), style="yellow") for note in notes(report)),
    )


def terminal_table(sheet: Sheet, width: int | None = None) -> Table:
    """The table of a sheet. If the table is wider than `width`, the sheet's spare columns are left out."""
    sheet = _narrowed(sheet, width) if width else sheet
    found = Table(
        box=SIMPLE_HEAD, title=sheet.title, title_justify="left", title_style="bold",
        show_header=any(sheet.heads), show_footer=bool(sheet.foot),
    )  # fmt: skip
    widths = _widths(sheet, width) if width else [None] * len(sheet.heads)
    for column, head in enumerate(sheet.heads):
        foot = sheet.foot[column] if sheet.foot else ""
        justify = "left" if column < sheet.words else "right"
        found.add_column(
            Text(visible(head)), Text(visible(foot)), justify=justify, overflow="fold", width=widths[column]
        )
    for row in sheet.rows:
        found.add_row(*(Text(visible(cell)) for cell in row), style=STYLES.get(row[0], ""))
    return found


def _narrowed(sheet: Sheet, width: int) -> Sheet:
    """The sheet without the spare columns that do not fit. The sheet's title names the missing columns."""
    left_out = []
    for head in sheet.spare:
        if _least_width(sheet) <= width or head not in sheet.heads:
            continue
        at = list(sheet.heads).index(head)
        left_out.append(head)
        sheet = replace(
            sheet,
            heads=_without(sheet.heads, at),
            rows=[_without(row, at) for row in sheet.rows],
            foot=_without(sheet.foot, at),
            words=sheet.words - (at < sheet.words),
        )
    if left_out:
        sheet = replace(sheet, title=f"{sheet.title} (a wider terminal adds {', '.join(left_out)})")
    return sheet


def _without(row: Sequence[str], at: int) -> list[str]:
    return [cell for place, cell in enumerate(row) if place != at]


def _least_width(sheet: Sheet) -> int:
    return _whole(_least(sheet))


def _widths(sheet: Sheet, width: int) -> list[int] | list[None]:
    """The width of each column, so that the table fits and no word is broken. None if its text fits on one line each.

    rich would narrow the widest column first, even within a word.
    """
    full = [max(map(len, cells), default=0) for cells in _columns(sheet)]
    widths = _least(sheet)
    if _whole(full) <= width or _whole(widths) > width:
        return [None] * len(widths)
    for _ in range(width - _whole(widths)):
        # The column that lacks most of its text gets the next character.
        at = max(range(len(full)), key=lambda each: full[each] - widths[each])
        widths[at] += 1
    return widths


def _whole(widths: Sequence[int]) -> int:
    """The width of a table, in which each column takes three characters more than its text."""
    return 1 + sum(width + 3 for width in widths)


def _least(sheet: Sheet) -> list[int]:
    """The width of each column at which no word and no number is broken."""
    return [
        max((len(word) for cell in cells for word in (cell.split() if column < sheet.words else [cell])), default=0)
        for column, cells in enumerate(_columns(sheet))
    ]


def _columns(sheet: Sheet) -> list[list[str]]:
    rows = [row for row in (sheet.heads, *sheet.rows, sheet.foot) if row]
    return [[row[column] for row in rows] for column in range(len(sheet.heads))]


def console() -> Console:
    """A console as wide as the terminal or as COLUMNS. In a file or a pipe without COLUMNS, all columns have room."""
    found = Console(highlight=False)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=180)


def as_markdown(report: CostReport) -> str:
    parts = [f"## Cost of {_plain(report.run)}", _plain(headline(report)), _plain(sums(report))]
    for sheet in sheets(report).values():
        parts += [f"### {sheet.title}", markdown_table(sheet)]
    if report.notes:
        parts.append("\n".join(f"- {_plain(note)}" for note in notes(report)))
    return "\n\n".join(parts) + "\n"


def markdown_table(sheet: Sheet) -> str:
    rule = ["---" if column < sheet.words else "---:" for column in range(len(sheet.heads))]
    foot = [[f"**{_plain(cell)}**" if cell else "" for cell in sheet.foot]] if sheet.foot else []
    heads, *rows = [[_plain(cell) for cell in row] for row in [sheet.heads, *sheet.rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows, *foot])


def _plain(text: str) -> str:
    """`text` with Markdown's special characters escaped."""
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return visible(" ".join(text.split()))


FORMAT = "cost-report"
VERSION = 2


def document(report: CostReport) -> dict[str, Any]:
    """A report as nested plain values. Unknown figures are None; dollars are rounded as printed."""
    plain = asdict(report)
    del plain["curves"], plain["charges"]  # the points of charts and the rows of --csv are left out
    return {"format": FORMAT, "version": VERSION, "currency": "USD"} | plain


def as_json(reports: Sequence[CostReport]) -> str:
    """One report as a JSON object. Several reports become a JSON list of objects."""
    documents = [document(report) for report in reports]
    return json.dumps(documents[0] if len(documents) == 1 else documents, indent=1) + "\n"


def as_csv(reports: Sequence[CostReport]) -> str:
    """One row for each charge of all runs, not rounded (costs.focus).

    An unknown cost is printed as `?`, not as zero.
    """
    table = [row for report in reports for row in charges(report)]
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in table for key in row))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in table:
        writer.writerow(_field(column, row[column]) for column in columns)
    return out.getvalue()


def _field(column: str, value: Any) -> Any:
    if value is None:
        return "?" if "Cost" in column else ""
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"  # a spreadsheet shows a value that begins with ' as text, and runs no formula in it
    return value
