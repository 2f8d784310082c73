"""A report as tables on the terminal."""

from datetime import UTC, datetime

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.console import quantity
from costs import money
from costs.breakdown import Line, Report


def label(name: str) -> str:
    return name.replace("_", " ")


def render(report: Report) -> RenderableType:
    return Group(
        Text(f"{report.run}", style="bold"),
        Text(f"{report.stage or 'stage ?'}, {report.state}; {_span(report)}"),
        _phases(report),
        _segments(report),
        _units(report),
        *(Text(f"note: {note}", style="yellow") for note in report.notes),
    )


def show(report: Report) -> None:
    console = Console(highlight=False)
    # Without a terminal there is no width to respect: a log or a pipe gets every column in full.
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(render(report))


def _span(report: Report) -> str:
    count = len(report.segments)
    dollars = "$" + money.text(report.total.usd, report.places, report.total.complete)
    return f"{count} segment{'s' * (count != 1)}, {money.duration(report.total.seconds)} of machine time, {dollars}"


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
        started = (
            "?" if line.started_at is None else f"{datetime.fromtimestamp(line.started_at, UTC):%Y-%m-%d %H:%M:%S}"
        )
        first = "?" if line.restored_step is None else str(line.restored_step)
        last = first if line.last_step is None else str(line.last_step)
        table.add_row(
            line.name,
            started,
            line.machine,
            line.end,
            money.text(line.usd_per_hour),
            money.duration(line.seconds),
            *_money(report, line),
            f"{first} → {last}",
            str(line.steps_lost),
        )
    return table


def _units(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("last step", "?" if report.last_step is None else f"{report.last_step:,}")
    table.add_row("tokens", "?" if report.tokens is None else f"{quantity(report.tokens)} ({report.tokens:,.0f})")
    table.add_row("USD per billion tokens", money.text(report.usd_per_billion_tokens))
    for name, loss in (("train", report.train_loss), ("validation", report.val_loss)):
        table.add_row(f"final {name} loss", "?" if loss is None else f"{loss:.4f}")
    return table


def _money(report: Report, line: Line) -> tuple[str, str]:
    return money.text(line.usd, report.places, line.complete), f"{100 * line.share:.1f} %"
