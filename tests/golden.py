"""Run folders with times made by hand, in the documented formats (docs/formats.md), for tests of the report."""

import json
from pathlib import Path
from typing import Any

NOON = 1_795_176_000.0  # 2026-11-20 12:00:00 UTC
A100S = {"cloud": "aws", "region": "us-east-1", "zone": "us-east-1a", "instance_type": "p4d.24xlarge"}
A100S |= {"gpu": "A100", "gpus_per_node": 8, "nodes": 1, "price_source": "by hand"}


def lines(*events: dict[str, Any]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def span(start: float, end: float, steps: list[list[float]] = (), **phases: float) -> dict[str, Any]:
    return {"event": "span", "start": start, "end": end, "phases": phases, "steps": list(steps)}


def mark(name: str, **details: Any) -> dict[str, Any]:
    return {"event": "mark", "time": NOON, "name": name, **details}


class GoldenRun:
    """Writes the objects of one run below `path`."""

    def __init__(self, path: Path, config: dict[str, Any] | None = None):
        self.path = path
        self.url = str(path)
        self.write(
            "run.json", json.dumps({"format": "run", "version": 1, "config": config or {"train": {"steps": 12}}})
        )

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def segment(
        self,
        number: int,
        time: float,
        events: list[dict[str, Any]],
        *,
        version: int = 1,
        launcher: dict[str, Any] | None = None,
        **machine: Any,
    ) -> None:
        """A start object, and one object that holds all events."""
        folder = f"ledger/segment-{number:06d}"
        start = {"event": "start", "version": version, "segment": number, "time": time, "machine": A100S | machine}
        self.write(
            f"{folder}/start.jsonl", lines(start | {"program": {}} | ({"launcher": launcher} if launcher else {}))
        )
        if events:
            self.write(f"{folder}/events/00000000-{len(events) - 1:08d}.jsonl", lines(*events))

    def metrics(self, number: int, events: list[dict[str, Any]]) -> None:
        self.write(f"metrics/segment-{number:06d}/00000000-{len(events) - 1:08d}.jsonl", lines(*events))


def preempted_and_resumed(path: Path) -> GoldenRun:
    """Two machines. The first, at a cent a second, is killed after step 10 and 7 s of step 11.

    The second, at half a cent, continues from step 5, loses 9.4 s of timeline and finishes at step 12.
    """
    run = GoldenRun(path)
    steps = [[step, 20.0, 1.0] for step in range(1, 11)]
    run.segment(
        1,
        NOON,
        [
            span(NOON, NOON + 150, setup=100.0, init=20.0, compile=30.0),
            mark("restored", step=0, checkpoint=None, skipped=[]),
            span(NOON + 150, NOON + 260, steps[:5], train=100.0, data_wait=5.0, checkpoint=5.0),
            span(NOON + 260, NOON + 372, steps[5:], train=107.0, data_wait=5.0),
        ],
        spot=False,
        usd_per_hour=36.0,
    )
    second = NOON + 500
    again = [[step, 20.0, 0.8] for step in range(6, 13)]
    run.segment(
        2,
        second,
        [
            span(second, second + 72, setup=60.0, restore=12.0),
            mark("restored", step=5, checkpoint="step-00000005", skipped=[]),
            span(second + 81.4, second + 240, again, train=140.0, data_wait=5.6, eval=9.0, sample=4.0),
            {"event": "end", "time": second + 240, "reason": "finished", "step": 12},
        ],
        spot=True,
        usd_per_hour=18.0,
        zone="us-east-1b",
    )
    run.metrics(1, [train_metric(step, NOON + 150 + 21 * step) for step in range(1, 11)])
    run.metrics(
        2,
        [train_metric(step, second + 81.4 + 20.8 * (step - 5)) for step in range(6, 13)]
        + [{"kind": "eval", "time": second + 236, "step": 12, "tokens": 12e6, "val_loss": 3.5}],
    )
    return run


def train_metric(step: int, time: float) -> dict[str, Any]:
    return {
        "kind": "train",
        "time": time,
        "step": step,
        "loss": 5.0 - step / 10,
        "tokens": step * 1e6,
        "tokens_per_second": 5e4,
        "mfu": 0.4,
    }
