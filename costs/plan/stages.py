"""Prices the stages other than training: the preparation of the tokens, and the evaluation and export of the model."""

from collections.abc import Mapping

from clouds.catalog import Catalog
from core.task import read_task
from costs.forecast import Assumptions, forecast_of
from costs.plan.planner import EVALUATION, EXPORT, PREPARATION, Line
from costs.plan.recipes import ROOT

PREPARE_TASK = "sky/prep-data.yaml"
ONCE = {EVALUATION: "sky/evaluate.yaml", EXPORT: "sky/export.yaml"}


def beside(catalog: Catalog, assume: Assumptions, is_prepared: bool = False) -> Mapping[str, Line]:
    """Dollars of machines by stage. Each stage uses the cheapest offer that fits its task.

    A stage is left out if the catalog has no price for its machines.
    """
    one, two = (None if is_prepared else _usd(PREPARE_TASK, catalog, assume, tokens) for tokens in (1e9, 2e9))
    found = {} if one is None or two is None else {PREPARATION: Line(2 * one - two, (two - one) / 1e9)}
    once = {name: _usd(path, catalog, assume) for name, path in ONCE.items()}
    return found | {name: Line(usd, 0.0) for name, usd in once.items() if usd is not None}


def _usd(path: str, catalog: Catalog, assume: Assumptions, tokens: float | None = None) -> float | None:
    rows = forecast_of(read_task(str(ROOT / path), {"BUCKET": "plan"}), catalog, assume, None, tokens).rows
    return rows[0].usd if rows else None
