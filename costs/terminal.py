"""A report as tables on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from costs import money
from costs.breakdown import Line, Report
from costs.wording import clock, headline, label, steps, unit_rows


def render(report: Report) -> RenderableType:
    return Group(
        Text(f"{report.run}", style="bold"),
        Text(headline(report)),
        _phases(report),
        _segments(report),
        _groups(report),
        _units(report),
        _origins(report),
        *(Text(f"note: {note}", style="yellow") for note in report.notes),
    )


def show(report: Report) -> None:
    console = Console(highlight=False)
    # Without a terminal there is no width to respect: a log or a pipe gets every column in full.
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(render(report))


def _phases(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, show_footer=True)
    complete = report.total.complete
    table.add_column("phase", footer="total")
    table.add_column("time", justify="right", footer=money.duration(report.total.seconds))
    table.add_column("USD", justify="right", footer=money.text(report.total.usd, report.places, complete))
    table.add_column("share" if complete else "share of time", justify="right", footer="100.0 %")
    for line in report.phases:
        style = {"train_lost": "red", "train_kept": "green"}.get(line.name, "dim" if not line.seconds else "")
        table.add_row(label(line.name), money.duration(line.seconds), *_money(report, line), style=style)
    return table


def _segments(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("segment", "started (UTC)", "machine", "ended"):
        table.add_column(heading)
    for heading in ("USD/h", "time", "USD", "share", "steps", "steps lost"):
        table.add_column(heading, justify="right")
    for line in report.segments:
        table.add_row(
            line.name,
            clock(line.started_at),
            line.machine,
            line.end,
            money.text(line.usd_per_hour),
            money.duration(line.seconds),
            *_money(report, line),
            steps(line),
            str(line.steps_lost),
        )
    return table


def _groups(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("by", ""):
        table.add_column(heading)
    for heading in ("time", "USD", "share"):
        table.add_column(heading, justify="right")
    for group, lines in report.by.items():
        # A group of one line says what the total says; what is not known at all says nothing.
        if len(lines) > 1 or (lines and lines[0].name != "?" and group not in ("stage", "day")):
            for index, line in enumerate(lines):
                table.add_row(
                    group if not index else "", line.name, money.duration(line.seconds), *_money(report, line)
                )
    return table


def _origins(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("figure")
    table.add_column("from")
    for origin in report.origins:
        table.add_row(origin.figure, origin.source)
    return table


def _units(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for row in unit_rows(report):
        table.add_row(*row)
    return table


def _money(report: Report, line: Line) -> tuple[str, str]:
    return money.text(line.usd, report.places, line.complete), f"{100 * line.share:.1f} %"
