"""Rented machines that are not there: what a launch of `make run` would leave in the bucket, on this computer."""

import functools
import time
from pathlib import Path

import pytest

from clouds import providers
from clouds.base import Cloud
from launch import drive, outcome, plan
from tests import corpus
from tests.golden import GoldenRun, mark, span, train_metric

STEPS = 12
ASK = plan.ask


@functools.cache
def planned() -> dict:
    """The plan for $20 on eight A100 on demand, by the program itself."""
    return ASK(["--usd=20", "--offline", "--gpus=A100:8", "--cloud=lambda", "--on-demand"])


class Machines:
    """In the place of launches: leaves in the bucket what the machines of each task would.

    `trainings` are ends of training machines, one after the other; None is a machine that left nothing, "gone" one
    that left its steps and no end.
    """

    def __init__(self, bucket: Path, vocab: Path):
        self.bucket, self._vocab = bucket, vocab
        self.launches: list[tuple[str, list[str], dict[str, str]]] = []
        self.trainings: list[str | None] = ["finished"]
        self.evaluation = "finished"
        self.usd_per_hour = 36.0

    def submit(self, path: str, options: list[str], settings: dict[str, str]) -> int:
        self.launches.append((path, options, settings))
        {"sky/prep-data.yaml": self._prepare, "sky/evaluate.yaml": self._evaluate, "sky/export.yaml": self._export}.get(
            path, self._train
        )(settings)
        return 0

    def caps(self) -> list[float]:
        return [float(settings["MAX_USD"]) for _, _, settings in self.launches]

    def _prepare(self, settings: dict[str, str]) -> None:
        source = corpus.write_parquet(self.bucket / "source", [corpus.documents(60)])
        flags = [each for each in settings["PREP_ARGS"].split() if "val_fraction" not in each]
        corpus.prepare_set(source, str(self.bucket / "data" / settings["DATA"]), self._vocab, *flags)
        self._segment(self.bucket / "runs" / settings["RUN"], "finished", 10.0)

    def _train(self, settings: dict[str, str]) -> None:
        end = self.trainings.pop(0)
        if end is None:
            return
        folder = self.bucket / "runs" / settings["RUN"]
        step = STEPS if end == "finished" else 5
        self._segment(folder, end, 600.0, step)
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        (folder / f"checkpoints/step-{step:08d}/COMPLETE").touch()

    def _evaluate(self, settings: dict[str, str]) -> None:
        self._segment(self.bucket / "runs" / settings["RUN"] / "evaluations", self.evaluation, 20.0)

    def _export(self, settings: dict[str, str]) -> None:
        self._segment(self.bucket / "runs" / settings["RUN"] / "exports", "finished", 5.0)

    def _segment(self, folder: Path, end: str, seconds: float, step: int = 0) -> None:
        now, golden = time.time(), GoldenRun(folder)
        number = len(list(folder.glob("ledger/segment-*"))) + 1
        steps = [[each, seconds / step, 0.0] for each in range(1, step + 1)]
        events = [
            mark("restored", step=0, checkpoint=None, skipped=[]),
            span(now, now + seconds, steps, train=seconds),
            {
                "event": "end",
                "time": now + seconds,
                "reason": end,
                "step": step,
                "error": "it broke" * (end == "failed"),
            },
        ]
        if end == "gone":
            events.pop()
        golden.segment(number, now, events, usd_per_hour=self.usd_per_hour, spot=False)
        loss = {"kind": "eval", "time": now + seconds, "step": step, "tokens": 1e6 * step, "val_loss": 3.25}
        ahead = {"kind": "forecast", "val_loss": 3.3, "error": 0.02, "end": STEPS, "usd": 6.1}
        forecasts = [ahead | {"time": now + each, "step": each} for each in range(1, step + 1)]
        golden.metrics(number, [*forecasts, *(train_metric(each, now + each) for each in range(1, step + 1)), loss])


def rent(found: Machines, sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put these machines into the place of launches, with a `sky` command that lists nothing."""
    sky.find_here(monkeypatch)
    sky(**{"status": ["[]", "", 0], "jobs queue": ["[]", "", 0]})
    for name in ("RUN", "DATA", "CONFIG", "TRAIN_ARGS", "MAX_USD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BUCKET", str(found.bucket))
    monkeypatch.setattr(drive, "submit", found.submit)
    monkeypatch.setattr(drive, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(plan, "ask", lambda arguments: planned())
    monkeypatch.setattr(outcome, "_store_report", lambda folder: None)
    monkeypatch.setattr(Cloud, "is_configured", lambda self: True)
    monkeypatch.setattr(providers.CLOUDS["lambda"], "is_configured", lambda: True)
