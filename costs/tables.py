"""Turns a report into tables of text, which are the same on the terminal, in Markdown and on a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from core import figures
from core.figures import quantity
from core.run.model import AS_KNOWN, BY_LEDGER
from core.run.phases import label
from costs.model import StorageUse
from costs.report import CostReport, Line, SegmentLine
from costs.units import Units

RANGE = "a range, because no source knows when a machine's bill began or ended: an invoice has the exact amount"
# A longer table shows only its first and last segments.
SEGMENTS_SHOWN = 40


@dataclass(frozen=True)
class Sheet:
    """A table. Its first `words` columns hold text, and the other columns hold numbers.

    `foot` is an emphasized last row. On a narrow terminal, columns of `spare` are left out in the order of the list.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int
    foot: Sequence[str] = ()
    spare: Sequence[str] = ()


def sheets(report: CostReport) -> dict[str, Sheet]:
    """All non-empty tables of a report by name, in reading order."""
    units, storage = unit_rows(report), storage_rows(report)
    groups = [
        [group if not index else "", line.name, *_figures(report, line)]
        for group, lines in report.by.items()
        if len(lines) > 1  # a group with a single line is left out, because it equals the total
        for index, line in enumerate(lines)
    ]
    found = {
        "phases": _phases(report),
        "segments": _segments(report),
        "groups": Sheet("By stage, day, place and machine", ["by", "", "time", "USD", _share(report)], groups, 2),
        "forecast": _forecast(report),
        "units": Sheet("Unit costs", ["", ""], units, 1),
        "storage": Sheet("Storage from now on, at list prices", ["what", "amount", "rate"], storage, 1),
        "origins": Sheet(
            "Sources of the figures", ["figure", "from"], [(o.figure, o.source) for o in report.origins], 2
        ),
    }
    return {name: sheet for name, sheet in found.items() if sheet.rows}


def last_seen(report: CostReport) -> float:
    return max((line.ended_at for line in report.segments if line.ended_at is not None), default=0.0)


def _phases(report: CostReport) -> Sheet:
    rows = [[label(line.name), *_figures(report, line)] for line in report.phases]
    heads = ["phase", "time", "USD", _share(report)]
    return Sheet("Phases", heads, rows, 1, ["total", *_figures(report, report.total)])


def _forecast(report: CostReport) -> Sheet:
    """The forecast of the launch and the known dollars, side by side for each line."""

    def row(name: str, foreseen: float | None, actual: float) -> list[str]:
        difference = f"{100 * (actual / foreseen - 1):+.0f} %" if foreseen else ""
        return [name, figures.dollars(foreseen), figures.dollars(actual), difference]

    rows = [row(line.name, line.foreseen or 0.0, line.actual) for line in report.forecast]
    foot = row("total", report.foreseen.usd, sum(line.actual for line in report.forecast)) if rows else ()
    return Sheet("Forecast against actual", ["line", "forecast USD", "actual USD", "actual − forecast"], rows, 1, foot)


def _segments(report: CostReport) -> Sheet:
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
        about = [line.name, clock(line.started_at), line.machine, line.end, figures.dollars(line.usd_per_hour)]
        rows.append([*about, *_figures(report, line), steps(line), str(line.steps_lost)])
    return Sheet("Segments", heads, rows, 4, spare=("steps lost", _share(report), "USD/h", "machine", "time"))


def _figures(report: CostReport, line: Line) -> tuple[str, str, str]:
    usd = money(report, line)
    return figures.duration(line.seconds), usd, f"{100 * line.share:.1f} %"


def money(report: CostReport, line: Line) -> str:
    """The dollars of a line, as all tables print them."""
    return figures.dollars(line.usd, report.places, line.complete, line.usd_most)


def _share(report: CostReport) -> str:
    return "share" if report.has_prices else "share of time"


NOTES_SHOWN = 20


def clock(time: float | None) -> str:
    return "?" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"


def headline(report: CostReport) -> str:
    count = len(report.segments)
    segments = f"{count} segment{'s' * (count != 1)}"
    time = f"{figures.duration(report.total.seconds)} of machine time"
    return f"{report.stage or 'stage ?'}, {report.state}; {segments}, {time}, ${money(report, report.total)}"


def sums(report: CostReport) -> str:
    """Notes on the total.

    They say what the total includes, give the ledger's dollars, and name the sources that have not answered.
    """
    ledger = figures.dollars(report.ledger_usd, report.places)
    said = [f"${money(report, report.total)} is the bill {AS_KNOWN}; ${ledger} {BY_LEDGER}"]
    if report.total.usd_most is not None and report.total.usd_most > (report.total.usd or 0.0):
        said.append(RANGE)
    if (of := report.foreseen) is not None:
        between = "" if of.usd_low is None or of.usd_high is None else f", {of.usd_low:,.2f} to {of.usd_high:,.2f}"
        said.append(f"forecast ${figures.dollars(of.usd)} ({of.what}{between})")
    said += [f"not complete: {each}" for each in report.missing]
    return "; ".join(said)


