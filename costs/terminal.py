"""Tables on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from costs.breakdown import Report
from costs.sheets import Sheet, sheets
from costs.wording import headline, notes

STYLES = {"train lost": "red", "train kept": "green"}


def render(report: Report) -> RenderableType:
    return Group(
        Text(report.run, style="bold"),
        Text(headline(report)),
        *(table(sheet) for sheet in sheets(report).values()),
        *(Text(f"note: {note}", style="yellow") for note in notes(report)),
    )


def table(sheet: Sheet) -> Table:
    found = Table(
        box=SIMPLE_HEAD, title=sheet.title, title_justify="left", title_style="bold",
        show_header=any(sheet.heads), show_footer=bool(sheet.foot),
    )  # fmt: skip
    for column, head in enumerate(sheet.heads):
        foot = sheet.foot[column] if sheet.foot else ""
        found.add_column(head, foot, justify="left" if column < sheet.words else "right", overflow="fold")
    for row in sheet.rows:
        found.add_row(*(Text(cell) for cell in row), style=STYLES.get(row[0], ""))
    return found


def console() -> Console:
    """Without a terminal there is no width to respect: a log or a pipe gets every column in full."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=180)
