"""Shows the outcome of a budget: dollars by stage, dollars left, and how loss and dollars differ from the forecast."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core import storage
from core.errors import LauncherError, RunError, one_line
from core.figures import dollars
from core.run import budget as budgets
from core.run.budget import Budget
from core.run.folder import RunFolder
from core.run.model import Point
from core.run.reader import read_run
from launch import plan
from launch.stages import end_of, spent

IN_RUN = 8  # number of the run's own forecasts that are kept with the outcome
_FORECAST = ("val_loss", "error", "end", "usd")


def _figure(usd: float | None) -> str:
    return "?" if usd is None else dollars(usd)


def conclude(folder: RunFolder, budget: Budget) -> None:
    """Store and print the outcome of the budget beside the forecast."""
    result = outcome(folder, budget)
    budgets.end(folder, budget.number, result)
    print("", *summary(folder, budget, result), sep="\n", flush=True)
    _store_report(folder)


def outcome(folder: RunFolder, budget: Budget) -> dict[str, Any]:
    """Dollars by stage, steps, tokens and validation loss of a run that has ended, beside its forecast."""
    run = read_run(folder.url)
    whole = spent(folder)
    by_stage = {
        "preparation": _usd_of(folder.preparation),
        "training": run.usd_at_most,
        "evaluation": _usd_of(folder.evaluations),
        "export": _usd_of(folder.exports),
    }
    losses = run.points("eval")
    trained = run.points("train")
    return {
        "forecast": dict(budget.forecast),
        "in_run": in_run(run.points("forecast")),
        "budget_usd": budget.usd,
        "beside_usd": budget.usd - budget.machines_usd,
        "usd": whole,
        "usd_by_stage": by_stage,
        "left_usd": budget.machines_usd - whole,
        "end": end_of(folder.url, budget.began_at),
        "steps": run.last_step,
        "tokens": trained[-1].values["tokens"] if trained else None,
        "hours": sum(segment.seconds for segment in run.segments) / 3600,
        "restarts": len(run.segments) - 1,
        "val_loss": losses[-1].values["val_loss"] if losses else None,
        "data": budget.settings["DATA"],
    }


def in_run(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Some of the trainer's forecasts, evenly spaced, including the last one."""
    every = max(1, len(points) // IN_RUN)
    shown = [*points[every - 1 : -1 : every], *points[-1:]]
    return [{"step": each.step} | {key: each.values.get(key) for key in _FORECAST} for each in shown]


def _usd_of(url: str) -> float | None:
    try:
        return read_run(url).usd_at_most
    except RunError:
        return 0.0


def summary(folder: RunFolder, budget: Budget, result: Mapping[str, Any]) -> list[str]:
    """Lines on the dollars by stage and on the dollars left.

    Further lines say how loss and dollars differ from the forecast.
    """
    parts = ", ".join(f"{name} {_figure(usd)}" for name, usd in result["usd_by_stage"].items() if usd != 0.0)
    left, beside = result["left_usd"], result["beside_usd"]
    said = [
        f"spent on machines: ${_figure(result['usd'])} ({parts})",
        f"left of ${dollars(budget.usd)}: ${dollars(max(0.0, left))}, and ${dollars(beside)} for storage, egress and "
        "SkyPilot, which no ledger counts",
    ]
    if result["end"] == "cap":
        said.append(
            "the cap ended the training before its last step, so the learning rates had not fallen to their end"
        )
    loss, forecast, step = result["val_loss"], budget.forecast, result["steps"]
    if loss is not None:
        said.append(f"validation loss on {result['data']}: {loss:.4f}")
    if loss is not None and "loss" in forecast:
        expected = f"{forecast['loss']:.3f} ± {forecast['loss_error']:g} on {forecast['loss_scale']}"
        said[-1] += f"; the plan said {expected}, another set of texts"
    middle = [each for each in result["in_run"] if step and each["step"] <= step / 2 and each["val_loss"] is not None]
    if loss is not None and middle:
        expected = f"{middle[-1]['val_loss']:.4f} ± {middle[-1]['error'] or 0.0:.3f}"
        said.append(f"at step {middle[-1]['step']:,} of {step:,} the run itself expected {expected}")
    if step:
        said.append(f"model: {folder.checkpoint(step)}; for transformers: {folder.exports}")
    said.append(f"report: python cost_report.py {folder}")
    return said


def _store_report(folder: RunFolder) -> None:
    """Store the cost report as a page in the run's folder. A failure is only reported."""
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        command = [sys.executable, str(plan.ROOT / "cost_report.py"), folder.url, "--html", str(page)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=plan.PLAN_SECONDS)
            if done.returncode:
                raise RunError((done.stderr.strip().splitlines() or ["no answer"])[-1])
            storage.write_file(storage.join(folder.url, page.name), page)
            print(f"page: {storage.join(folder.url, page.name)}", flush=True)
        except (LauncherError, subprocess.TimeoutExpired) as error:
            print(f"the page of the report was not stored: {one_line(error)}", file=sys.stderr)
