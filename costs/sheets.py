"""A report as tables of text, the same for terminal, Markdown and page: one wording, one rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.run.phases import label
from costs import money
from costs.breakdown import Line, Report
from costs.wording import clock, loss, steps, storage_rows, unit_rows

# Of more segments the first and the last ones; nobody reads a thousand rows.
SEGMENTS_SHOWN = 40


@dataclass(frozen=True)
class Sheet:
    """The first `words` columns are text, the others numbers. `foot` is a last row that stands out."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int
    foot: Sequence[str] = ()


def sheets(report: Report) -> dict[str, Sheet]:
    """All tables of a report that have something to say, by name, in reading order."""
    units, storage = unit_rows(report), storage_rows(report)
    groups = [
        [group if not index else "", line.name, *_figures(report, line)]
        for group, lines in report.by.items()
        if len(lines) > 1  # a group of one line says what the total says
        for index, line in enumerate(lines)
    ]
    found = {
        "phases": _phases(report),
        "segments": _segments(report),
        "groups": Sheet("By stage, day, place and machine", ["by", "", "time", "USD", _share(report)], groups, 2),
        "units": Sheet("Unit costs", ["", ""], units, 1),
        "storage": Sheet("Storage: rates, not in the total", ["what", "amount", "rate"], storage, 1),
        "origins": Sheet(
            "Where the figures are from", ["figure", "from"], [(o.figure, o.source) for o in report.origins], 2
        ),
    }
    return {name: sheet for name, sheet in found.items() if sheet.rows}


def overview(reports: Sequence[Report]) -> Sheet:
    """One row per run, the newest first."""
    heads = ["run", "stage", "state", "last seen", "time", "USD", "lost", "tokens", "val loss", "USD/1B tokens"]
    rows = []
    for report in sorted(reports, key=last_seen, reverse=True):
        lost = next((line for line in report.phases if line.name == "train_lost"), None)
        usd = money.text(report.total.usd, report.places, report.total.complete)
        time, part = money.duration(report.total.seconds), f"{100 * lost.share:.1f} %" if lost else "–"
        about = [report.run, report.stage or "?", report.state, clock(last_seen(report) or None)]
        rows.append([*about, time, usd, part, *_trained(report)])
    priced = [report.total.usd for report in reports if report.total.usd is not None]
    complete = all(report.total.complete for report in reports)
    total = money.text(sum(priced) if priced else None, 2, complete)
    foot = [f"{len(reports)} run{'s' * (len(reports) != 1)}", "", "", "", "", total, "", "", "", ""]
    return Sheet("Runs", heads, rows, 4, foot)


def overview_groups(reports: Sequence[Report]) -> Sheet:
    """All runs together by stage, day, place and machine; what the runs print adds up to it."""
    rows: list[list[str]] = []
    for group in reports[0].by:
        names: dict[str, list[Line]] = {}
        for report in reports:
            for line in report.by[group]:
                names.setdefault(line.name, []).append(line)
        for index, (name, lines) in enumerate(sorted(names.items()) if len(names) > 1 else ()):
            known = [line.usd for line in lines if line.usd is not None]
            usd = money.text(sum(known) if known else None, 2, all(line.complete for line in lines))
            seconds = sum(line.seconds for line in lines)
            rows.append([group if not index else "", name, money.duration(seconds), usd])
    return Sheet("All of them by stage, day, place and machine", ["by", "", "time", "USD"], rows, 2)


def comparison(reports: Sequence[Report]) -> Sheet:
    """Runs side by side: a column per run, a row per phase and unit cost."""
    names = [report.run.rstrip("/").rsplit("/", 1)[-1] for report in reports]
    heads = ["", *(names if len(set(names)) == len(names) else [report.run for report in reports])]
    columns = [_column(report) for report in reports]
    order = list(dict.fromkeys(name for column in columns for name in column))
    return Sheet("Comparison", heads, [[name, *(column.get(name, "–") for column in columns)] for name in order], 1)


def last_seen(report: Report) -> float:
    return max((line.ended_at for line in report.segments if line.ended_at is not None), default=0.0)


def _column(report: Report) -> dict[str, str]:
    column = {"state": report.state, "USD total": money.text(report.total.usd, report.places, report.total.complete)}
    column |= {"time": money.duration(report.total.seconds), "segments": str(len(report.segments))}
    for line in report.phases:
        usd = money.text(line.usd, report.places, line.complete)
        column[f"USD {label(line.name)}"] = f"{usd} ({100 * line.share:.1f} %)"
    return column | {name: value for name, value in unit_rows(report, levels=False)}


def _phases(report: Report) -> Sheet:
    rows = [[label(line.name), *_figures(report, line)] for line in report.phases]
    heads = ["phase", "time", "USD", _share(report)]
    return Sheet("Phases", heads, rows, 1, ["total", *_figures(report, report.total)])


def _segments(report: Report) -> Sheet:
    heads = [
        "segment",
        "started (UTC)",
        "machine",
        "ended",
        "USD/h",
        "time",
        "USD",
        _share(report),
        "steps",
        "steps lost",
    ]
    rows = []
    left = len(report.segments) - SEGMENTS_SHOWN
    for index, line in enumerate(report.segments):
        if left > 0 and SEGMENTS_SHOWN // 2 <= index < SEGMENTS_SHOWN // 2 + left:
            if index == SEGMENTS_SHOWN // 2:
                rows.append(["…", "", f"{left:,} more: --json has all", *[""] * (len(heads) - 3)])
            continue
        about = [line.name, clock(line.started_at), line.machine, line.end, money.text(line.usd_per_hour)]
        rows.append([*about, *_figures(report, line), steps(line), str(line.steps_lost)])
    return Sheet("Segments", heads, rows, 4)


def _trained(report: Report) -> tuple[str, str, str]:
    of = report.units
    if of.tokens is None:
        return "–", "–", "–"
    return f"{of.tokens:,.0f}", loss(of.val_loss), money.text(of.usd_per_billion_tokens)


def _figures(report: Report, line: Line) -> tuple[str, str, str]:
    usd = money.text(line.usd, report.places, line.complete)
    return money.duration(line.seconds), usd, f"{100 * line.share:.1f} %"


def _share(report: Report) -> str:
    return "share" if report.total.complete else "share of time"
