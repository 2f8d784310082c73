"""How figures are worded, the same in every form of a report."""

from datetime import UTC, datetime

from core.console import quantity
from costs import money
from costs.breakdown import Report, SegmentLine
from costs.units import Units

NOTES_SHOWN = 20


def clock(time: float | None) -> str:
    return "?" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"


def headline(report: Report) -> str:
    count = len(report.segments)
    usd = "$" + money.text(report.total.usd, report.places, report.total.complete)
    segments = f"{count} segment{'s' * (count != 1)}"
    time = f"{money.duration(report.total.seconds)} of machine time"
    return f"{report.stage or 'stage ?'}, {report.state}; {segments}, {time}, {usd}"


def notes(report: Report) -> list[str]:
    """The notes, as many as somebody would read; JSON has all of them."""
    left = len(report.notes) - NOTES_SHOWN
    return report.notes[:NOTES_SHOWN] + ([f"{left} more notes: --json has all"] if left > 0 else [])


def steps(line: SegmentLine) -> str:
    first = "?" if line.restored_step is None else str(line.restored_step)
    return f"{first} → {first if line.last_step is None else line.last_step}"


def unit_rows(report: Report, levels: bool = True) -> list[tuple[str, str]]:
    """Name and value of each unit cost; those that cannot apply to the run are left out, unknown ones are `?`."""
    of = report.units
    if of.tokens is None and not any(line.name == "train_kept" for line in report.phases):
        return []
    rows = [
        ("last step", _or(of.last_step, "{:,}")),
        ("tokens", money.UNKNOWN if of.tokens is None else f"{quantity(of.tokens)} ({of.tokens:,.0f})"),
        ("USD per billion tokens", money.text(of.usd_per_billion_tokens)),
        ("USD per 1e18 FLOPs", _or(of.usd_per_exaflop, "{:.4f}")),
        ("final train loss", loss(of.train_loss)),
        ("final validation loss", loss(of.val_loss)),
        *hellaswag_rows(of),
        ("USD per point of validation loss", money.text(of.usd_per_loss_point)),
    ]
    rows += [
        (f"USD to validation loss {level.val_loss:g} (step {level.step:,})", money.text(level.usd, report.places))
        for level in (of.usd_to_val_loss if levels else ())
    ]
    rows += [
        ("GPU-hours", _or(of.gpu_hours, "{:,.2f}")),
        ("USD per GPU-hour", money.text(of.usd_per_gpu_hour)),
        ("utilisation of the GPUs while training (MFU)", _percent(of.mfu)),
        ("goodput: share of paid time in training that was kept", _percent(of.goodput)),
    ]
    if of.restarts:
        rows.append(
            (
                f"USD per restart ({of.restarts}): steps done again and getting ready",
                money.text(of.usd_per_restart, report.places),
            )
        )
    if of.usd_on_demand is not None:
        saved = money.text(of.usd_saved, report.places)
        rows.append(
            ("USD for the same hours on demand", f"{money.text(of.usd_on_demand, report.places)} (saved {saved})")
        )
    if of.hour_more_tokens is not None:
        reached = "" if of.hour_more_val_loss is None else f", val loss {of.hour_more_val_loss:.3f}"
        price = money.text(of.hour_more_usd)
        rows.append((f"one hour more (estimate), for {price} USD", f"{quantity(of.hour_more_tokens)} tokens{reached}"))
    return rows


def hellaswag_rows(of: Units) -> list[tuple[str, str]]:
    """Nothing for a run that never measured it."""
    rows = (("HellaSwag, by character (acc_norm)", of.hellaswag_norm), ("HellaSwag, as it is (acc)", of.hellaswag))
    return [(name, _percent(value)) for name, value in rows if value is not None]


def storage_rows(report: Report) -> list[tuple[str, str, str]]:
    """What the run's objects take, and the rates at which they cost; requests and egress are not counted by anybody
    we could ask, so only their rates are known."""
    use = report.storage
    if use is None or use.rates is None:
        return []
    month = use.bytes / 1e9 * use.rates.usd_per_gb_month
    return [
        (
            f"{use.objects:,} objects, of which checkpoints {quantity(use.checkpoint_bytes)}B",
            f"{quantity(use.bytes)}B",
            f"${money.text(month, 4 if month < 1 else 2)} a month, at ${use.rates.usd_per_gb_month:g} per GB",
        ),
        ("writes and listings", money.UNKNOWN, f"${use.rates.usd_per_million_writes:g} per million"),
        ("reads", money.UNKNOWN, f"${use.rates.usd_per_million_reads:g} per million"),
        ("egress to the internet", money.UNKNOWN, f"${use.rates.usd_per_gb_egress:g} per GB"),
    ]


def loss(value: float | None) -> str:
    return _or(value, "{:.4f}")


def _or(value: float | None, form: str) -> str:
    return money.UNKNOWN if value is None else form.format(value)


def _percent(value: float | None) -> str:
    return money.UNKNOWN if value is None else f"{100 * value:.1f} %"
