"""A report as JSON, CSV or rows for a DataFrame: the figures of the terminal, unformatted."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from costs.breakdown import Line, Report

FORMAT = "cost-report"
VERSION = 1


def document(report: Report) -> dict[str, Any]:
    """Plain nested values. A figure that is not known is None; dollars are rounded as printed."""
    plain = asdict(report)
    del plain["charts"]  # many points, for drawing; costs.charts gives them to a notebook
    return {"format": FORMAT, "version": VERSION, "currency": "USD"} | plain


def as_json(reports: Sequence[Report]) -> str:
    """One document, or a list of them for several runs."""
    documents = [document(report) for report in reports]
    return json.dumps(documents[0] if len(documents) == 1 else documents, indent=1) + "\n"


def rows(report: Report) -> list[dict[str, Any]]:
    """One dict per line of every table, with the same keys: `pandas.DataFrame(rows(report))`."""
    tables: list[tuple[str, list[Line]]] = [("total", [report.total]), ("phase", report.phases)]
    tables += [("segment", list(report.segments)), *report.by.items()]
    columns = [field.name for field in fields(Line)]
    found = [
        {"run": report.run, "table": table} | {column: getattr(line, column) for column in columns}
        for table, lines in tables
        for line in lines
    ]
    unit = {"run": report.run, "table": "unit"} | dict.fromkeys(columns)
    for each in fields(report.units):
        if each.name != "usd_to_val_loss":
            found.append(unit | {"name": each.name, "value": getattr(report.units, each.name)})
    for level in report.units.usd_to_val_loss:
        found.append(unit | {"name": f"usd_to_val_loss_{level.val_loss:g}", "value": level.usd})
    return found


def as_csv(reports: Sequence[Report]) -> str:
    """`rows` of all runs as CSV. A figure that is not known is `?`, so that no reader takes it for zero."""
    table = [row for report in reports for row in rows(report)]
    out = io.StringIO()
    columns = [*dict.fromkeys(key for row in table for key in row)]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in table:
        writer.writerow(_field(row, column) for column in columns)
    return out.getvalue()


def _field(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        return ""
    value = row[column]
    if value is None:
        # The columns of the other kind of row are empty; a missing figure is "?".
        return "?" if column == "value" or (column == "usd" and row["table"] != "unit") else ""
    return f"{value:.6f}" if isinstance(value, float) and column in ("seconds", "share") else value
