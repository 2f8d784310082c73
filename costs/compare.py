"""Puts several runs into tables: an overview, sums over all runs, and a comparison with one column per run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core import figures
from core.run.phases import label
from costs.report import CostReport, Line
from costs.tables import Sheet, clock, last_seen, loss, money, unit_rows


def newest_first(reports: Sequence[CostReport]) -> list[CostReport]:
    return sorted(reports, key=last_seen, reverse=True)


def names(reports: Sequence[CostReport]) -> list[str]:
    """The runs' short names. If two short names are equal, the whole URLs of all runs."""
    short = [report.run.rstrip("/").rsplit("/", 1)[-1] for report in reports]
    return short if len(set(short)) == len(short) else [report.run for report in reports]


def overview(reports: Sequence[CostReport]) -> Sheet:
    """A table with one row per run, the newest first."""
    heads = ["run", "stage", "state", "last seen", "time", "USD", "lost", "tokens", "val loss", "USD/1B tokens"]
    rows, above = [], _folder_of([report.run for report in reports])
    for report in newest_first(reports):
        lost = next((line for line in report.phases if line.name == "train_lost"), None)
        usd = money(report, report.total)
        time, part = figures.duration(report.total.seconds), f"{100 * lost.share:.1f} %" if lost else "–"
        about = [report.run.removeprefix(above), report.stage or "?", report.state, clock(last_seen(report) or None)]
        rows.append([*about, time, usd, part, *_trained(report)])
    priced = [report.total.usd for report in reports if report.total.usd is not None]
    complete = all(report.total.complete for report in reports)
    most = math.fsum(report.total.usd_most or 0.0 for report in reports)
    total = figures.dollars(math.fsum(priced) if priced else None, 2, complete, most)
    foot = [f"{len(reports)} run{'s' * (len(reports) != 1)}", "", "", "", "", total, "", "", "", ""]
    spare = ("USD/1B tokens", "stage", "lost", "tokens", "time", "val loss", "last seen")
    return Sheet(f"Runs below {above}" if above else "Runs", heads, rows, 4, foot, spare)


def overview_groups(reports: Sequence[CostReport]) -> Sheet:
    """Sums over all runs by stage, day, place and machine. Each is a sum of figures that the runs' reports print."""
    rows: list[list[str]] = []
    for group in reports[0].by:
        names: dict[str, list[Line]] = {}
        for report in reports:
            for line in report.by[group]:
                names.setdefault(line.name, []).append(line)
        for index, (name, lines) in enumerate(sorted(names.items()) if len(names) > 1 else ()):
            known = [line.usd for line in lines if line.usd is not None]
            most = math.fsum(line.usd_most or 0.0 for line in lines)
            complete = all(line.complete for line in lines)
            usd = figures.dollars(math.fsum(known) if known else None, 2, complete, most)
            seconds = sum(line.seconds for line in lines)
            rows.append([group if not index else "", name, figures.duration(seconds), usd])
    return Sheet("All runs by stage, day, place and machine", ["by", "", "time", "USD"], rows, 2)


@dataclass(frozen=True)
class Value:
    """A cell of a comparison. `number` is None for a cell that has no difference, such as a text.

    `complete` is false if a part of the number is unknown.
    """

    text: str
    number: float | None = None
    form: Callable[[float], str] = "{:+,.2f}".format
    complete: bool = True


def comparison(reports: Sequence[CostReport]) -> Sheet:
    """A table with a column per run. Each run but the first has another column with the difference to the first run."""
    level = _equal_loss(reports)
    columns = [_column(report, level) for report in reports]
    order = list(dict.fromkeys(name for column in columns for name in column))
    first, *others = names(reports)
    heads = ["", first]
    for name in others:
        heads += [name, f"− {first}"]
    rows = []
    for name in order:
        first, *others = [column.get(name, Value("–")) for column in columns]
        row = [name, first.text]
        for other in others:
            row += [other.text, _difference(first, other)]
        rows.append(row)
    return Sheet("Comparison", heads, rows, 1)


def _difference(first: Value, other: Value) -> str:
    if first.number is None or other.number is None:
        return ""
    return other.form(other.number - first.number) + ("" if first.complete and other.complete else " + ?")


def _equal_loss(reports: Sequence[CostReport]) -> float | None:
    """The lowest validation loss that all runs reached.

    None if a run has no validation loss, or has time without a price.
    """
    if not all(report.curves.val_loss for report in reports):
        return None
    return max(min(report.curves.val_loss) for report in reports)


def _column(report: CostReport, level: float | None) -> dict[str, Value]:
    def usd(text: str, value: float | None, complete: bool = True) -> Value:
        return Value(text, value, f"{{:+,.{report.places}f}}".format, complete)

    total = report.total
    found = {
        "state": Value(report.state),
        "USD total": usd(money(report, total), total.usd, total.complete),
        "time": Value(figures.duration(total.seconds), total.seconds, _signed_duration),
        "segments": Value(str(len(report.segments)), len(report.segments), "{:+,.0f}".format),
    }
    for line in report.phases:
        text = f"{money(report, line)} ({100 * line.share:.1f} %)"
        found[f"USD {label(line.name)}"] = usd(text, line.usd, line.complete)
    of = report.units
    numbers = {
        "final train loss": (of.train_loss, "{:+.4f}"),
        "final validation loss": (of.val_loss, "{:+.4f}"),
        "USD per billion tokens": (of.usd_per_billion_tokens, "{:+,.2f}"),
        "USD per 1e18 FLOPs": (of.usd_per_exaflop, "{:+.4f}"),
        "USD per GPU-hour": (of.usd_per_gpu_hour, "{:+,.2f}"),
        "GPU-hours": (of.gpu_hours, "{:+,.2f}"),
        "tokens": (of.tokens, "{:+,.0f}"),
        "last step": (of.last_step, "{:+,.0f}"),
    }
    for name, text in unit_rows(report, levels=False):
        number, form = numbers.get(name, (None, "{}"))
        found[name] = Value(text, number, form.format)
    if level is not None:
        reached = next(
            usd for usd, loss in zip(report.curves.val_usd, report.curves.val_loss, strict=True) if loss <= level
        )
        name = f"USD to validation loss {level:.4f}, which all runs reached"
        found[name] = usd(figures.dollars(reached, report.places), reached)
    return found


def _signed_duration(seconds: float) -> str:
    return ("−" if seconds < 0 else "+") + figures.duration(abs(seconds))


def _folder_of(urls: Sequence[str]) -> str:
    """The common folder of all runs, with a slash at the end. "" for a single run, or if there is no common folder."""
    above = [url.split("/")[:-1] for url in urls]
    common = []
    for parts in zip(*above, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "/".join(common) + "/" if len(urls) > 1 and any(common) else ""


def _trained(report: CostReport) -> tuple[str, str, str]:
    of = report.units
    if of.tokens is None:
        return "–", "–", "–"
    return f"{of.tokens:,.0f}", loss(of.val_loss), figures.dollars(of.usd_per_billion_tokens)
