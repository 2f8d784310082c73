"""What rank 0 writes about a segment of training; other ranks hold a record without a ledger, which writes nothing.

docs/formats.md describes run.json, the ledger and the metrics.
"""

import contextlib
import logging

import torch

from core import storage
from core.errors import ObjectNotFound
from core.run import journal
from core.run.folder import RunFolder
from core.run.segment import Opening, SegmentLog, open_segment
from trainer.checkpoint.load import Restored
from trainer.distributed.process_group import Ranks, on_main
from trainer.stages.stage import Stage

log = logging.getLogger("train")


class Record(SegmentLog):
    """A segment of training."""

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

    def measured(self, restored: Restored) -> set[str]:
        """Which kinds of metrics there are of the step that was restored: not those of an evaluation that was cut off.

        The segment that saved the step measured it, or one after it.
        """
        found: set[str] = set()
        for number in range(restored.segment, self.number):
            for info in reversed(storage.list_objects(self.ledger.folder.segment(number).metrics)):
                with contextlib.suppress(ObjectNotFound):  # its writer has just put it together with others
                    events, _ = journal.read_objects([info.uri])
                    found |= {event["kind"] for event in events if event["step"] == restored.step}
                    if events and events[0]["step"] < restored.step:
                        break
        return found


def open_record(stage: Stage, ranks: Ranks) -> Record:
    """Rank 0 opens the run and its next segment. Raises RunError, ConfigError on all ranks."""
    opened: list[Record] = []

    def open_it() -> int:
        settings = stage.settings
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else None
        opening = Opening(
            stage=stage.name,
            config=stage.config,
            identity=stage.identity,
            fingerprint=stage.fingerprint,
            packages=("torch", "numpy", "obstore"),
            program={"ranks": ranks.world},
            gpu=gpu,
            gpus_per_node=ranks.local_world if gpu else 0,
            max_usd=settings.run.max_usd,
            shutdown_seconds=settings.run.shutdown_reserve_seconds,
            has_metrics=True,
        )
        record = open_segment(RunFolder(settings.run.url), opening, Record)
        opened.append(record)
        log.info(
            "%s %s, segment %d", "new run at" if record.is_new_run else "continuing", settings.run.url, record.number
        )
        return record.number

    number = on_main(open_it, ranks)
    return opened[0] if opened else Record(number=number)
