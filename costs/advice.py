"""What dominates a forecast, and which single change would save most. Pure."""

import dataclasses

from costs import money
from costs.forecast import Assumptions, Plan, Row, forecast
from costs.model import StorageRates
from costs.prices import Catalog
from costs.throughput import Measured


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing to do, and the expected dollars after it."""

    what: str
    usd: float


def dominates(row: Row) -> str | None:
    """The largest part of an offer's dollars, in words."""
    if not row.parts or not row.usd:
        return None
    name, usd = max(row.parts.items(), key=lambda item: item[1])
    return f"{name}, {100 * usd / row.usd:.0f} % of ${money.text(row.usd, money.places_for(row.usd))}"


def best_change(
    plan: Plan, catalog: Catalog, assume: Assumptions, rates: StorageRates | None, measured: Measured | None
) -> Change | None:
    """The change with the lowest expected dollars, if it is below the plan's best; each alone, not combined."""
    now = plan.rows[0] if plan.rows else None
    if now is None or now.usd is None:
        return None
    changes = [Change(f"take {describe(row)}", row.usd) for row in plan.others[:1] if row.usd is not None]
    settings = {
        "an image that is already on the machine": {"image_seconds": 0.0},
        "shutting down at once when done": {"shutdown_seconds": 0.0},
    }
    for what, fields in settings.items():
        changed = dataclasses.replace(assume, **fields)
        again = forecast(plan.task, catalog, changed, rates, plan.tokens, measured)
        if again.rows and again.rows[0].usd is not None:
            changes.append(Change(what, again.rows[0].usd))
    changes.append(Change("half as many validations", now.usd - now.parts.get("eval", 0.0) / 2))
    if "egress" in now.parts:
        changes.append(Change("a bucket without egress charges (Cloudflare R2)", now.usd - now.parts["egress"]))
    best = min(changes, key=lambda change: change.usd)
    return best if best.usd < now.usd else None


def describe(row: Row) -> str:
    where = row.offer.zone or row.offer.region
    return f"{row.offer.cloud} {row.offer.instance_type} in {where}, {'spot' if row.spot else 'on demand'}"
