"""Tables as Markdown, for an issue or a log book."""

from costs.breakdown import Report
from costs.sheets import Sheet, sheets
from costs.wording import headline, notes


def as_markdown(report: Report) -> str:
    parts = [f"## Cost of {_plain(report.run)}", _plain(headline(report))]
    for sheet in sheets(report).values():
        parts += [f"### {sheet.title}", table(sheet)]
    if report.notes:
        parts.append("\n".join(f"- {_plain(note)}" for note in notes(report)))
    return "\n\n".join(parts) + "\n"


def table(sheet: Sheet) -> str:
    rule = ["---" if column < sheet.words else "---:" for column in range(len(sheet.heads))]
    foot = [[f"**{cell}**" if cell else "" for cell in sheet.foot]] if sheet.foot else []
    rows = [[_plain(cell) for cell in row] for row in sheet.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(sheet.heads), rule, *rows, *foot])


def _plain(text: str) -> str:
    """What would end a cell or start markup is escaped."""
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
