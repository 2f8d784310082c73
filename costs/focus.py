"""Turns reports into rows of charges. Columns have the names of FOCUS 1.2 (FinOps Open Cost and Usage Specification).

FOCUS requires that names of additional columns begin with `x_`. Dollars are not rounded.
"""

import json
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any

from core.run.phases import label
from costs.cells import Cell
from costs.report import CostReport

# The ServiceCategory of phases that hold no machine time.
_SERVICES = {
    "api": "AI and Machine Learning",
    "disks": "Storage",
    "storage": "Storage",
    "requests": "Storage",
    "addresses": "Networking",
    "traffic": "Networking",
    "factor": "Other",
}
_PRICING = {"on demand": "Standard", "spot": "Dynamic"}
UNKNOWN = ("?", "–")


def charges(report: CostReport) -> Iterator[dict[str, Any]]:
    """A dict per charge, which is one phase on one day on one machine. All dicts have the same keys.

    None means unknown or not applicable. `BilledCost` is the amount that is known to be billed. `x_BilledCostAtMost` is
    an upper bound of the billed amount.
    """
    for cell in report.charges:
        start, end = _day(cell)
        yield {
            "BilledCost": cell.usd,
            "EffectiveCost": cell.usd,
            "BillingCurrency": "USD",
            "ChargePeriodStart": start,
            "ChargePeriodEnd": end,
            "ChargeCategory": "Adjustment" if cell.phase == "factor" else "Usage",
            "ChargeDescription": f"{label(cell.phase)} of {report.run}",
            "ConsumedQuantity": cell.seconds / 3600 if cell.seconds else None,
            "ConsumedUnit": "Hours" if cell.seconds else None,
            "PricingCategory": _PRICING.get(cell.market),
            "ProviderName": _known(cell.cloud),
            "RegionId": _known(cell.region),
            "AvailabilityZone": _known(cell.zone),
            "ResourceType": _known(cell.instance),
            "ServiceCategory": _SERVICES.get(cell.phase, "Compute"),
            "Tags": json.dumps({"run": report.run, "tags": ",".join(report.tags)}),
            "x_Run": report.run,
            "x_Stage": cell.stage,
            "x_Segment": cell.segment,
            "x_Phase": cell.phase,
            "x_Nodes": cell.nodes,
            "x_PriceSource": _known(cell.price_source),
            "x_BilledCostAtMost": None if cell.usd is None else cell.usd + cell.more_usd,
        }


def _known(text: str) -> str | None:
    return None if text in UNKNOWN else text


def _day(cell: Cell) -> tuple[str | None, str | None]:
    """Start and end of a charge's day, at midnight UTC. Both are None if the day is unknown."""
    if cell.day == "?":
        return None, None
    day = date.fromisoformat(cell.day)
    return f"{day}T00:00:00Z", f"{day + timedelta(days=1)}T00:00:00Z"
