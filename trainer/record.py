"""What rank 0 writes about the run: run.json, the ledger and the metrics. Other ranks hold an empty one.

Metrics are JSON lines below RUN_URL/metrics/segment-NNNNNN/ (docs/formats.md).
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from core import journal, ledger, storage
from core.errors import ObjectNotFound
from core.journal import Journal
from core.run import machine_from_environment, open_run, process_started_at, program_versions, segment_started_at
from trainer.checkpoint.load import Restored
from trainer.distributed import Ranks, on_main
from trainer.stages.stage import Stage
from trainer.watch.cap import SpendingCap, spent_by_earlier_segments

log = logging.getLogger("train")

METRICS = "metrics"


class Record:
    """Opens the run and its next segment; `phase` books time, `metric` keeps numbers."""

    def __init__(self, stage: Stage, ranks: Ranks):
        self.ledger: ledger.Ledger | None = None
        self.cap: SpendingCap | None = None
        self.config = stage.config
        self._metrics: Journal | None = None
        self.segment: int = on_main(lambda: self._open(stage, ranks), ranks)

    def _open(self, stage: Stage, ranks: Ranks) -> int:
        run = stage.settings.run
        url = run.url
        created = open_run(url, stage.identity, self.config, stage.fingerprint)
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else None
        machine = machine_from_environment(gpu, ranks.local_world if gpu else 0)
        program = program_versions(("torch", "numpy", "s3fs")) | {"ranks": ranks.world, "stage": stage.name}
        before = spent_by_earlier_segments(url, machine, run.max_usd)
        self.ledger = ledger.Ledger(url, machine, program, segment_started_at(), process_started_at())
        self.cap = SpendingCap(self.ledger, run.max_usd, run.shutdown_seconds, before)
        self._metrics = Journal(storage.join(url, METRICS, ledger.segment_name(self.ledger.segment)))
        log.info("%s %s, segment %d", "new run at" if created else "continuing", url, self.ledger.segment)
        return self.ledger.segment

    def phase(self, name: str):
        return self.ledger.phase(name) if self.ledger else contextlib.nullcontext()

    def switch(self, name: str) -> None:
        if self.ledger:
            self.ledger.switch(name)

    def mark(self, name: str, **details: Any) -> None:
        if self.ledger:
            self.ledger.mark(name, **details)

    def restored(self, restored: Restored | None) -> None:
        """Note where this segment starts."""
        step = restored.step if restored else 0
        skipped = [{"name": name, "why": why} for name, why in restored.skipped] if restored else []
        self.mark("restored", step=step, skipped=skipped)
        log.info("resumed from step %d" if restored else "starting at step %d", step)

    def first_step(self, step: int, step_seconds: float) -> None:
        """Note how long it took from the start of this process to the beginning of its first step."""
        if self.ledger:
            seconds = self.ledger.now() - self.ledger.process_started_at - step_seconds
            self.mark("first_step", step=step, seconds=seconds, step_seconds=step_seconds)
            log.info("the first step began %.1f s after the start and took %.1f s", seconds, step_seconds)

    def step_done(self, step: int) -> None:
        if self.ledger:
            self.ledger.step_done(step)

    def measured(self, restored: Restored) -> set[str]:
        """Which kinds of metrics there are of the step that was restored: not those of an evaluation that was cut off.

        The segment that saved the step measured it, or one after it.
        """
        found: set[str] = set()
        url = self.ledger.run_url
        for segment in range(restored.segment, self.segment):
            folder = storage.join(url, METRICS, ledger.segment_name(segment))
            for info in reversed(storage.list_objects(folder)):
                with contextlib.suppress(ObjectNotFound):  # its writer has just put it together with others
                    events, _ = journal.read_objects([info.uri])
                    found |= {event["kind"] for event in events if event["step"] == restored.step}
                    if events and events[0]["step"] < restored.step:
                        break
        return found

    def metric(self, kind: str, values: Mapping[str, Any]) -> None:
        if self._metrics:
            self._metrics.add({"kind": kind, "time": self.ledger.now(), **values})

    def flush(self) -> bool:
        """Store all that is known up to now. A checkpoint is marked complete only after that: what it keeps of the
        run must not be missing in the books."""
        return self._metrics.flush() and self.ledger.flush() if self.ledger else True

    def close(self, reason: str, step: int | None, **details: Any) -> None:
        """Store everything; a store that is away is logged, not raised: the reason to close matters more."""
        if self._metrics:
            self._metrics.close()
        if self.ledger:
            self.ledger.close(reason, step, **details)
