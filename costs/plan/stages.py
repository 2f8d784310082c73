"""Prices the stages beside training: the preparation of the tokens, and the evaluation and export of the model."""

from collections.abc import Mapping

from clouds.catalog import Catalog
from core.task import read_task
from costs.forecast import Assumptions, forecast_of
from costs.plan.planner import EVALUATION, PREPARATION, Line
from costs.plan.recipes import ROOT

PREPARE_TASK, EVALUATE_TASK = "sky/prep-data.yaml", "sky/evaluate.yaml"


def beside(catalog: Catalog, assume: Assumptions, is_prepared: bool = False) -> Mapping[str, Line]:
    """Dollars of machines by stage, each on the cheapest offer that fits its task.

    A stage for whose machines the catalog has no price is left out.
    """
    found = {} if is_prepared else {PREPARATION: _line(PREPARE_TASK, catalog, assume)}
    found[EVALUATION] = _line(EVALUATE_TASK, catalog, assume, assume.evaluate_tokens)
    return {name: line for name, line in found.items() if line is not None}


def _line(path: str, catalog: Catalog, assume: Assumptions, fixed_tokens: float | None = None) -> Line | None:
    """The dollars of a task against tokens; with `fixed_tokens` those of so many, whatever the run trains on."""
    task = read_task(str(ROOT / path), {"BUCKET": "plan"})

    def usd(tokens: float) -> float | None:
        rows = forecast_of(task, catalog, assume, None, tokens).rows
        return rows[0].usd if rows else None

    if fixed_tokens is not None:
        fixed = usd(fixed_tokens)
        return None if fixed is None else Line(fixed, 0.0)
    one, two = usd(1e9), usd(2e9)
    return None if one is None or two is None else Line(2 * one - two, (two - one) / 1e9)