def notes(report: CostReport) -> list[str]:
    """The first NOTES_SHOWN notes. The JSON form of the report contains all notes."""
    left = len(report.notes) - NOTES_SHOWN
    return report.notes[:NOTES_SHOWN] + ([f"{left} more notes: --json has all"] if left > 0 else [])


def steps(line: SegmentLine) -> str:
    first = "?" if line.restored_step is None else str(line.restored_step)
    return f"{first} → {first if line.last_step is None else line.last_step}"


def unit_rows(report: CostReport, levels: bool = True) -> list[tuple[str, str]]:
    """Name and value of each unit cost that applies to the run; unknown values are `?`."""
    of = report.units
    if of.tokens is None and not any(line.name == "train_kept" for line in report.phases):
        return []

    def usd(value: float | None, places: int = 2) -> str:
        return figures.dollars(value, places, complete=not report.missing)

    rows = [
        ("last step", _or(of.last_step, "{:,}")),
        ("tokens", figures.UNKNOWN if of.tokens is None else f"{quantity(of.tokens)} ({of.tokens:,.0f})"),
        ("USD per billion tokens", usd(of.usd_per_billion_tokens)),
        ("USD per 1e18 FLOPs", _or(of.usd_per_exaflop, "{:.4f}")),
        ("final train loss", loss(of.train_loss)),
        ("final validation loss", loss(of.val_loss)),
        *hellaswag_rows(of),
        ("USD per point of validation loss", usd(of.usd_per_loss_point)),
    ]
    rows += [
        (f"USD to validation loss {level.val_loss:g}", f"{usd(level.usd, report.places)} (step {level.step:,})")
        for level in (of.usd_to_val_loss if levels else ())
    ]
    rows += [
        ("GPU-hours", _or(of.gpu_hours, "{:,.2f}")),
        ("USD per GPU-hour", usd(of.usd_per_gpu_hour)),
        ("utilisation of the GPUs while training (MFU)", _percent(of.mfu)),
        ("goodput: `train kept` / paid time", _percent(of.goodput)),
    ]
    if of.restarts:
        each = f"{figures.dollars(of.usd_per_restart, report.places)} ({figures.counted(of.restarts, 'restart')})"
        rows.append(("USD per restart: repeated steps and preparation", each))
    if of.usd_on_demand is not None:
        saved = figures.dollars(of.usd_saved, report.places)
        rows.append(
            ("USD for the same hours on demand", f"{figures.dollars(of.usd_on_demand, report.places)} (saved {saved})")
        )
    if of.hour_more_tokens is not None:
        reached = "" if of.hour_more_val_loss is None else f", val loss {of.hour_more_val_loss:.3f}"
        more = f"{quantity(of.hour_more_tokens)} tokens for {figures.dollars(of.hour_more_usd)} USD{reached}"
        rows.append(("one hour more (estimate)", more))
    return rows


def hellaswag_rows(of: Units) -> list[tuple[str, str]]:
    """Rows with HellaSwag's accuracies. There are none if the run did not measure HellaSwag."""
    rows = (("HellaSwag, by character (acc_norm)", of.hellaswag_norm), ("HellaSwag, unnormalised (acc)", of.hellaswag))
    return [(name, _percent(value)) for name, value in rows if value is not None]


def storage_rows(report: CostReport) -> list[tuple[str, str, str]]:
    """The monthly storage cost of the run's objects and of its token set from now on."""
    use = report.storage
    if use is None:
        return []
    rows = [("unfinished multipart uploads", f"{use.unfinished_uploads:,}", "their parts are billed")]
    return (_rated_rows(use) if use.rates else []) + (rows if use.unfinished_uploads else [])


def _rated_rows(use: StorageUse) -> list[tuple[str, str, str]]:
    def row(what: str, size: int) -> tuple[str, str, str]:
        month = size / 1e9 * use.rates.usd_per_gb_month
        usd = figures.dollars(month, 4 if month < 1 else 2)
        return what, f"{quantity(size)}B", f"${usd} a month, at ${use.rates.usd_per_gb_month:g} per GB"

    rows = [row(f"{use.objects:,} objects, of which checkpoints {quantity(use.checkpoint_bytes)}B", use.bytes)]
    return rows + ([row("token set, which other runs may read too", use.data_bytes)] if use.data_bytes else [])


def loss(value: float | None) -> str:
    return _or(value, "{:.4f}")


def _or(value: float | None, form: str) -> str:
    return figures.UNKNOWN if value is None else form.format(value)


def _percent(value: float | None) -> str:
    return figures.UNKNOWN if value is None else f"{100 * value:.1f} %"
