"""Formats amounts, durations and dollars, and rounds dollars so that printed parts add up to the printed total."""

import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

UNKNOWN = "?"


def places_for(total: float) -> int:
    """Decimal places for dollars: 2 for a dollar or more, 4 below a dollar, 6 below a cent. Zero has 4."""
    return 2 if total >= 1 else 4 if total >= 0.01 or total <= 0 else 6


def apportion(amounts: Sequence[float | None], places: int, total: float | None = None) -> list[float | None]:
    """Round each amount to `places` so that they add up to the rounded total (largest remainder method).

    If another table prints the sum of these amounts, pass it as `total`: a second sum of the same floats may differ
    slightly. An amount of None is unknown and stays None. If two remainders are equal, the earlier amount is rounded
    up.
    """
    unit = Decimal(1).scaleb(-places)
    exact = {index: Decimal(amount) for index, amount in enumerate(amounts) if amount is not None}
    floors = {index: (value / unit).to_integral_value(ROUND_FLOOR) for index, value in exact.items()}
    whole = sum(exact.values(), Decimal(0)) if total is None else Decimal(total)
    missing = int((whole / unit).to_integral_value(ROUND_HALF_EVEN) - sum(floors.values(), Decimal(0)))
    by_remainder = sorted(exact, key=lambda index: floors[index] - exact[index] / unit)
    for index in by_remainder[: max(0, missing)]:
        floors[index] += 1
    return [float(floors[index] * unit) if index in exact else None for index in range(len(amounts))]


def dollars(usd: float | None, places: int = 2, complete: bool = True, most: float | None = None) -> str:
    """1234.5 → "1,234.50"; None → "?".

    If `complete` is false, a part of the sum is unknown: "1,234.50 + ?". If `most` is given, it is the upper end of a
    range: "4.92 to 5.03".
    """
    if usd is None:
        return UNKNOWN
    low, high = f"{usd:,.{places}f}", f"{usd if most is None else most:,.{places}f}"
    return (low if low == high else f"{low} to {high}") + ("" if complete else f" + {UNKNOWN}")


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units: "4.2 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def counted(number: int, one: str) -> str:
    """1, "rank" → "1 rank"; 2000, "batch" → "2,000 batches"."""
    return f"{number:,} {one}" + ("" if number == 1 else "es" if one.endswith(("ch", "ss")) else "s")


def quantity(number: float) -> str:
    """1234567 → "1.23M"."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"
